"""Blocks of stored embeddings as float32, always of 1024 rows: rows that are missing at the end are zeros, so that the shape
of a product, and so its rounding, never depends on how many rows follow."""

from __future__ import annotations

import sys

import numpy as np

BLOCK = 1024


def upcast(half: np.ndarray, out: np.ndarray) -> None:
    """float16 [m, d] into the first rows of a float32 block, the rest zero. Exact, whoever does it."""
    size = len(half)
    torch = sys.modules.get("torch")
    if torch is not None and half.dtype == np.float16:
        half = np.ascontiguousarray(half)
        try:
            tensor = torch.from_dlpack(half)
        except BufferError:  # before DLPack 1.0 they share nothing that is read-only, such as a mapped file
            tensor = torch.from_numpy(half.copy())
        torch.from_numpy(out)[:size].copy_(tensor)  # many times as fast as numpy's cast
    else:
        out[:size] = half
    out[size:] = 0.0


def usable(block: np.ndarray) -> np.ndarray:
    """Which rows hold an embedding, bool [m]: finite, and not all zeros."""
    squares = np.vecdot(block, block)
    return np.asarray(np.isfinite(squares) & (squares > 0))


def paired(images: np.ndarray, texts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of two blocks: `usable(images)`, and their row-wise product, float32 [m], NaN where either row is no embedding."""
    products = np.vecdot(images, texts)
    valid = np.ones(len(products), dtype=bool)
    # A row of zeros, or of what is not finite, shows in the product, so that only few rows have to be looked at.
    odd = np.flatnonzero(~np.isfinite(products) | (products == 0))
    valid[odd] = usable(images[odd])
    products[odd[~(valid[odd] & usable(texts[odd]))]] = np.nan
    return valid, products


def similarity(image_emb: np.ndarray, text_emb: np.ndarray | None) -> np.ndarray:
    """Cosines of float16 unit vectors [n, d], row by row: float32 [n], computed as a policy's alignment rule does.

    A row of zeros has the cosine 0; without texts all have.
    """
    result = np.zeros(len(image_emb), np.float32)
    for start in range(0, len(image_emb) if text_emb is not None else 0, BLOCK):
        rows = slice(start, start + BLOCK)
        result[rows] = np.vecdot(image_emb[rows].astype(np.float32), text_emb[rows].astype(np.float32))  # type: ignore[index]
    return result
