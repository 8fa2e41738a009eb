"""The report's histograms: nothing is lost, in any order, at any scale, in flat memory."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from clipfilter.charts import bars
from clipfilter.charts.histogram import BINS, Histogram

numbers = st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=40)


def filled(*parts: list[float]) -> Histogram:
    histogram = Histogram()
    for part in parts:
        histogram.add(np.array(part, np.float32))
    return histogram


@settings(max_examples=150, deadline=None)
@given(st.lists(numbers, max_size=5))
def test_every_value_is_counted_in_the_bin_that_holds_it(parts: list[list[float]]) -> None:
    histogram = filled(*parts)
    values = np.sort(np.concatenate([np.array(part, np.float64) for part in [[], *parts]]))
    edges, width, counts = histogram.bins()
    assert histogram.n == counts.sum() == len(values)
    assert len(edges) <= BINS
    for edge, count in zip(edges, counts, strict=True):
        assert ((values >= edge) & (values < edge + width)).sum() == count
    if len(values):
        assert (histogram.minimum, histogram.maximum) == (values[0], values[-1])


@settings(max_examples=100, deadline=None)
@given(numbers, numbers)
def test_merging_is_adding(left: list[float], right: list[float]) -> None:
    merged, other = filled(left), filled(right)
    merged.merge(other)
    together = filled(left, right)
    assert merged.n == together.n
    assert merged.integral == together.integral
    if merged.n:
        assert (merged.minimum, merged.maximum) == (together.minimum, together.maximum)
        assert merged.bins()[2].sum() == merged.n


def test_missing_and_infinite_scores_are_not_counted() -> None:
    histogram = filled([np.nan, 1.0, np.inf, -np.inf, 2.0])
    assert (histogram.n, histogram.minimum, histogram.maximum) == (2, 1.0, 2.0)


def test_quantiles_are_exact_to_a_bin() -> None:
    values = np.random.default_rng(0).normal(size=20_000)
    histogram = filled(values.tolist())
    assert abs(histogram.quantile(0.5) - np.median(values)) < 0.01


def test_bars_hold_every_row_and_break_at_round_numbers() -> None:
    values = np.random.default_rng(1).beta(2, 5, 5000)
    drawn = bars(filled(values.tolist()), [0.5, 0.85], (0.0, 1.0))
    assert drawn.counts.sum() == 5000
    assert (drawn.edges[0], drawn.edges[-1]) == (0.0, 1.0)
    inside = drawn.counts[drawn.edges[:-1] >= 0.85 - 1e-9].sum()
    assert inside == (np.float32(values) >= np.float32(0.85)).sum()


def test_a_few_outliers_do_not_squeeze_the_picture() -> None:
    values = [*np.random.default_rng(2).integers(200, 400, 3000).tolist(), 90_000, 100_000]
    drawn = bars(filled(values), [150.0])
    assert drawn.edges[-1] < 1000
    assert drawn.outside == (0, 2)
    assert drawn.counts.sum() == 3002
    assert (drawn.edges == np.rint(drawn.edges)).all()  # whole numbers: no comb pattern


def test_one_value_makes_one_bar() -> None:
    drawn = bars(filled([224.0] * 9), [])
    assert drawn.counts.sum() == drawn.counts.max() == 9
