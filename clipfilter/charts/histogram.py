"""A histogram of any stream of numbers in flat memory: bins double in width until everything fits."""

from __future__ import annotations

import math

import numpy as np

BINS = 8192
#: A bin is never finer than this many binary digits below the largest value, so that bin numbers stay exact.
_DIGITS = 40


class Histogram:
    """Counts in at most `BINS` bins whose width is a power of two, aligned to zero; mergeable, in any order.

    n: finite values counted. minimum, maximum: exact. integral: every value was a whole number.
    """

    def __init__(self) -> None:
        self.n = 0
        self.minimum = math.inf
        self.maximum = -math.inf
        self.integral = True
        self.exponent: int | None = None  # bins are 2**exponent wide
        self._start = 0  # number of the first bin: bin i covers [i, i + 1) * 2**exponent
        self._counts = np.zeros(BINS, np.int64)

    def add(self, values: np.ndarray) -> None:
        """Count the finite numbers of a 1-D array."""
        values = np.asarray(values, np.float64)
        values = values[np.isfinite(values)]
        if not len(values):
            return
        self._fit(float(values.min()), float(values.max()), None)
        assert self.exponent is not None
        index = np.floor(np.ldexp(values, -self.exponent)).astype(np.int64) - self._start
        self._counts += np.bincount(index, minlength=BINS)
        self.n += len(values)
        self.integral = self.integral and bool((values == np.rint(values)).all())

    def merge(self, other: Histogram) -> None:
        """Add the counts of another histogram."""
        if not other.n:
            return
        self._fit(other.minimum, other.maximum, other.exponent)
        self._place(other._start, other._counts, other.exponent)
        self.n += other.n
        self.integral = self.integral and other.integral

    def bins(self) -> tuple[np.ndarray, float, np.ndarray]:
        """Left edges of the bins that hold anything (float64), their common width, their counts."""
        if self.exponent is None:
            return np.zeros(0), 1.0, np.zeros(0, np.int64)
        used = np.flatnonzero(self._counts)
        return np.ldexp((used + self._start).astype(np.float64), self.exponent), 2.0**self.exponent, self._counts[used]

    def quantile(self, share: float) -> float:
        """The value below which this share of the rows lies, exact to one bin."""
        edges, width, counts = self.bins()
        if not len(edges):
            return math.nan
        position = int(np.searchsorted(np.cumsum(counts), share * self.n))
        value = float(edges[min(position, len(edges) - 1)]) + width / 2
        return min(max(value, self.minimum), self.maximum)

    def _fit(self, low: float, high: float, exponent: int | None) -> None:
        """Make room for [low, high], with bins no finer than 2**exponent."""
        low, high = min(low, self.minimum), max(high, self.maximum)
        wanted = math.frexp(max(abs(low), abs(high)) or 1.0)[1] - _DIGITS
        for bound in (self.exponent, exponent):
            wanted = wanted if bound is None else max(wanted, bound)
        while math.floor(math.ldexp(high, -wanted)) - math.floor(math.ldexp(low, -wanted)) >= BINS:
            wanted += 1
        first, last = math.floor(math.ldexp(low, -wanted)), math.floor(math.ldexp(high, -wanted))
        self.minimum, self.maximum = low, high
        if wanted == self.exponent and self._start <= first and last < self._start + BINS:
            return
        old_start, old_counts, old_exponent = self._start, self._counts, self.exponent
        self.exponent = wanted
        self._start = first - (BINS - 1 - (last - first)) // 2
        self._counts = np.zeros(BINS, np.int64)
        self._place(old_start, old_counts, old_exponent)

    def _place(self, start: int, counts: np.ndarray, exponent: int | None) -> None:
        """Add bins of an equal or finer width."""
        if exponent is None or self.exponent is None:
            return
        used = np.flatnonzero(counts)
        coarser = min(self.exponent - exponent, 62)  # bin numbers stay below 2**53: one more shift changes nothing
        index = ((used + start) >> coarser) - self._start
        np.add.at(self._counts, index, counts[used])
