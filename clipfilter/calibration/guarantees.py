"""Thresholds from labels, with guarantees: exact binomial bounds, fixed-sequence testing, conformal miss rates.

Everything here works on *flagging scores*: float32, higher means more suspect, and a threshold t flags the rows
with score > t. A rule that points below is turned round by its caller (score and threshold change sign).

The precision rule is Learn then Test (Angelopoulos et al. 2021, arXiv:2110.01052) with fixed sequences: the
candidates and the starting points come from unlabelled scores and the number of labels, before a label is seen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import betaincinv  # type: ignore[import-untyped]

from clipfilter.errors import RefusedError

STARTS = 4
CANDIDATES = 64


def lower_bound(k: np.ndarray | float, m: np.ndarray | float, confidence: float) -> np.ndarray:
    """One-sided Clopper-Pearson bound: a proportion seen as k of m is at least this, float64 of the same shape.

    BetaInv(1 - confidence; k, m - k + 1), 0 where k is 0. k and m may be effective (fractional) counts.
    """
    k, m = np.broadcast_arrays(np.asarray(k, np.float64), np.asarray(m, np.float64))
    some = k > 0
    safe = np.where(some, k, 1.0)
    return np.where(some, betaincinv(safe, np.where(some, m - k + 1.0, 1.0), 1.0 - confidence), 0.0)


def upper_bound(k: np.ndarray | float, m: np.ndarray | float, confidence: float) -> np.ndarray:
    """One-sided Clopper-Pearson bound: a proportion seen as k of m is at most this."""
    return 1.0 - lower_bound(np.asarray(m) - np.asarray(k), m, confidence)


def fewest_flagged(precision: float, confidence: float) -> int:
    """How many flagged labels, all of them true, the first of the `STARTS` sequences needs at the least.

    ceil(ln delta' / ln precision) with delta' = (1 - confidence) / STARTS: with fewer no test can pass.
    """
    delta = (1.0 - confidence) / STARTS
    m = math.ceil(math.log(delta) / math.log(precision) - 1e-9)
    # The bound of m of m is delta'^(1/m); rounding must not make the first count fail its own test.
    return m if float(lower_bound(m, m, 1.0 - delta)) >= precision else m + 1


def fewest_positives(miss_rate: float) -> int:
    """How many positives a miss rate needs: n >= 1 / miss_rate - 1."""
    return max(1, math.ceil(1.0 / miss_rate - 1.0 - 1e-9))


@dataclass(frozen=True)
class Candidates:
    """Thresholds to test, strict to loose, float64 [J] (each a float32 value or safely between two), and where the
    sequences start, positions [K]."""

    thresholds: np.ndarray
    starts: tuple[int, ...]


def candidates(
    scores: np.ndarray,
    labels: int,
    precision: float,
    confidence: float,
    limits: tuple[float, float] = (-np.inf, np.inf),
) -> Candidates:
    """The grid of thresholds for a precision target: quantiles of unlabelled scores, fixed before labels are seen.

    scores: float32 [N], ascending, of the rows the labels are drawn from; labels: how many are drawn; limits: what
    thresholds may lie strictly between. The flagged shares
    form a geometric series from the strictest that could pass (see `fewest_flagged`) to all rows; the sequences start
    where so many, and then ever more, labels are expected to be flagged.

    Raises RefusedError when there are too few labels for any threshold to pass.
    """
    least = fewest_flagged(precision, confidence)
    if labels < least:
        raise RefusedError(
            f"{labels} labels are too few for precision {precision:g} at confidence {confidence:g}: at least {least} must "
            f"be flagged, and all of them true; label more rows, or lower the target."
        )
    shares = np.geomspace(least / labels, 1.0, CANDIDATES)
    rows = np.clip(np.round(shares * len(scores)).astype(np.int64), 1, max(1, len(scores) - 1))
    found = {threshold_for(scores, int(count)) for count in rows}
    allowed = (t for t in found if t is not None and limits[0] < t < limits[1])
    thresholds = np.array(sorted(allowed, reverse=True), np.float64)
    flagged = labels * beyond(scores, thresholds) / max(1, len(scores))
    expected = least * (labels / least) ** (np.arange(STARTS) / STARTS)
    starts = {0, *(int(np.searchsorted(flagged, count)) for count in expected[1:])}
    return Candidates(thresholds, tuple(sorted(start for start in starts if start < len(thresholds))))


def beyond(ascending: np.ndarray, thresholds: np.ndarray | float) -> np.ndarray:
    """How many of the scores (float32, ascending) lie beyond each threshold, as the engine compares: in float32."""
    return np.asarray(len(ascending) - np.searchsorted(ascending, np.asarray(thresholds, np.float32), side="right"))


def threshold_for(ascending: np.ndarray, count: int) -> float | None:
    """The threshold that flags as many as possible but at most `count` rows of these scores; None where that is no row.

    Rows with equal scores are flagged together or not at all.
    """
    if count >= len(ascending):
        count = len(ascending) - 1
    if count < 1:
        return None
    low = ascending[len(ascending) - 1 - count]
    above = np.searchsorted(ascending, low, side="right")
    return None if above == len(ascending) else between(float(low), float(ascending[above]))


def between(low: float, high: float) -> float:
    """A short decimal t with low <= t < high in float32, well inside where there is room.

    Two neighbouring scores are best told apart in the middle, where no rounding of either matters.
    """
    middle, room = (low + high) / 2, (high - low) / 4
    for digits in range(1, 9):
        rounded = float(f"{middle:.{digits}g}")
        if low + room <= rounded <= high - room and low <= np.float32(rounded) < high:
            return rounded
    return middle if low <= np.float32(middle) < high else low


@dataclass(frozen=True)
class Walk:
    """Where the fixed sequences ended. `m` and `k`: flagged labels and true ones among them, by candidate [J], weighted
    to effective counts; `bounds`: lower bounds of precision at each test's own level; `accepted`: position or None."""

    m: np.ndarray
    k: np.ndarray
    bounds: np.ndarray
    accepted: int | None


def precision_walk(
    grid: Candidates,
    scores: np.ndarray,
    true: np.ndarray,
    weights: np.ndarray | None,
    precision: float,
    confidence: float,
) -> Walk:
    """Test the candidates strict to loose from each start until the first failure; take the loosest that passed.

    scores: float32 [n] of the labelled rows; true: bool [n]; weights: float64 [n] (one over the inclusion probability)
    or None where all rows had the same chance. A candidate passes when its lower bound at level (1 - confidence) /
    STARTS reaches `precision`. With equal chances the accepted threshold has at least this precision over the rows
    the labels were drawn from, except with probability 1 - confidence. With unequal ones m is Kish's effective size and
    the result an estimate.
    """
    m, k = flagged_counts(scores, true, weights, grid.thresholds)
    bounds = lower_bound(k, m, 1.0 - (1.0 - confidence) / STARTS)
    # Too few flagged labels cannot pass; where precision falls towards looser thresholds, as it does for a score worth
    # calibrating, beginning at the first count that can is on the safe side.
    usable = m >= fewest_flagged(precision, confidence)
    accepted = None
    for start in grid.starts:
        for position in range(start, len(grid.thresholds)):
            if not usable[position]:
                continue
            if bounds[position] < precision:
                break
            accepted = position if accepted is None else max(accepted, position)
    return Walk(m, k, bounds, accepted)


def flagged_counts(
    scores: np.ndarray, true: np.ndarray, weights: np.ndarray | None, thresholds: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(m, k): labelled rows beyond each threshold and the true ones among them, float64 [J]; effective if weighted."""
    order = np.argsort(scores, kind="stable")
    ascending, positive = scores[order], true[order].astype(np.float64)
    at = len(scores) - beyond(ascending, thresholds)
    if weights is None:
        return (len(scores) - at).astype(np.float64), _tails(positive)[at]
    own = weights[order]
    total, squares, hits = _tails(own)[at], _tails(own**2)[at], _tails(own * positive)[at]
    with np.errstate(invalid="ignore", divide="ignore"):
        m = np.where(squares > 0, total**2 / squares, 0.0)
        return m, np.where(total > 0, m * hits / total, 0.0)


def _tails(values: np.ndarray) -> np.ndarray:
    """Sums from each position to the end, float64 [n + 1]."""
    return np.concatenate([np.cumsum(values[::-1])[::-1], [0.0]])


def miss_rank(positives: int, miss_rate: float) -> int:
    """Which of the positive scores in ascending order (from 1) is the last one to flag: floor(miss_rate (n + 1)).

    Raises RefusedError where there are too few positives.
    """
    if positives < fewest_positives(miss_rate):
        raise RefusedError(
            f"{positives} positive labels are too few for a miss rate of {miss_rate:g}: it needs "
            f"{fewest_positives(miss_rate)}; label more rows, or allow a higher rate."
        )
    return math.floor(miss_rate * (positives + 1) + 1e-9)


def miss_threshold(ascending: np.ndarray, positives: np.ndarray, weights: np.ndarray | None, miss_rate: float) -> float:
    """The threshold that misses at most this share of positives, on average over draws of labels.

    ascending: float32 [N], the run's scores; positives: float32 [n], scores of positive labels. It flags everything from
    the floor(miss_rate (n + 1))-th smallest positive score upwards (split conformal prediction: a further positive is as
    likely to fall into each of the n + 1 gaps). With weights the rank is the weighted one, and an estimate.
    """
    order = np.argsort(positives, kind="stable")
    rank = miss_rank(len(positives), miss_rate)
    if weights is not None:
        own = weights[order]
        reached = np.flatnonzero(np.cumsum(own) <= miss_rate * (own.sum() + own.mean()) + 1e-9)
        rank = len(reached) or 1
    score = positives[order[rank - 1]]
    below = np.searchsorted(ascending, score, side="left")
    if below:
        return between(float(ascending[below - 1]), float(score))
    return float(np.nextafter(score, np.float32(-np.inf)))
