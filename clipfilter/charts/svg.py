"""The pieces of every chart: escaped elements, linear scales, round ticks, dots of legends and stacked bars."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

#: Percent of a stacked bar's width that the smallest part takes, so that slivers stay visible.
_SLIVER = 0.4


def element(name: str, *content: str, **attributes: object) -> Markup:
    """One element; content that is no Markup and all attribute values are escaped.

    attributes: in the order given; an underscore stands for a hyphen, one at the end is dropped (`class_`).
    """
    written = _joined(
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items()
    )
    if not content:
        return Markup("<{}{}/>").format(name, written)
    return Markup("<{0}{1}>{2}</{0}>").format(name, written, _joined(content))


def _joined(parts: Iterable[str]) -> Markup:
    """Parts one after the other; what is no Markup is escaped."""
    return Markup("").join(parts)


@dataclass(frozen=True)
class Axis:
    """A linear scale: the value `low` is drawn at `start`, the value `high` at `end`."""

    low: float
    high: float
    start: float = 0.0
    end: float = 100.0

    def __call__(self, value: float) -> float:
        return self.start + (self.end - self.start) * (value - self.low) / (self.high - self.low)


def ticks(low: float, high: float, steps: int, slack: float = 1e-9) -> list[float]:
    """Round numbers in a range, with at most `steps` steps. slack: how far outside one may lie, in steps."""
    step = round_step((high - low) / steps or 1.0)
    first, last = math.ceil(low / step - slack), math.floor(high / step + slack)
    return [float(position * step) for position in range(first, last + 1)]


def round_step(step: float, *, whole: bool = False) -> float:
    """The next of 1, 2, 2.5, 5 times a power of ten; a whole number where bars count whole numbers."""
    if whole:
        step = max(step, 1.0)
    power = 10.0 ** math.floor(math.log10(step))
    factors = (1, 2, 5, 10) if whole and power < 10 else (1, 2, 2.5, 5, 10)
    return next(factor * power for factor in factors if factor * power >= step * (1 - 1e-9))


def dot(look: str) -> Markup:
    """The coloured dot of a legend. look: its class."""
    circle = element("circle", class_=look, cx=5, cy=5, r=5)
    return element("svg", circle, class_="dot", width=10, height=10, aria_hidden="true")


def stacked_bar(parts: Sequence[tuple[str, float]], *, label: str, height: int = 28) -> Markup:
    """Shares of a whole as one bar; (class, amount) in drawing order. label: what it says, for those who cannot see."""
    whole = sum(amount for _, amount in parts)
    drawn = [element("rect", class_="empty", width="100%", height=height)]
    if whole:
        widths = [max(100 * amount / whole, _SLIVER) if amount else 0.0 for _, amount in parts]
        scale = 100 / sum(widths)
        at = 0.0
        for (look, _), width in zip(parts, widths, strict=True):
            if width:
                place = {"x": f"{at:.3f}%", "width": f"{width * scale:.3f}%", "height": height}
                drawn.append(element("rect", class_=look, **place))
                at += width * scale
    return element("svg", *drawn, class_="stack", width="100%", height=height, role="img", aria_label=label)
