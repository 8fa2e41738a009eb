"""A framed square with two axes, for curves, areas and points, in pixels and with its own colours: it stands alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from clipfilter.charts.svg import Axis, element

INK, SOFT, LINE = "#1d2126", "#5b636d", "#e3e5e8"
_QUARTERS = (0, 0.25, 0.5, 0.75, 1)


def label(
    x: float, y: float, words: str, *, size: int = 13, weight: int = 400, anchor: str = "start", colour: str = INK,
    halo: bool = False,
) -> Markup:  # fmt: skip
    """Text at a place. halo: white around the letters, where they lie on lines."""
    outline = {"stroke": "#ffffff", "stroke_width": 4, "paint_order": "stroke"} if halo else {}
    font = {"font_size": size, "font_weight": weight, "text_anchor": anchor, "fill": colour}
    return element("text", words, x=f"{x:.1f}", y=f"{y:.1f}", **font, **outline)


@dataclass(frozen=True)
class Panel:
    """A part of a drawing: `x` any linear axis, from left to right; `y` one of shares, from 0 below to 1 on top."""

    x: Axis
    y: Axis

    def frame(self, across: str, title: str, ticks: Sequence[float]) -> list[Markup]:
        """Title, grid, axes with numbers. across: what the horizontal axis says; ticks: its numbers."""
        left, right, base = self.x.start, self.x.end, self.y.start
        parts = [label(left, self.y.end - 12, title, weight=600)]
        for value in _QUARTERS:
            y = self.y(value)
            parts.append(element("path", d=f"M{left:.1f} {y:.1f}H{right:.1f}", stroke=LINE))
            parts.append(label(left - 8, y + 4, f"{value:g}", anchor="end", colour=SOFT, size=12))
        for value in ticks:
            x = self.x(value)
            parts.append(element("path", d=f"M{x:.1f} {base:g}v5", stroke=SOFT))
            parts.append(label(x, base + 19, f"{value:.4g}", anchor="middle", colour=SOFT, size=12))
        parts.append(element("path", d=f"M{left:.1f} {base:g}H{right:.1f}", stroke=SOFT))
        parts.append(label((left + right) / 2, base + 42, across, anchor="middle", colour=SOFT))
        return parts

    def curve(self, xs: Sequence[float], ys: Sequence[float], colour: str) -> Markup:
        style = {"fill": "none", "stroke": colour, "stroke_width": 2, "stroke_linejoin": "round"}
        return element("polyline", points=self._points(xs, ys), **style)

    def area(self, xs: Sequence[float], upper: Sequence[float], lower: Sequence[float], colour: str) -> Markup:
        """What lies between two curves, tinted."""
        points = self._points([*xs, *reversed(xs)], [*upper, *reversed(lower)])
        return element("polygon", points=points, fill=colour, fill_opacity=0.14)

    def whisker(self, at: float, low: float, high: float, middle: float, colour: str) -> Markup:
        """A point with its interval, at a place (not a value) of the horizontal axis."""
        style = {"stroke": colour, "stroke_opacity": 0.45, "stroke_width": 2}
        interval = element("path", d=f"M{at:.1f} {self.y(low):.1f}V{self.y(high):.1f}", **style)
        return interval + element("circle", cx=f"{at:.1f}", cy=f"{self.y(middle):.1f}", r=4.5, fill=colour)

    def rug(self, values: Sequence[float], y: float, colour: str) -> Markup:
        """A short stroke for every value."""
        strokes = "".join(f"M{self.x(value):.1f} {y:g}v6" for value in values)
        return element("path", d=strokes, stroke=colour, stroke_opacity=0.55)

    def upright(self, value: float, words: str, y: float, colour: str) -> list[Markup]:
        """A dashed line over the whole height, its words beside it on the side that has more room."""
        x = self.x(value)
        end = x > (self.x.start + self.x.end) / 2
        style = {"stroke": colour, "stroke_dasharray": "5 3", "stroke_width": 1.5}
        line = element("path", d=f"M{x:.1f} {self.y.end:g}V{self.y.start:g}", **style)
        anchor, shift = ("end", -7) if end else ("start", 7)
        return [line, label(x + shift, y, words, anchor=anchor, colour=colour, halo=True)]

    def _points(self, xs: Sequence[float], ys: Sequence[float]) -> str:
        return " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in zip(xs, ys, strict=True))
