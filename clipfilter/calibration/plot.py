"""One SVG of a calibration: how far the probabilities can be believed, and precision and recall by threshold."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from clipfilter.calibration import guarantees
from clipfilter.calibration.calibrate import Calibrated
from clipfilter.charts import INK, SOFT, Axis, Panel, element, label, ticks

_WIDTH, _HEIGHT = 1000, 490
_TOP, _SIDE, _GAP, _LEFT = 84, 320, 120, 70
_BASE = _TOP + _SIDE
_SHARES = Axis(0.0, 1.0, _BASE, _TOP)
_BINS = 8
_MARKS = 300
_POINTS = 400
_COLOURS = {"platt": "#1f6f78", "isotonic": "#7a5195", "precision": "#1f6f78", "recall": "#c77d1e"}
_BAND = {"reject": "#b03a2e", "review": "#b7860b"}


def plot_svg(found: Calibrated) -> str:
    """A whole SVG document, on white, without scripts or fonts of its own."""
    title = f"{found.rule} ({found.policy}) on {found.model}"
    design = f"{found.labels:,} labels, {found.positives:,} positive, design {found.design}"
    parts = [
        element("title", f"Calibration of {title}"),
        element("rect", width=_WIDTH, height=_HEIGHT, fill="#ffffff"),
        label(_LEFT, 28, title, size=17, weight=600),
        label(_LEFT, 50, design, colour=SOFT),
        *_reliability(found),
        *_curves(found),
    ]
    size = {"width": _WIDTH, "height": _HEIGHT, "viewBox": f"0 0 {_WIDTH} {_HEIGHT}"}
    font = {"font_family": "system-ui, Segoe UI, Noto Sans, Arial, sans-serif", "font_size": 13, "fill": INK}
    lines = Markup("\n{}\n").format(Markup("\n").join(parts))
    return element("svg", lines, xmlns="http://www.w3.org/2000/svg", **size, **font) + "\n"


def _reliability(found: Calibrated) -> list[Markup]:
    panel = Panel(Axis(0.0, 1.0, _LEFT, _LEFT + _SIDE), _SHARES)
    parts = panel.frame("predicted probability (held out)", "Share of true labels", (0, 0.25, 0.5, 0.75, 1))
    diagonal = f"M{panel.x(0)} {_BASE}L{panel.x(1)} {_TOP}"
    parts.append(element("path", d=diagonal, stroke=SOFT, stroke_dasharray="3 4"))
    fitted = found.fitted
    if fitted is None:
        return [*parts, label(_LEFT + 16, _TOP + 24, "labels of one kind tell no probability", colour=SOFT)]
    own = np.ones(len(found.true)) if found.weights is None else found.weights
    for row, name in enumerate(("platt", "isotonic")):
        colour, shift = _COLOURS[name], 3 * (2 * row - 1)
        predicted = fitted.held_out[name]
        for part in np.array_split(np.argsort(predicted, kind="stable"), min(_BINS, max(1, len(predicted) // 5))):
            weights = own[part]
            m = float(weights.sum() ** 2 / np.sum(weights**2))
            x = float(np.average(predicted[part], weights=weights))
            y = float(np.average(found.true[part], weights=weights))
            low = float(guarantees.lower_bound(m * y, m, (1 + found.confidence) / 2))
            high = float(guarantees.upper_bound(m * y, m, (1 + found.confidence) / 2))
            parts.append(panel.whisker(panel.x(x) + shift, low, high, y, colour))
        y = _TOP + 20 + 20 * row
        parts.append(element("circle", cx=_LEFT + 18, cy=y - 4.5, r=4.5, fill=colour))
        parts.append(label(_LEFT + 30, y, f"{name}: Brier {fitted.brier[name]:.3f}, ECE {fitted.ece[name]:.3f}"))
    return parts


@dataclass(frozen=True)
class _ByThreshold:
    """What is flagged at each threshold: shares by `thresholds` (raw scores); bound: below `precision`, one-sided."""

    thresholds: list[float]
    precision: list[float]
    bound: list[float]
    recall: list[float]


def _by_threshold(found: Calibrated) -> _ByThreshold:
    sign = 1.0 if found.direction == "above" else -1.0
    flags = (sign * found.scores.astype(np.float64)).astype(np.float32)
    # Just before each labelled score, so that a point tells of the rows from that score on.
    at = np.nextafter(np.unique(flags), np.float32(-np.inf)).astype(np.float64)
    if len(at) > _POINTS:
        at = at[np.linspace(0, len(at) - 1, _POINTS).astype(int)]
    m, k = guarantees.flagged_counts(flags, found.true, found.weights, at)
    own = np.ones(len(found.true)) if found.weights is None else found.weights
    recall = [float(own[(flags > np.float32(t)) & found.true].sum() / own[found.true].sum()) for t in at]
    bound = guarantees.lower_bound(k, m, found.confidence)
    return _ByThreshold((sign * at).tolist(), (k / m).tolist(), bound.tolist(), recall)


def _curves(found: Calibrated) -> list[Markup]:
    left = _LEFT + _SIDE + _GAP
    scores, true = found.scores.astype(np.float64), found.true
    limits = [scores.min(), scores.max(), *found.in_use.values()]
    low, high = float(min(limits)), float(max(limits))
    spread = (high - low) * 0.03 or max(abs(low) * 0.1, 1e-3)
    panel = Panel(Axis(low - spread, high + spread, left, _WIDTH - 40), _SHARES)
    across = f"threshold (rows {found.direction} it are flagged)"
    parts = panel.frame(across, "Precision and recall of what is flagged", ticks(low, high, 5, slack=0.05))
    shown, whole = _by_threshold(found), not found.design.startswith("flagged")
    parts.append(panel.area(shown.thresholds, shown.precision, shown.bound, _COLOURS["precision"]))
    parts.append(panel.curve(shown.thresholds, shown.precision, _COLOURS["precision"]))
    if whole:
        parts.append(panel.curve(shown.thresholds, shown.recall, _COLOURS["recall"]))
    for values, y, colour in ((scores[true], _BASE - 12, _COLOURS["precision"]), (scores[~true], _BASE - 5, SOFT)):
        parts.append(panel.rug(np.sort(values)[:: max(1, len(values) // _MARKS)].tolist(), y, colour))
    for name, value in found.in_use.items():
        words = f"{name} {found.direction} {value:.4g}"
        parts += panel.upright(value, words, _TOP + (150 if name == "reject" else 170), _BAND[name])
    legend = [("precision", f"precision, and its lower bound at confidence {found.confidence:g}")]
    x = float(left)
    for name, says in [*legend, ("recall", "recall")] if whole else legend:
        parts.append(element("path", d=f"M{x:.1f} {_BASE + 62}h18", stroke=_COLOURS[name], stroke_width=3))
        parts.append(label(x + 24, _BASE + 66, says, size=12))
        x += 24 + 7 * len(says)
    return parts
