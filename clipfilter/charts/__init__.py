"""The chart kit: counting and binning, scales and ticks, and everything the pages draw, as SVG that is always escaped."""

from __future__ import annotations

from clipfilter.charts.bars import Limit, bars, histogram_svg, squeezed
from clipfilter.charts.histogram import Histogram
from clipfilter.charts.panel import INK, SOFT, Panel, label
from clipfilter.charts.svg import Axis, dot, element, stacked_bar, ticks

__all__ = [
    "INK",
    "SOFT",
    "Axis",
    "Histogram",
    "Limit",
    "Panel",
    "bars",
    "dot",
    "element",
    "histogram_svg",
    "label",
    "squeezed",
    "stacked_bar",
    "ticks",
]
