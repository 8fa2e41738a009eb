"""WiSE-FT: interpolate between the model before and after, and choose how far to go.

Wortsman et al. 2022, "Robust fine-tuning of zero-shot models", arXiv:2109.01903.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

ALPHAS = tuple(step / 10 for step in range(11))


@dataclass(frozen=True)
class Point:
    """What the interpolation at `alpha` measures: dev recall@10 and zero-shot top-1, shares; None where not measured."""

    alpha: float
    dev: float
    zero_shot: float | None


def interpolate(before: Mapping[str, Tensor], after: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """theta = (1 - alpha) theta_0 + alpha theta_1, tensor by tensor; what is not a float is taken from `after`."""
    return {
        name: before[name].lerp(tensor.to(before[name].device), alpha) if tensor.is_floating_point() else tensor
        for name, tensor in after.items()
    }


def choose(points: Sequence[Point], max_zero_shot_loss: float) -> Point:
    """Of the points that lose at most `max_zero_shot_loss` percentage points of zero-shot top-1 against alpha 0, the one
    with the highest dev recall@10; of equal ones the smallest alpha. Alpha 0 is always among them."""
    start = next(point for point in points if point.alpha == 0)
    allowed = [
        point
        for point in points
        if point.zero_shot is None
        or start.zero_shot is None
        or 100 * (start.zero_shot - point.zero_shot) <= max_zero_shot_loss + 1e-9
    ]
    return max(allowed, key=lambda point: (point.dev, -point.alpha))
