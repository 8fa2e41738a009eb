"""The logistic curve, and Platt's calibrated probabilities by it."""

from __future__ import annotations

import math

import numpy as np


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)) in the type of `x`; small results keep their relative precision."""
    with np.errstate(over="ignore"):  # exp overflows to infinity where the result is 0
        return np.asarray(1 / (1 + np.exp(-x)), dtype=x.dtype)


def bent(curve: tuple[float, float], score: float) -> float:
    """The calibrated probability of a score by Platt's curve (a, b): 1 / (1 + exp(-(a score + b)))."""
    return 0.5 * (1.0 + math.tanh(0.5 * (curve[0] * score + curve[1])))
