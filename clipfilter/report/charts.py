"""Inline SVG: histograms with thresholds, and stacked bars; in percent coordinates, so that text keeps its size."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from clipfilter.decisions import LIMITS
from clipfilter.report import text
from clipfilter.report.data import Band
from clipfilter.report.histogram import Histogram

_FEWEST_BARS, _BARS = 16, 48
_TOP, _HEIGHT, _BOTTOM = 40, 150, 22


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
    step = _round_step((high - low) / wanted, whole=histogram.integral)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    drawn = np.arange(first, last + 1) * step
    index = np.searchsorted(drawn, edges + width / 2, side="right") - 1
    outside = int(counts[index < 0].sum()), int(counts[index >= len(drawn) - 1].sum())
    index = np.clip(index, 0, len(drawn) - 2)
    if full is not None and len(index):  # the value 1.0 belongs to the last bar
        outside = 0, 0
    return Bars(drawn, np.bincount(index, counts, minlength=len(drawn) - 1).astype(np.int64), outside)


def histogram_svg(
    histogram: Histogram, bands: list[Band], *, label: str, full: tuple[float, float] | None = None
) -> str:
    """A histogram with its thresholds; bars are coloured by the band they lie in, exactly up to the threshold."""
    limits = [band.threshold for band in bands if band.threshold is not None]
    drawn = bars(histogram, limits, full)
    low, high = float(drawn.edges[0]), float(drawn.edges[-1])

    def x(value: float) -> float:
        return 100 * (value - low) / (high - low)

    rooted = squeezed(drawn)
    heights = np.sqrt(drawn.counts) if rooted else drawn.counts.astype(float)
    peak = max(float(heights.max()), 1.0)
    parts = [
        f'<svg class="chart" width="100%" height="{_TOP + _HEIGHT + _BOTTOM}" role="img" '
        f'aria-label="{text.esc(label, 600)}">'
    ]
    for band in reversed(bands):
        if band.threshold is not None:
            at = x(band.threshold)
            left, width = (at, 100 - at) if band.direction == "above" else (0.0, at)
            parts.append(
                f'<rect class="zone {band.name}" x="{left:.3f}%" y="{_TOP}" '
                f'width="{max(width, 0):.3f}%" height="{_HEIGHT}"/>'
            )
    for position, count in enumerate(drawn.counts.tolist()):
        if not count:
            continue
        start, stop = float(drawn.edges[position]), float(drawn.edges[position + 1])
        height = max(1.5, _HEIGHT * float(heights[position]) / peak)
        says = f"{text.score(start)} to {text.score(stop)}: {count:,} images"
        cuts = [start, *sorted(limit for limit in limits if start < limit < stop), stop]
        pieces = "".join(
            f'<rect class="bar {zone((a + b) / 2, bands)}" x="{x(a):.3f}%" y="{_TOP + _HEIGHT - height:.1f}" '
            f'width="{x(b) - x(a):.3f}%" height="{height:.1f}"/>'
            for a, b in itertools.pairwise(cuts)
        )
        parts.append(f"<g><title>{text.esc(says)}</title>{pieces}</g>")
    base = _TOP + _HEIGHT
    parts.append(f'<line class="axis" x1="0" x2="100%" y1="{base}" y2="{base}"/>')
    for value in _ticks(low, high):
        at = x(value)
        anchor = "start" if at < 4 else "end" if at > 96 else "middle"
        parts.append(
            f'<text class="tick" x="{at:.3f}%" y="{base + 16}" text-anchor="{anchor}">{text.threshold(value)}</text>'
        )
    for row, band in enumerate(sorted(bands, key=lambda item: item.name != "reject")):
        if band.threshold is None:
            continue
        at, y = x(band.threshold), 13 + 16 * row
        anchor, shift = ("end", -6) if at > 45 else ("start", 6)
        parts.append(
            f'<line class="limit {band.name}" x1="{at:.3f}%" x2="{at:.3f}%" y1="{y - 10}" y2="{base}"/>'
            f'<text class="mark {band.name}" x="{at:.3f}%" dx="{shift}" y="{y}" text-anchor="{anchor}">'
            f"{band.name} {band.direction} {text.threshold(band.threshold)}</text>"
        )
    parts.append("</svg>")
    return "".join(parts)


def squeezed(drawn: Bars) -> bool:
    """Whether one bar dwarfs the others so much that heights are better drawn as square roots."""
    counts = drawn.counts[drawn.counts > 0]
    return len(counts) > 2 and float(counts.max()) > 25 * float(np.median(counts))


def zone(value: float, bands: list[Band]) -> str:
    """The class of a score: the band it falls into, "keep" beside every band, "plain" where there are none."""
    limits = [band for band in bands if band.threshold is not None]
    for name in reversed(LIMITS):
        for band in limits:
            if band.name == name and band.threshold is not None:
                beyond = value > band.threshold if band.direction == "above" else value < band.threshold
                if beyond:
                    return name
    return "keep" if limits else "plain"


def stacked_bar(parts: Sequence[tuple[str, float]], *, label: str, height: int = 28) -> str:
    """Shares of a whole as one bar; (class, amount) in drawing order. Slivers stay visible."""
    whole = sum(amount for _, amount in parts)
    drawn = [
        f'<svg class="stack" width="100%" height="{height}" role="img" aria-label="{text.esc(label, 600)}">',
        f'<rect class="empty" width="100%" height="{height}"/>',
    ]
    if whole:
        least = 0.4
        widths = [max(100 * amount / whole, least) if amount else 0.0 for _, amount in parts]
        scale = 100 / sum(widths)
        at = 0.0
        for (name, _), width in zip(parts, widths, strict=True):
            if width:
                drawn.append(f'<rect class="{name}" x="{at:.3f}%" width="{width * scale:.3f}%" height="{height}"/>')
                at += width * scale
    drawn.append("</svg>")
    return "".join(drawn)


def _round_step(step: float, *, whole: bool = False) -> float:
    """The next of 1, 2, 2.5, 5 times a power of ten; a whole number where bars count whole numbers."""
    if whole:
        step = max(step, 1.0)
    power = 10.0 ** math.floor(math.log10(step))
    factors = (1, 2, 5, 10) if whole and power < 10 else (1, 2, 2.5, 5, 10)
    return next(factor * power for factor in factors if factor * power >= step * (1 - 1e-9))


def _ticks(low: float, high: float) -> list[float]:
    step = _round_step((high - low) / 6)
    return [position * step for position in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
