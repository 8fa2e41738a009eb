"""The statistics of calibration: bounds that hold, guarantees that survive simulation, curves that fit."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import optimize, stats

from clipfilter.calibration import guarantees as g
from clipfilter.calibration import probability as prob
from clipfilter.errors import RefusedError

SETS = 500
ROWS = 60_000


def margin(rate: float, sets: int = SETS) -> float:
    """What a rate measured on so many sets may lie above the true one, in one of a thousand test runs."""
    return float(stats.binom.ppf(0.999, sets, rate)) / sets


# ------------------------------------------------------------------ bounds


@pytest.mark.parametrize("confidence", [0.8, 0.9, 0.975])
def test_the_lower_bound_covers_at_its_confidence_for_every_proportion(confidence: float) -> None:
    m = 60
    bounds = g.lower_bound(np.arange(m + 1), m, confidence)
    for p in np.linspace(0.01, 0.99, 99):
        wrong = stats.binom.pmf(np.arange(m + 1), m, p)[bounds > p].sum()
        assert wrong <= 1 - confidence + 1e-9


def test_bounds_are_the_textbook_ones() -> None:
    exact = stats.binomtest(37, 40).proportion_ci(confidence_level=0.9, method="exact")  # two-sided: 5 % at each end
    assert float(g.lower_bound(37, 40, 0.95)) == pytest.approx(exact.low)
    assert float(g.upper_bound(37, 40, 0.95)) == pytest.approx(exact.high)
    assert float(g.lower_bound(0, 10, 0.9)) == 0
    assert float(g.upper_bound(10, 10, 0.9)) == 1
    # Zero hits among n audited: the rate is at most 3 / n at 95 %.
    assert float(g.upper_bound(0, 300, 0.95)) == pytest.approx(3 / 300, rel=0.01)


def test_the_fewest_flagged_labels_are_just_enough() -> None:
    assert g.fewest_flagged(0.95, 0.9) == math.ceil(math.log(0.1 / 4) / math.log(0.95)) == 72
    for precision in (0.5, 0.8, 0.9, 0.95, 0.99, 0.999):
        for confidence in (0.5, 0.8, 0.9, 0.99):
            m = g.fewest_flagged(precision, confidence)
            level = 1 - (1 - confidence) / 4
            assert float(g.lower_bound(m, m, level)) >= precision
            assert m == 1 or float(g.lower_bound(m - 1, m - 1, level)) < precision


# ------------------------------------------------------------------ thresholds between scores


def test_a_threshold_flags_as_many_rows_as_asked_for_and_is_short() -> None:
    scores = np.sort(np.random.default_rng(0).random(1000).astype(np.float32))
    for count in (1, 2, 17, 500, 998, 999, 5000):
        threshold = g.threshold_for(scores, count)
        assert threshold is not None
        assert int(g.beyond(scores, threshold)) == (scores > np.float32(threshold)).sum() == min(count, 999)
        assert len(repr(threshold)) <= 9
    assert g.threshold_for(scores, 0) is None


def test_equal_scores_are_flagged_together_or_not_at_all() -> None:
    scores = np.sort(np.array([0.1] * 5 + [0.5] * 4 + [0.9], np.float32))
    assert [int(g.beyond(scores, g.threshold_for(scores, count) or 9)) for count in (1, 2, 4, 5, 9)] == [1, 1, 1, 5, 5]
    assert g.threshold_for(np.full(4, 0.5, np.float32), 2) is None


def test_neighbouring_floats_can_be_told_apart() -> None:
    for value in (0.3, 0.9999999, 1e-30, -0.25, -1e-7):
        low = np.float32(value)
        high = np.nextafter(low, np.float32(np.inf))
        threshold = np.float32(g.between(float(low), float(high)))
        assert high > threshold >= low


# ------------------------------------------------------------------ precision


class World:
    """A run whose every row is known: flagging scores and truth."""

    def __init__(self, scores: np.ndarray, true: np.ndarray) -> None:
        self.scores, self.true = scores.astype(np.float32), true
        order = np.argsort(self.scores, kind="stable")
        self.ascending = self.scores[order]
        self.tails = np.concatenate([np.cumsum(true[order][::-1])[::-1], [0]])

    def precision(self, thresholds: np.ndarray) -> np.ndarray:
        flagged = g.beyond(self.ascending, thresholds)
        return np.asarray(self.tails[len(self.scores) - flagged] / flagged)

    def recall(self, thresholds: np.ndarray) -> np.ndarray:
        return np.asarray(self.tails[len(self.scores) - g.beyond(self.ascending, thresholds)] / self.true.sum())

    def calibrations(self, n: int, target: float, confidence: float) -> tuple[g.Candidates, list[int | None]]:
        rng = np.random.default_rng(1)
        grid = g.candidates(self.ascending, n, target, confidence)
        walks = []
        for _ in range(SETS):
            drawn = rng.choice(len(self.scores), n, replace=False)
            walk = g.precision_walk(grid, self.scores[drawn], self.true[drawn], None, target, confidence)
            walks.append(walk.accepted)
        return grid, walks


def separated(prevalence: float, distance: float, seed: int = 0) -> World:
    rng = np.random.default_rng(seed)
    true = rng.random(ROWS) < prevalence
    return World(rng.normal(size=ROWS) * 1.5 + np.where(true, distance, -distance), true)


def flat(precision: float) -> World:
    """A score that says nothing: every threshold has the same precision."""
    rng = np.random.default_rng(2)
    true = np.zeros(ROWS, bool)
    true[: int(ROWS * precision)] = True
    return World(rng.random(ROWS), true)


def dipping(target: float) -> World:
    """Precision that dips just below the target at the strict end and in the middle, where it must not be accepted."""
    rng = np.random.default_rng(3)
    score = rng.random(ROWS)
    chance = np.where(score > 0.8, target - 0.004, np.where(score > 0.5, target + 0.01, target - 0.05))
    return World(score, rng.random(ROWS) < chance)


@pytest.mark.parametrize(
    ("world", "n", "target", "confidence"),
    [
        (separated(0.3, 3.0), 400, 0.95, 0.9),
        (separated(0.3, 2.0), 1000, 0.95, 0.8),
        (separated(0.5, 1.5), 300, 0.85, 0.9),
        (flat(0.949), 400, 0.95, 0.9),
        (flat(0.895), 300, 0.9, 0.7),
        (dipping(0.9), 500, 0.9, 0.8),
    ],
    ids=["easy", "middling", "hard", "flat", "flat, low confidence", "dipping"],
)
def test_the_precision_guarantee_fails_no_more_often_than_stated(
    world: World, n: int, target: float, confidence: float
) -> None:
    grid, walks = world.calibrations(n, target, confidence)
    good = world.precision(grid.thresholds) >= target
    failed = sum(not good[at] for at in walks if at is not None)
    assert failed / SETS <= margin(1 - confidence)


def test_the_guarantee_is_not_bought_by_accepting_nothing() -> None:
    world = separated(0.3, 3.0)
    grid, walks = world.calibrations(400, 0.95, 0.9)
    found = [at for at in walks if at is not None]
    assert len(found) > 0.9 * SETS
    best = world.recall(grid.thresholds)[world.precision(grid.thresholds) >= 0.95].max()
    assert np.mean(world.recall(grid.thresholds[found])) > 0.85 * best


def test_a_test_at_the_full_level_would_break_the_guarantee() -> None:
    """The simulation can tell: without the share for each of the four sequences too much is accepted."""
    world = flat(0.895)
    rng = np.random.default_rng(1)
    grid = g.candidates(world.ascending, 300, 0.9, 0.7)
    failed = 0
    for _ in range(SETS):
        drawn = rng.choice(ROWS, 300, replace=False)
        m, k = g.flagged_counts(world.scores[drawn], world.true[drawn], None, grid.thresholds)
        failed += bool(((g.lower_bound(k, m, 0.7) >= 0.9) & (m >= 30)).any())
    assert failed / SETS > margin(0.3)


def test_a_sequence_ends_at_its_first_failure_and_a_later_one_goes_on() -> None:
    blocks = [(0.95, 100, True), (0.85, 20, False), (0.75, 300, True), (0.65, 400, False)]
    scores = np.concatenate([np.full(count, score, np.float32) for score, count, _ in blocks])
    true = np.concatenate([np.full(count, positive) for _, count, positive in blocks])
    thresholds = np.array([0.99, 0.9, 0.8, 0.7, 0.6])  # flagged: none, 100 of 100, 100 of 120, 400 of 420, 400 of 820
    for starts, accepted in (((0,), 1), ((0, 3), 3), ((2,), None), ((4,), None)):
        walk = g.precision_walk(g.Candidates(thresholds, starts), scores, true, None, 0.9, 0.9)
        assert walk.accepted == accepted
    np.testing.assert_array_equal(walk.m, [0, 100, 120, 420, 820])
    np.testing.assert_array_equal(walk.k, [0, 100, 100, 400, 400])
    np.testing.assert_allclose(walk.bounds[1:], stats.beta.ppf(0.1 / 4, walk.k, walk.m - walk.k + 1)[1:])


def test_candidates_know_no_label_and_start_where_a_test_can_pass() -> None:
    world = separated(0.3, 3.0)
    grid = g.candidates(world.ascending, 400, 0.95, 0.9)
    assert (np.diff(grid.thresholds) < 0).all()
    expected = 400 * g.beyond(world.ascending, grid.thresholds) / ROWS
    assert expected[0] == pytest.approx(72, rel=0.01)
    assert len(grid.starts) == 4
    assert grid.starts[0] == 0
    with pytest.raises(RefusedError, match=r"71 labels are too few.*at least 72 must"):
        g.candidates(world.ascending, 71, 0.95, 0.9)
    assert g.candidates(world.ascending, 400, 0.95, 0.9, (0.0, 1.0)).thresholds.min() > 0


def test_weighted_counts_are_those_of_the_whole_and_equal_weights_change_nothing() -> None:
    rng = np.random.default_rng(0)
    scores, true = rng.random(300).astype(np.float32), rng.random(300) < 0.4
    at = np.array([0.9, 0.5, 0.1])
    plain = g.flagged_counts(scores, true, None, at)
    same = g.flagged_counts(scores, true, np.full(300, 7.0), at)
    np.testing.assert_allclose(plain[0], same[0])
    np.testing.assert_allclose(plain[1], same[1])
    weights = np.where(true, 1.0, 10.0)  # positives were ten times as likely to be drawn
    m, k = g.flagged_counts(scores, true, weights, np.array([-1.0]))
    assert k[0] / m[0] == pytest.approx(true.sum() / (true.sum() + 10 * (~true).sum()))
    assert m[0] < 300


# ------------------------------------------------------------------ miss rate


@pytest.mark.parametrize(("n", "rate"), [(19, 0.05), (60, 0.05), (200, 0.1)])
def test_the_miss_rate_holds_on_average_and_its_bound_at_its_confidence(n: int, rate: float) -> None:
    rng = np.random.default_rng(0)
    everything = np.sort(rng.random(ROWS).astype(np.float32) ** 2)
    missed, broken = [], 0
    for _ in range(4 * SETS):
        positives = rng.choice(everything, n, replace=False)
        threshold = g.miss_threshold(everything, positives, None, rate)
        share = 1 - int(g.beyond(everything, threshold)) / ROWS
        seen = int((positives <= np.float32(threshold)).sum())
        assert seen == g.miss_rank(n, rate) - 1
        missed.append(share)
        broken += share > float(g.upper_bound(seen, n, 0.9))
    error = 4 * np.std(missed) / math.sqrt(len(missed))
    assert np.mean(missed) <= rate + error
    assert np.mean(missed) > rate - 1 / (n + 1) - error  # as loose as the guarantee allows, up to the next label
    assert broken / len(missed) <= margin(0.1, 4 * SETS)


def test_too_few_positives_are_refused_for_a_miss_rate() -> None:
    assert g.miss_rank(19, 0.05) == 1
    assert g.miss_rank(59, 0.05) == 3
    with pytest.raises(RefusedError, match=r"18 positive labels are too few for a miss rate of 0\.05: it needs 19"):
        g.miss_rank(18, 0.05)


# ------------------------------------------------------------------ probabilities


def test_platt_is_the_maximum_of_the_likelihood() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=500) * 0.01 + 0.25  # cosines: a narrow range far from zero
    y = (rng.random(500) < 1 / (1 + np.exp(-(300 * x - 76)))).astype(float)
    curve = prob.fit_platt(x, y, np.ones(500))
    target = np.where(y > 0, (y.sum() + 1) / (y.sum() + 2), 1 / ((1 - y).sum() + 2))

    def loss(v: np.ndarray) -> float:
        f = v[0] * (x - 0.25) * 100 + v[1]
        return float(np.sum(np.logaddexp(0, f) - target * f))

    best = optimize.minimize(loss, [0.0, 0.0], tol=1e-12).x
    assert curve.a == pytest.approx(best[0] * 100, rel=1e-3)
    np.testing.assert_allclose(curve(x), 1 / (1 + np.exp(-(best[0] * (x - 0.25) * 100 + best[1]))), atol=1e-4)


def test_platt_of_separable_labels_is_finite_and_of_equal_scores_flat() -> None:
    x = np.linspace(0, 1, 40)
    curve = prob.fit_platt(x, (x > 0.5).astype(float), np.ones(40))
    assert math.isfinite(curve.a)
    assert 0.9 < float(curve(np.array([1.0]))[0]) < 1
    flat_curve = prob.fit_platt(np.full(40, 0.3), np.repeat([0.0, 1.0], 20), np.ones(40))
    assert float(flat_curve(np.array([0.3]))[0]) == pytest.approx(0.5)


@pytest.mark.parametrize("falling", [False, True])
def test_isotonic_is_least_squares_under_monotony(falling: bool) -> None:
    rng = np.random.default_rng(0)
    x = np.round(rng.random(200), 2)
    y = (rng.random(200) < (1 - x if falling else x)).astype(float)
    weights = rng.random(200) + 0.5
    curve = prob.fit_isotonic(x, y, weights, falling=falling)
    points, inverse = np.unique(x, return_inverse=True)
    mass = np.bincount(inverse, weights)
    means = np.bincount(inverse, weights * y) / mass
    wanted = optimize.isotonic_regression(means, weights=mass, increasing=not falling).x
    np.testing.assert_allclose(curve(points), wanted, atol=1e-12)
    assert (np.diff(curve.scores) > 0).all()


def test_the_calibration_error_of_honest_and_of_boastful_probabilities() -> None:
    rng = np.random.default_rng(0)
    p = rng.random(20_000)
    y = (rng.random(20_000) < p).astype(float)
    ones = np.ones(20_000)
    assert prob.calibration_error(p, y, ones) < 0.02
    assert prob.calibration_error(np.minimum(p + 0.2, 1.2), y, ones) == pytest.approx(0.2, abs=0.02)


def test_brier_is_measured_on_labels_that_the_curve_did_not_see() -> None:
    rng = np.random.default_rng(0)
    seen, held = [], []
    for _ in range(30):
        x, y = rng.random(60).astype(np.float32), rng.random(60) < 0.5  # nothing to learn
        fitted = prob.fit(x, y, None)
        seen.append(float(np.mean((fitted.isotonic(x) - y) ** 2)))
        held.append(fitted.brier["isotonic"])
    assert np.mean(seen) < 0.24
    assert np.mean(held) > 0.25
