"""Histograms as bars with round edges and thresholds; in percent coordinates, so that text keeps its size."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from clipfilter import text
from clipfilter.charts.histogram import Histogram
from clipfilter.charts.svg import Axis, element, round_step, ticks
from clipfilter.decisions import LIMITS

_FEWEST_BARS, _BARS = 16, 48
_TOP, _HEIGHT, _BOTTOM = 40, 150, 22
_BASE = _TOP + _HEIGHT


@dataclass(frozen=True)
class Limit:
    """A threshold as drawn. name: its class and its word ("review", "reject"); direction: "above" or "below" it."""

    name: str
    direction: str
    value: float

    def beyond(self, value: float) -> bool:
        return value > self.value if self.direction == "above" else value < self.value


@dataclass(frozen=True)
class Bars:
    """A histogram as drawn: `counts[i]` rows in [edges[i], edges[i + 1]). outside: rows beyond both ends, which are
    drawn in the first and last bar."""

    edges: np.ndarray
    counts: np.ndarray
    outside: tuple[int, int]


def bars(histogram: Histogram, thresholds: list[float], full: tuple[float, float] | None = None) -> Bars:
    """Up to about `_BARS` bars (fewer for few rows) with round edges, over the range of the rows and the thresholds.

    full: the range to draw whatever the data (probabilities).
    """
    edges, width, counts = histogram.bins()
    low, high = histogram.minimum, histogram.maximum
    middle = histogram.quantile(0.002), histogram.quantile(0.998)
    if high - low > 3 * (middle[1] - middle[0]) > 0:  # a few far outliers must not squeeze all others into one bar
        low, high = middle
    low, high = min([low, *thresholds]), max([high, *thresholds])
    if full is not None:
        low, high = min(low, full[0]), max(high, full[1])
    if high <= low:
        spread = max(abs(low) * 0.1, 1.0 if histogram.integral else 1e-3)
        low, high = low - spread, high + spread
    elif full is None:
        low, high = low - (high - low) * 0.02, high + (high - low) * 0.02
    wanted = min(max(3 * math.sqrt(histogram.n), _FEWEST_BARS), _BARS)
    step = round_step((high - low) / wanted, whole=histogram.integral)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    drawn = np.arange(first, last + 1) * step
    index = np.searchsorted(drawn, edges + width / 2, side="right") - 1
    outside = int(counts[index < 0].sum()), int(counts[index >= len(drawn) - 1].sum())
    index = np.clip(index, 0, len(drawn) - 2)
    if full is not None and len(index):  # the value 1.0 belongs to the last bar
        outside = 0, 0
    return Bars(drawn, np.bincount(index, counts, minlength=len(drawn) - 1).astype(np.int64), outside)


def squeezed(drawn: Bars) -> bool:
    """Whether one bar dwarfs the others so much that heights are better drawn as square roots."""
    counts = drawn.counts[drawn.counts > 0]
    return len(counts) > 2 and float(counts.max()) > 25 * float(np.median(counts))


def histogram_svg(drawn: Bars, limits: Sequence[Limit], *, label: str) -> Markup:
    """A histogram with its thresholds; bars are coloured by the limit they lie beyond, exactly up to the threshold.

    label: what it says, for those who cannot see it.
    """
    x = Axis(float(drawn.edges[0]), float(drawn.edges[-1]))
    content = [
        *(_zone(limit, x(limit.value)) for limit in reversed(limits)),
        *_columns(drawn, limits, x),
        element("line", class_="axis", x1=0, x2="100%", y1=_BASE, y2=_BASE),
        *_ticks(x),
        *_marks(limits, x),
    ]
    size = {"width": "100%", "height": _BASE + _BOTTOM}
    return element("svg", *content, class_="chart", **size, role="img", aria_label=label)


def _zone(limit: Limit, at: float) -> Markup:
    left, width = (at, 100 - at) if limit.direction == "above" else (0.0, at)
    size = {"y": _TOP, "width": _percent(max(width, 0)), "height": _HEIGHT}
    return element("rect", class_=f"zone {limit.name}", x=_percent(left), **size)


def _columns(drawn: Bars, limits: Sequence[Limit], x: Axis) -> Iterator[Markup]:
    heights = np.sqrt(drawn.counts) if squeezed(drawn) else drawn.counts.astype(float)
    peak = max(float(heights.max()), 1.0)
    for position, count in enumerate(drawn.counts.tolist()):
        if not count:
            continue
        start, stop = float(drawn.edges[position]), float(drawn.edges[position + 1])
        height = max(1.5, _HEIGHT * float(heights[position]) / peak)
        cuts = [start, *sorted(limit.value for limit in limits if start < limit.value < stop), stop]
        pieces = []
        for a, b in itertools.pairwise(cuts):
            size = {"y": f"{_BASE - height:.1f}", "width": _percent(x(b) - x(a)), "height": f"{height:.1f}"}
            pieces.append(element("rect", class_=f"bar {_look((a + b) / 2, limits)}", x=_percent(x(a)), **size))
        says = f"{text.score(start)} to {text.score(stop)}: {count:,} images"
        yield element("g", element("title", says), *pieces)


def _look(value: float, limits: Sequence[Limit]) -> str:
    """The class of a score: the limit it lies beyond, "keep" beside every limit, "plain" where there are none."""
    beyond = {limit.name for limit in limits if limit.beyond(value)}
    return next((name for name in reversed(LIMITS) if name in beyond), "keep" if limits else "plain")


def _ticks(x: Axis) -> Iterator[Markup]:
    for value in ticks(x.low, x.high, 6):
        at = x(value)
        anchor = "start" if at < 4 else "end" if at > 96 else "middle"
        yield element("text", text.threshold(value), class_="tick", x=_percent(at), y=_BASE + 16, text_anchor=anchor)


def _marks(limits: Sequence[Limit], x: Axis) -> Iterator[Markup]:
    """The thresholds' lines and words, reject first."""
    for row, limit in enumerate(sorted(limits, key=lambda item: item.name != "reject")):
        at, y = x(limit.value), 13 + 16 * row
        anchor, shift = ("end", -6) if at > 45 else ("start", 6)
        line = element("line", class_=f"limit {limit.name}", x1=_percent(at), x2=_percent(at), y1=y - 10, y2=_BASE)
        words = f"{limit.name} {limit.direction} {text.threshold(limit.value)}"
        place = {"x": _percent(at), "dx": shift, "y": y, "text_anchor": anchor}
        yield line + element("text", words, class_=f"mark {limit.name}", **place)


def _percent(value: float) -> str:
    return f"{value:.3f}%"
