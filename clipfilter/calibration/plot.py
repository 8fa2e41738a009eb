"""One SVG of a calibration: how far the probabilities can be believed, and precision and recall by threshold."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np

from clipfilter.calibration import guarantees
from clipfilter.calibration.calibrate import Calibrated

_WIDTH, _HEIGHT = 1000, 490
_TOP, _SIDE, _GAP, _LEFT = 84, 320, 120, 70
_BINS = 8
_MARKS = 300
_INK, _SOFT, _LINE = "#1d2126", "#5b636d", "#e3e5e8"
_COLOURS = {"platt": "#1f6f78", "isotonic": "#7a5195", "precision": "#1f6f78", "recall": "#c77d1e"}
_BAND = {"reject": "#b03a2e", "review": "#b7860b"}


def plot_svg(found: Calibrated) -> str:
    """A whole SVG document, on white, without scripts or fonts of its own."""
    title = f"{found.rule} ({found.policy}) on {found.model}"
    design = f"{found.labels:,} labels, {found.positives:,} positive, design {found.design}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'font-family="system-ui, Segoe UI, Noto Sans, Arial, sans-serif" font-size="13" fill="{_INK}">',
        f"<title>Calibration of {escape(title)}</title>",
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#ffffff"/>',
        _text(_LEFT, 28, title, size=17, weight=600),
        _text(_LEFT, 50, design, colour=_SOFT),
        *_reliability(found),
        *_curves(found),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


class _Panel:
    """A square with two linear axes."""

    def __init__(self, left: float, width: float, x: tuple[float, float]) -> None:
        self.left, self.width, self.low, self.high = left, width, x[0], x[1]

    def x(self, value: float) -> float:
        return self.left + self.width * (value - self.low) / (self.high - self.low)

    def y(self, value: float) -> float:
        return _TOP + _SIDE * (1 - value)

    def frame(self, across: str, title: str, ticks: Sequence[float]) -> list[str]:
        base, right = _TOP + _SIDE, self.left + self.width
        parts = [_text(self.left, _TOP - 12, title, weight=600)]
        for value in (0, 0.25, 0.5, 0.75, 1):
            y = self.y(value)
            parts.append(f'<path d="M{self.left:.1f} {y:.1f}H{right:.1f}" stroke="{_LINE}"/>')
            parts.append(_text(self.left - 8, y + 4, f"{value:g}", anchor="end", colour=_SOFT, size=12))
        for value in ticks:
            x = self.x(value)
            parts.append(f'<path d="M{x:.1f} {base}v5" stroke="{_SOFT}"/>')
            parts.append(_text(x, base + 19, f"{value:.4g}", anchor="middle", colour=_SOFT, size=12))
        parts.append(f'<path d="M{self.left:.1f} {base}H{right:.1f}" stroke="{_SOFT}"/>')
        parts.append(_text(self.left + self.width / 2, base + 42, across, anchor="middle", colour=_SOFT))
        return parts

    def line(self, xs: Sequence[float], ys: Sequence[float], colour: str, width: float = 2) -> str:
        points = " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in zip(xs, ys, strict=True))
        return f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="{width}" stroke-linejoin="round"/>'


def _reliability(found: Calibrated) -> list[str]:
    panel = _Panel(_LEFT, _SIDE, (0.0, 1.0))
    parts = panel.frame("predicted probability (held out)", "Share of true labels", (0, 0.25, 0.5, 0.75, 1))
    parts.append(
        f'<path d="M{panel.x(0)} {panel.y(0)}L{panel.x(1)} {panel.y(1)}" stroke="{_SOFT}" stroke-dasharray="3 4"/>'
    )
    fitted = found.fitted
    if fitted is None:
        return [*parts, _text(_LEFT + 16, _TOP + 24, "labels of one kind tell no probability", colour=_SOFT)]
    own = np.ones(len(found.true)) if found.weights is None else found.weights
    for row, name in enumerate(("platt", "isotonic")):
        colour, shift = _COLOURS[name], 3 * (2 * row - 1)
        predicted = fitted.held_out[name]
        dots = []
        for part in np.array_split(np.argsort(predicted, kind="stable"), min(_BINS, max(1, len(predicted) // 5))):
            weights = own[part]
            m = float(weights.sum() ** 2 / np.sum(weights**2))
            x, y = (
                float(np.average(predicted[part], weights=weights)),
                float(np.average(found.true[part], weights=weights)),
            )
            low = float(guarantees.lower_bound(m * y, m, (1 + found.confidence) / 2))
            high = float(guarantees.upper_bound(m * y, m, (1 + found.confidence) / 2))
            at = panel.x(x) + shift
            dots.append(
                f'<path d="M{at:.1f} {panel.y(low):.1f}V{panel.y(high):.1f}" stroke="{colour}" stroke-opacity="0.45" '
                f'stroke-width="2"/><circle cx="{at:.1f}" cy="{panel.y(y):.1f}" r="4.5" fill="{colour}"/>'
            )
        parts += dots
        says = f"{name}: Brier {fitted.brier[name]:.3f}, ECE {fitted.ece[name]:.3f}"
        y = _TOP + 20 + 20 * row
        parts.append(f'<circle cx="{_LEFT + 18}" cy="{y - 4.5}" r="4.5" fill="{colour}"/>')
        parts.append(_text(_LEFT + 30, y, says))
    return parts


def _curves(found: Calibrated) -> list[str]:
    left = _LEFT + _SIDE + _GAP
    scores, true = found.scores.astype(np.float64), found.true
    limits = [scores.min(), scores.max(), *found.in_use.values()]
    low, high = float(min(limits)), float(max(limits))
    spread = (high - low) * 0.03 or max(abs(low) * 0.1, 1e-3)
    panel = _Panel(left, _WIDTH - left - 40, (low - spread, high + spread))
    across = f"threshold (rows {found.direction} it are flagged)"
    parts = panel.frame(across, "Precision and recall of what is flagged", _ticks(low, high))
    sign = 1.0 if found.direction == "above" else -1.0
    # Just before each labelled score, so that a point tells of the rows from that score on.
    at = np.nextafter(np.unique((sign * scores).astype(np.float32)), np.float32(-np.inf)).astype(np.float64)
    if len(at) > 400:
        at = at[np.linspace(0, len(at) - 1, 400).astype(int)]
    flags = (sign * scores).astype(np.float32)
    m, k = guarantees.flagged_counts(flags, true, found.weights, at)
    own = np.ones(len(true)) if found.weights is None else found.weights
    recall = [float(own[(flags > np.float32(t)) & true].sum() / own[true].sum()) for t in at]
    precision, bound = k / m, guarantees.lower_bound(k, m, found.confidence)
    xs = (sign * at).tolist()
    shade = " ".join(
        f"{panel.x(x):.1f},{panel.y(y):.1f}"
        for x, y in [*zip(xs, precision.tolist(), strict=True), *reversed(list(zip(xs, bound.tolist(), strict=True)))]
    )
    parts.append(f'<polygon points="{shade}" fill="{_COLOURS["precision"]}" fill-opacity="0.14"/>')
    parts.append(panel.line(xs, precision.tolist(), _COLOURS["precision"]))
    if not found.design.startswith("flagged"):
        parts.append(panel.line(xs, recall, _COLOURS["recall"]))
    for values, y, colour in (
        (scores[true], _TOP + _SIDE - 12, _COLOURS["precision"]),
        (scores[~true], _TOP + _SIDE - 5, _SOFT),
    ):
        marks = "".join(f"M{panel.x(float(x)):.1f} {y}v6" for x in np.sort(values)[:: max(1, len(values) // _MARKS)])
        parts.append(f'<path d="{marks}" stroke="{colour}" stroke-opacity="0.55"/>')
    for name, value in found.in_use.items():
        x = panel.x(value)
        end = x > panel.left + panel.width / 2
        y = _TOP + (150 if name == "reject" else 170)
        parts.append(
            f'<path d="M{x:.1f} {_TOP}V{_TOP + _SIDE}" stroke="{_BAND[name]}" stroke-dasharray="5 3" stroke-width="1.5"/>'
        )
        label = f"{name} {found.direction} {value:.4g}"
        parts.append(
            _text(x + (-7 if end else 7), y, label, anchor="end" if end else "start", colour=_BAND[name], halo=True)
        )
    legend = [
        ("precision", f"precision, and its lower bound at confidence {found.confidence:g}"),
        *([] if found.design.startswith("flagged") else [("recall", "recall")]),
    ]
    x = panel.left
    for name, says in legend:
        parts.append(f'<path d="M{x:.1f} {_TOP + _SIDE + 62}h18" stroke="{_COLOURS[name]}" stroke-width="3"/>')
        parts.append(_text(x + 24, _TOP + _SIDE + 66, says, size=12))
        x += 24 + 7 * len(says)
    return parts


def _ticks(low: float, high: float) -> list[float]:
    """Four to ten round numbers in a range."""
    rough = (high - low) / 5 or 1.0
    power = 10.0 ** np.floor(np.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = int(np.ceil(low / step - 0.05)), int(np.floor(high / step + 0.05))
    return [float(position * step) for position in range(first, last + 1)]


def _text(
    x: float, y: float, text: str, *, size: int = 13, weight: int = 400, anchor: str = "start", colour: str = _INK,
    halo: bool = False,
) -> str:  # fmt: skip
    outline = ' stroke="#ffffff" stroke-width="4" paint-order="stroke"' if halo else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" font-weight="{weight}" text-anchor="{anchor}" '
        f'fill="{colour}"{outline}>{escape(text)}</text>'
    )
