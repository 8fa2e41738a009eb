"""Zero-shot classification: images against labels in words."""
