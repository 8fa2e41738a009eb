"""Exact nearest rows of a query: one pass over the memory-mapped embeddings, no index."""

from __future__ import annotations

import warnings

import numpy as np

from clipfilter.runs import RunVectors

#: How far a fast cosine may be from the exact one: query and product are rounded to float16 (2^-12 each for cosines below
#: 1, twice that at 1), sums are float32. Rows this near to the k-th are computed again in float64.
_SLACK = 1e-3

# The product only reads the memory-mapped vectors.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable", category=UserWarning)


def top_k(
    vectors: RunVectors, query: np.ndarray, k: int, mask: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(positions int64 [k], cosines float32 [k]) of the k rows nearest to `query`, best first; fewer where there are fewer.

    query: float32 [dim], unit norm. mask: bool [rows], the rows that count. The order is that of the cosines computed in
    float64 from the stored float16 vectors, equal ones by position, whatever the number of threads.
    """
    found = Nearest(query, k)
    for start, block in vectors.blocks():
        found.add(start, block, None if mask is None else mask[start : start + len(block)])
    return found.result()


class Nearest:
    """The nearest rows among the blocks added so far."""

    def __init__(self, query: np.ndarray, k: int) -> None:
        import torch

        if k < 1:
            raise ValueError(f"k is a number of rows, 1 or more, not {k}")
        self._k = k
        self._query = np.ascontiguousarray(query, np.float32)
        self._torch = torch
        self._tensor = torch.from_numpy(self._query).half()
        self._positions = np.empty(0, np.int64)
        self._cosines = np.empty(0, np.float64)
        self._floor = -np.inf

    def add(self, start: int, block: np.ndarray, mask: np.ndarray | None = None) -> None:
        """Consider float16 [n, dim], whose first row has position `start`; mask: bool [n]."""
        chosen = None
        if mask is not None:
            chosen = np.flatnonzero(mask)
            if len(chosen) * 4 < len(block):
                block = block[chosen]
            else:
                chosen = None
        scores = self._scores(block)
        if mask is not None and chosen is None:
            scores[~mask] = -np.inf
        rows = self._candidates(scores)
        if len(rows):
            self.add_rows(start + (rows if chosen is None else chosen[rows]), block[rows])

    def add_rows(self, positions: np.ndarray, rows: np.ndarray) -> None:
        """Consider single rows: their positions int64 [n] and vectors float16 [n, dim]."""
        self.add_cosines(positions, np.vecdot(rows.astype(np.float64), self._query.astype(np.float64)))

    def add_cosines(self, positions: np.ndarray, cosines: np.ndarray) -> None:
        """Consider rows by position int64 [n] whose cosines are known."""
        positions = np.concatenate([self._positions, positions])
        cosines = np.concatenate([self._cosines, cosines])
        order = np.lexsort((positions, -cosines))[: self._k]
        self._positions, self._cosines = positions[order], cosines[order]
        if len(order) == self._k:
            self._floor = float(self._cosines[-1])

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """(positions int64, cosines float32), best first, equal ones by position."""
        return self._positions, self._cosines.astype(np.float32)

    def _scores(self, block: np.ndarray) -> np.ndarray:
        """float32 [n]: cosines to within `_SLACK`."""
        torch = self._torch
        # A float16 product reads half the memory of a float32 one, and numpy has none that is fast.
        return np.asarray(torch.mv(torch.from_numpy(block), self._tensor).float())

    def _candidates(self, scores: np.ndarray) -> np.ndarray:
        """Rows of the block that may be among the nearest."""
        floor = self._floor - _SLACK
        if len(scores) > self._k:
            kth = np.partition(scores, len(scores) - self._k)[len(scores) - self._k]
            floor = max(floor, float(kth) - 2 * _SLACK)
        return np.flatnonzero((scores >= floor) & (scores > -np.inf))
