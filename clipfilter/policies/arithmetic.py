"""The arithmetic of scores: curves, blocks of embeddings of one fixed shape, and what lies near a threshold in float64.

Stored embeddings become float32 blocks, always of 1024 rows: rows that are missing at the end are zeros, so that the shape of
a product, and so its rounding, never depends on how many rows follow. Scores near a threshold are settled in float64: what is
stored in float32 lies on the side where the exact score lies.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)) in the type of `x`; small results keep their relative precision."""
    with np.errstate(over="ignore"):  # exp overflows to infinity where the result is 0
        return np.asarray(1 / (1 + np.exp(-x)), dtype=x.dtype)


def bent(curve: tuple[float, float], score: float) -> float:
    """The calibrated probability of a score by Platt's curve (a, b): 1 / (1 + exp(-(a score + b)))."""
    return 0.5 * (1.0 + math.tanh(0.5 * (curve[0] * score + curve[1])))


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


#: How near to a threshold a score is computed again: the rounding of a float32 product of unit vectors stays below.
RECHECK = 1e-5


def settle(exact: np.ndarray, thresholds: Sequence[float]) -> np.ndarray:
    """float64 scores as float32 that lie on the same side of every float32 threshold as they did in float64.

    A score equal to the threshold stays equal to it; otherwise rounding may move it onto or across the
    threshold, and it is put back on its own side, to the next float32.
    """
    stored = exact.astype(np.float32)
    for threshold in thresholds:
        single = np.float32(threshold)
        stored[exact == threshold] = single
        stored[(exact > threshold) & (stored <= single)] = np.nextafter(single, np.float32(np.inf))
        stored[(exact < threshold) & (stored >= single)] = np.nextafter(single, np.float32(-np.inf))
    return stored


@dataclass(frozen=True)
class Recheck:
    """The thresholds of R rules, and how near to them a float32 score is computed again."""

    exact: tuple[tuple[float, ...], ...]
    rounded: np.ndarray  # float32 [T, R], NaN where a rule has fewer than T
    near: np.ndarray  # float32 [R]

    @classmethod
    def of(cls, thresholds: Sequence[Sequence[float]], near: Sequence[float] | None = None) -> Recheck:
        """thresholds: those of each rule; near: `RECHECK` for all where it is not given."""
        return cls(
            tuple(map(tuple, thresholds)),
            np.array(list(itertools.zip_longest(*thresholds, fillvalue=np.nan)), dtype=np.float32),
            np.array([RECHECK] * len(thresholds) if near is None else near, dtype=np.float32),
        )

    def settle(
        self, values: np.ndarray, exact: Callable[[np.ndarray], np.ndarray], also: np.ndarray | None = None
    ) -> None:
        """Compute the doubtful ones of `values` again, in place.

        values: float32 [R, m], NaN where a row has no score. exact(rows): float64 [R, len(rows)] scores of these rows (intp),
        each computed alone, so that its rounding does not depend on how many rows are close. also: bool [m], rows that are
        in doubt for another reason.
        """
        doubtful = np.zeros(values.shape, dtype=bool)
        for thresholds in self.rounded:
            doubtful |= np.abs(values - thresholds[:, None]) <= self.near[:, None]
        if also is not None:
            doubtful |= also
        picked = np.flatnonzero(doubtful.any(axis=0))
        if not len(picked):
            return
        again = exact(picked)
        for rule in np.flatnonzero(doubtful.any(axis=1)).tolist():
            chosen = doubtful[rule, picked]
            values[rule, picked[chosen]] = settle(again[rule, chosen], self.exact[rule])


def exact_products(weights: np.ndarray, half: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """float64 [k, len(rows)] products of float64 weights [k, d] with these rows of `half` (float16 [m, d]), row by row."""
    return np.stack([weights @ half[row].astype(np.float64) for row in rows], axis=1)
