"""Spherical k-means on a hash-chosen sample, and the nearest centroid of each row: the same whatever the shards."""

from __future__ import annotations

import numpy as np

_BLOCK = 1024
_CENTROIDS = 8192  # per product, so that its result stays small
_SUMMED = 65_536  # rows in float64 at once
#: A row whose two best centroids are this near to each other is assigned again in float64.
_CLOSE = 1e-5


def nearest_centroids(vectors: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """int64 [n]: the centroid with the highest dot product, the first of equal ones.

    vectors: float [n, d]; centroids: float32 [k, d]. Products are float32 in blocks of one shape; where the two best are
    within 1e-5 they are compared in float64, so that the answer does not depend on how the rows were cut.
    """
    n = len(vectors)
    nearest = np.zeros(n, np.int64)
    block = np.zeros((_BLOCK, centroids.shape[1]), np.float32)
    for start in range(0, n, _BLOCK):
        size = min(_BLOCK, n - start)
        block[:size] = vectors[start : start + size]
        block[size:] = 0.0
        best = np.full((_BLOCK, 1), -np.inf, np.float32)
        second = best.copy()
        at = np.zeros(_BLOCK, np.int64)
        for first in range(0, len(centroids), _CENTROIDS):
            products = block @ centroids[first : first + _CENTROIDS].T
            place = products.argmax(axis=1)
            top = np.take_along_axis(products, place[:, None], 1)
            np.put_along_axis(products, place[:, None], -np.inf, 1)
            runner_up = products.max(axis=1, keepdims=True)
            better = (top > best).ravel()
            second = np.where(better[:, None], np.maximum(best, runner_up), np.maximum(second, top))
            at[better] = place[better] + first
            best = np.maximum(best, top)
        nearest[start : start + size] = at[:size]
        scale = np.abs(best[:size]).ravel() + 1.0
        for row in np.flatnonzero((best - second)[:size].ravel() <= _CLOSE * scale).tolist():
            nearest[start + row] = _exact(np.asarray(vectors[start + row], np.float64), centroids)
    return nearest


def _exact(vector: np.ndarray, centroids: np.ndarray) -> int:
    rough = centroids @ vector.astype(np.float32)
    close = np.flatnonzero(rough >= rough.max() - 1e-3 * (abs(float(rough.max())) + 1.0))
    return int(close[np.vecdot(centroids[close].astype(np.float64), vector).argmax()])


def fit_centroids(sample: np.ndarray, k: int, iterations: int = 10) -> np.ndarray:
    """float32 [k, d], unit norm: spherical k-means (Dhillon & Modha 2001) from the sample's first k rows.

    sample: float [m, d], m >= k, in an order that does not depend on shards (that of a seeded hash of the uid).
    An empty cluster keeps its centroid.
    """
    centroids = _unit(sample[:k].astype(np.float64)).astype(np.float32)
    for _ in range(iterations):
        labels = nearest_centroids(sample, centroids)
        sums = np.zeros(centroids.shape, np.float64)
        order = np.argsort(labels, kind="stable")
        for start in range(0, len(order), _SUMMED):
            part = order[start : start + _SUMMED]
            present, starts = np.unique(labels[part], return_index=True)
            sums[present] += np.add.reduceat(sample[part].astype(np.float64), starts, axis=0)
        moved = centroids.copy()
        filled = np.unique(labels)
        moved[filled] = _unit(sums[filled]).astype(np.float32)
        if np.array_equal(moved, centroids):
            break
        centroids = moved
    return centroids


def _unit(rows: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norms == 0, 1.0, norms)
