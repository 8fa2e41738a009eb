"""Exact thresholds for "the best 30 %" over any number of float32 scores, in flat memory.

Two passes of radix selection: float32 scores map to unsigned 32-bit keys of the same order; the first pass
counts the keys' upper 16 bits, the second the lower 16 bits of the one bucket that holds the wanted rank.
Each pass needs one histogram of 65 536 counts, which partial histograms of shards add up to in any order, so
shards may contribute in parallel and the result does not depend on how the scores were cut or ordered.

Ties and rounding are DataComp's (baselines/apply_filter.py): of N scored rows and a fraction f, n = int(N *
f), the threshold is the score at position n (from 0) in descending order, and rows at or above it are kept:
at least n + 1 rows, plus ties. f = 1 keeps all. Rows without a score (NaN) are not ranked and not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np

from clipfilter.errors import RefusedError

BUCKETS = 1 << 16
_SIGN = np.uint32(0x80000000)
_SLICE = 1 << 20  # scores handled at once, so that one huge chunk costs no more memory than a few


@dataclass(frozen=True)
class DatasetThreshold:
    """A threshold that only the whole dataset can give: `key` ("<rule>.reject") names its number, `of` what to rank."""

    key: str
    rule: str
    of: str
    fraction: float
    tail: str  # "top" | "bottom"


class HasDatasetThresholds(Protocol):
    """What is needed of a policy, compiled or not: which fractions of which scores it asks for."""

    @property
    def dataset_thresholds(self) -> Sequence[DatasetThreshold]: ...


Chunks = Callable[[], Iterable[np.ndarray]]


@dataclass(frozen=True)
class Threshold:
    """A fixed threshold: keep `score >= value` (tail "top") or `score <= value` (tail "bottom").

    `value` is None where no row had a score. `ranked` rows had one, of which `kept` are inside the fraction.
    """

    value: float | None
    fraction: float
    tail: str
    ranked: int
    kept: int

    @classmethod
    def at(cls, value: float, fraction: float, tail: str, ranked: int, below: int, equal: int) -> Threshold:
        """below, equal: how many scores lie below `value` and are equal to it."""
        return cls(value, fraction, tail, ranked, ranked - below if tail == "top" else below + equal)


def sort_keys(scores: np.ndarray) -> np.ndarray:
    """uint32 keys in the order of the float32 scores; NaN is left out, and -0.0 equals 0.0."""
    scores = np.asarray(scores, dtype=np.float32).ravel()
    bits = (scores[~np.isnan(scores)] + np.float32(0.0)).view(np.uint32)
    return np.where(bits & _SIGN, ~bits, bits | _SIGN)


def key_score(key: int) -> float:
    """The float32 score (as a Python float) of a key: the inverse of `sort_keys`."""
    bits = key ^ 0x80000000 if key & 0x80000000 else key ^ 0xFFFFFFFF
    return float(np.array([bits], dtype=np.uint32).view(np.float32)[0])


def high_histogram(scores: np.ndarray) -> np.ndarray:
    """First pass, one part: int64 [65536] counts of the keys' upper 16 bits. Parts add up with `+`."""
    counts = np.zeros(BUCKETS, dtype=np.int64)
    for part in _slices(scores):
        counts += np.bincount(sort_keys(part) >> 16, minlength=BUCKETS)
    return counts


def low_histogram(scores: np.ndarray, bucket: int) -> np.ndarray:
    """Second pass, one part: int64 [65536] counts of the lower 16 bits of the keys in this upper bucket."""
    return _lows(lambda: [scores], {bucket})[bucket]


def locate(counts: np.ndarray, rank: int) -> tuple[int, int]:
    """(bucket, rank inside it) of the key with this ascending rank (from 0) in a histogram."""
    cumulative = np.cumsum(counts)
    bucket = int(np.searchsorted(cumulative, rank, side="right"))
    return bucket, rank - int(cumulative[bucket] - counts[bucket])


def wanted_rank(ranked: int, fraction: float, tail: str) -> int:
    """Ascending rank (from 0) of the threshold among `ranked` scores, by DataComp's rule."""
    from_the_end = min(int(ranked * fraction), ranked - 1)
    return ranked - 1 - from_the_end if tail == "top" else from_the_end


def fraction_threshold(chunks: Chunks, fraction: float, tail: str = "top") -> Threshold:
    """The exact threshold of one fraction; see `fraction_thresholds`."""
    return fraction_thresholds(chunks, [(fraction, tail)])[0]


def fraction_thresholds(chunks: Chunks, wanted: Sequence[tuple[float, str]]) -> list[Threshold]:
    """Exact thresholds of several fractions of the same scores.

    chunks: called once per pass, gives all scores as float32 arrays (any cut, any order, NaN where there is
    none). wanted: (fraction in (0, 1], "top" or "bottom"). Reads the scores twice, whatever the number of
    fractions; memory is one slice of scores and one histogram per fraction. Raises RefusedError for a
    fraction outside (0, 1].
    """
    _check(wanted)
    high = _high(chunks)
    ranked = int(high.sum())
    if ranked == 0:
        return [Threshold(None, fraction, tail, 0, 0) for fraction, tail in wanted]

    places = [locate(high, wanted_rank(ranked, fraction, tail)) for fraction, tail in wanted]
    lows = _lows(chunks, {bucket for bucket, _ in places})
    result = []
    for (fraction, tail), (bucket, inside) in zip(wanted, places, strict=True):
        low = lows[bucket]
        if int(low.sum()) != int(high[bucket]):
            raise ValueError("the scores changed between the two passes")
        last, _ = locate(low, inside)
        below = int(high[:bucket].sum() + low[:last].sum())
        result.append(Threshold.at(key_score(bucket << 16 | last), fraction, tail, ranked, below, int(low[last])))
    return result


def float16_thresholds(chunks: Iterable[np.ndarray], wanted: Sequence[tuple[float, str]]) -> list[Threshold]:
    """As `fraction_thresholds`, of float16 scores, in one pass: a float16 has no more than 65 536 values.

    chunks: all scores, read once. Raises ValueError for another dtype.
    """
    _check(wanted)
    counts = np.zeros(BUCKETS, dtype=np.int64)
    for chunk in chunks:
        if chunk.dtype != np.float16:
            raise ValueError(f"one pass is enough for float16 scores only, not for {chunk.dtype}")
        for part in _slices(chunk):
            bits = (part[~np.isnan(part)] + np.float16(0.0)).view(np.uint16)
            counts += np.bincount(np.where(bits & 0x8000, ~bits, bits | 0x8000).astype(np.uint16), minlength=BUCKETS)
    ranked = int(counts.sum())
    if ranked == 0:
        return [Threshold(None, fraction, tail, 0, 0) for fraction, tail in wanted]
    result = []
    for fraction, tail in wanted:
        key, _ = locate(counts, wanted_rank(ranked, fraction, tail))
        bits = key ^ 0x8000 if key & 0x8000 else key ^ 0xFFFF
        value = float(np.array([bits], dtype=np.uint16).view(np.float16)[0])
        result.append(Threshold.at(value, fraction, tail, ranked, int(counts[:key].sum()), int(counts[key])))
    return result


def quantiles(chunks: Chunks, wanted: Sequence[float]) -> list[float | None]:
    """Exact quantiles of float32 scores by the nearest lower rank, floor(q (n - 1)); None where there is no score.

    chunks: as in `fraction_thresholds`. Raises RefusedError for a quantile outside [0, 1].
    """
    for q in wanted:
        if not 0.0 <= q <= 1.0:
            raise RefusedError(f"{q} is no quantile; it must be between 0 and 1")
    high = _high(chunks)
    ranked = int(high.sum())
    if ranked == 0:
        return [None] * len(wanted)
    places = [locate(high, int(q * (ranked - 1))) for q in wanted]
    lows = _lows(chunks, {bucket for bucket, _ in places})
    return [key_score(bucket << 16 | locate(lows[bucket], inside)[0]) for bucket, inside in places]


def dataset_thresholds(
    policy: HasDatasetThresholds, chunks: Callable[[str], Iterable[np.ndarray]]
) -> tuple[dict[str, float | None], dict[str, dict[str, Any]]]:
    """All numbers that a policy needs of the whole dataset, by their keys, and the evidence for each (JSON data).

    chunks(rule): called once per pass and ranked rule, gives all scores of that rule. A number is None where no row
    has a score.
    """
    numbers: dict[str, float | None] = {}
    evidence: dict[str, dict[str, Any]] = {}
    for of in dict.fromkeys(entry.of for entry in policy.dataset_thresholds):
        entries = [entry for entry in policy.dataset_thresholds if entry.of == of]
        found = fraction_thresholds(partial(chunks, of), [(entry.fraction, entry.tail) for entry in entries])
        for entry, threshold in zip(entries, found, strict=True):
            numbers[entry.key] = threshold.value
            evidence[entry.key] = {"of": of, **asdict(threshold)}
    return numbers, evidence


def _check(wanted: Sequence[tuple[float, str]]) -> None:
    for fraction, tail in wanted:
        if not 0.0 < fraction <= 1.0:
            raise RefusedError(
                f"a fraction of {fraction} keeps nothing or makes no sense; it must be above 0 and at most 1"
            )
        if tail not in ("top", "bottom"):
            raise ValueError(f"tail is {tail!r}, not 'top' or 'bottom'")


def _high(chunks: Chunks) -> np.ndarray:
    """The first pass over all scores."""
    return sum(map(high_histogram, chunks()), start=np.zeros(BUCKETS, dtype=np.int64))


def _lows(chunks: Chunks, buckets: set[int]) -> dict[int, np.ndarray]:
    """The second pass: a histogram of the lower 16 bits for each of these upper buckets."""
    lows = {bucket: np.zeros(BUCKETS, dtype=np.int64) for bucket in buckets}
    for chunk in chunks():
        for part in _slices(chunk):
            keys = sort_keys(part)
            upper = keys >> 16
            for bucket, counts in lows.items():
                counts += np.bincount(keys[upper == bucket] & 0xFFFF, minlength=BUCKETS)
    return lows


def _slices(scores: np.ndarray) -> Iterable[np.ndarray]:
    flat = np.asarray(scores).ravel()
    return (flat[start : start + _SLICE] for start in range(0, len(flat), _SLICE))
