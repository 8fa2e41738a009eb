"""Search in the embeddings of a run: exact or approximate, by texts, images and rows, filtered by columns."""
