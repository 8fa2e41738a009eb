"""From a score to a probability: Platt's sigmoid and isotonic regression, and how good they are out of sample."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from clipfilter.policies import sigmoid

FOLDS = 5
BINS = 10
_ITERATIONS = 100


@dataclass(frozen=True)
class PlattCurve:
    """P(true) = 1 / (1 + exp(-(a score + b)))."""

    a: float
    b: float

    def __call__(self, scores: np.ndarray) -> np.ndarray:
        """Probabilities, float64 [n], of scores [n]."""
        return sigmoid(self.a * np.asarray(scores, np.float64) + self.b)


@dataclass(frozen=True)
class IsotonicCurve:
    """Linear interpolation between points, constant beyond them. scores ascend."""

    scores: np.ndarray
    probabilities: np.ndarray

    def __call__(self, scores: np.ndarray) -> np.ndarray:
        """Probabilities, float64 [n], of scores [n]."""
        return np.asarray(np.interp(np.asarray(scores, np.float64), self.scores, self.probabilities))


@dataclass(frozen=True)
class Fitted:
    """Both curves, fitted to all n labels; Brier score and expected calibration error from cross-validation, where each
    label is judged by curves that did not see it. `held_out`: those probabilities, float64 [n], by curve."""

    n: int
    platt: PlattCurve
    isotonic: IsotonicCurve
    brier: dict[str, float]
    ece: dict[str, float]
    held_out: dict[str, np.ndarray]


def fit(scores: np.ndarray, true: np.ndarray, weights: np.ndarray | None, *, falling: bool = False) -> Fitted:
    """Fit both curves. scores: float32 [n]; true: bool [n]; weights: float64 [n] or None; falling: low scores are true."""
    own = np.ones(len(scores)) if weights is None else np.asarray(weights, np.float64) / np.mean(weights)
    x, y = np.asarray(scores, np.float64), np.asarray(true, np.float64)
    held = {"platt": np.zeros(len(x)), "isotonic": np.zeros(len(x))}
    folds = np.empty(len(x), np.int64)
    shuffled = np.random.default_rng(0).permutation(len(x))
    folds[np.lexsort((shuffled, y))] = np.arange(len(x)) % FOLDS  # each fold has its share of both classes
    for fold in range(FOLDS):
        test, train = folds == fold, folds != fold
        if test.any() and train.any():
            held["platt"][test] = fit_platt(x[train], y[train], own[train])(x[test])
            held["isotonic"][test] = fit_isotonic(x[train], y[train], own[train], falling=falling)(x[test])
    return Fitted(
        n=len(x),
        platt=fit_platt(x, y, own),
        isotonic=fit_isotonic(x, y, own, falling=falling),
        brier={name: float(np.average((p - y) ** 2, weights=own)) for name, p in held.items()},
        ece={name: calibration_error(p, y, own) for name, p in held.items()},
        held_out=held,
    )


def fit_platt(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> PlattCurve:
    """Platt 1999 with the damped Newton method of Lin, Lin and Weng 2007 (Machine Learning 68, 267-276), which keeps the
    targets off 0 and 1, so that separable labels have a finite answer. x, y (0 or 1), weights: float64 [n]."""
    positive, negative = float(weights[y > 0].sum()), float(weights[y <= 0].sum())
    target = np.where(y > 0, (positive + 1) / (positive + 2), 1 / (negative + 2))
    centre, spread = float(np.average(x, weights=weights)), float(x.std()) or 1.0
    z = (x - centre) / spread
    a, b = 0.0, float(np.log((positive + 1) / (negative + 1)))

    def loss(a: float, b: float) -> float:
        f = a * z + b
        return float(np.sum(weights * (np.logaddexp(0.0, f) - target * f)))

    value = loss(a, b)
    for _ in range(_ITERATIONS):
        p = sigmoid(a * z + b)
        error, curvature = weights * (p - target), weights * p * (1 - p)
        gradient = np.array([np.sum(error * z), np.sum(error)])
        if np.abs(gradient).max() < 1e-9 * len(x):
            break
        hessian = np.array(
            [[np.sum(curvature * z * z), np.sum(curvature * z)], [np.sum(curvature * z), np.sum(curvature)]]
        )
        step = np.linalg.solve(hessian + 1e-12 * np.eye(2), -gradient)
        size = 1.0
        while size > 1e-10:
            further = loss(a + size * step[0], b + size * step[1])
            if further < value + 1e-4 * size * float(gradient @ step):
                break
            size /= 2
        else:
            break
        a, b, value = a + size * float(step[0]), b + size * float(step[1]), further
    return PlattCurve(a / spread, b - a * centre / spread)


def fit_isotonic(x: np.ndarray, y: np.ndarray, weights: np.ndarray, *, falling: bool = False) -> IsotonicCurve:
    """Least squares under monotony, by pooling adjacent violators. Equal scores are one point."""
    if falling:
        turned = fit_isotonic(-x, y, weights)
        return IsotonicCurve(-turned.scores[::-1], turned.probabilities[::-1])
    points, inverse = np.unique(x, return_inverse=True)
    mass = np.bincount(inverse, weights)
    means = np.bincount(inverse, weights * y) / mass
    blocks: list[tuple[float, float, int, int]] = []  # mean, mass, first point, last point
    for position, (mean, own) in enumerate(zip(means.tolist(), mass.tolist(), strict=True)):
        block = (mean, own, position, position)
        while blocks and blocks[-1][0] >= block[0]:
            before = blocks.pop()
            total = before[1] + block[1]
            block = ((before[0] * before[1] + block[0] * block[1]) / total, total, before[2], block[3])
        blocks.append(block)
    knots = [(points[end], mean) for mean, _, first, last in blocks for end in sorted({first, last})]
    return IsotonicCurve(np.array([score for score, _ in knots]), np.array([mean for _, mean in knots]))


def calibration_error(probabilities: np.ndarray, true: np.ndarray, weights: np.ndarray) -> float:
    """Expected calibration error over `BINS` bins of equal numbers of labels: the mean of |predicted - seen|."""
    error = 0.0
    for part in np.array_split(np.argsort(probabilities, kind="stable"), BINS):
        own = weights[part]
        if len(part):
            error += abs(float(np.sum(own * (probabilities[part] - true[part]))))
    return error / float(weights.sum())
