"""How good a model is on data with answers: zero-shot classification, retrieval and caption matching."""
