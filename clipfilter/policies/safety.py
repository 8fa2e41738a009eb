"""Safety checkers as columns of the policy's one matrix: concepts with their own thresholds, special care, one score."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class SafetyMember:
    """One safety rule. Its columns are those of the concepts, then those of special care.

    Formula (Stable Diffusion's safety checker): a = adjustment if any(cos(x, s_k) - t_k + strictness > 0) else 0; the
    score is max_j(cos(x, c_j) - t_j) + a.
    """

    rule: str
    start: int  # of its columns among those of all safety rules
    thresholds: np.ndarray  # float64 [m] of the concepts
    special: np.ndarray  # float64 [k] of special care
    adjustment: float
    strictness: float
    label: int  # position of the first concept's name among the policy's labels

    @property
    def columns(self) -> slice:
        return slice(self.start, self.start + len(self.thresholds) + len(self.special))

    def scores(self, cosines: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """From cosines [m + k, n] of one float type: scores [n], the concept that decides each intp [n], and how near
        special care is to its limit [n] (infinite where there is none)."""
        dtype = cosines.dtype
        count = len(self.thresholds)
        beyond = cosines[:count] - self.thresholds.astype(dtype)[:, None]
        decides = beyond.argmax(axis=0)
        result = np.take_along_axis(beyond, decides[None], axis=0)[0]
        if not len(self.special):
            return result, decides, np.full(len(result), np.inf, dtype=dtype)
        care = cosines[count:] - self.special.astype(dtype)[:, None] + dtype.type(self.strictness)
        result = result + np.where((care > 0).any(axis=0), dtype.type(self.adjustment), dtype.type(0))
        return result, decides, np.abs(care).min(axis=0)


@dataclass(frozen=True)
class SafetyPlan:
    """The safety rules of a policy. weights: float32 [columns, dim], unit rows, which follow phrases and heads."""

    members: tuple[SafetyMember, ...]
    weights: np.ndarray
