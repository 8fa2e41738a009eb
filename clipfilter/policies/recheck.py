"""Scores near a threshold, settled in float64: what is stored in float32 lies on the side where the exact score lies."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

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
