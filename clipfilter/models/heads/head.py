"""A loaded head: scores of embeddings, the same whatever the number of rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from clipfilter.models.heads.network import Layers, SafetyChecker

_BLOCK = 1024


@dataclass(frozen=True)
class Head:
    """One head for one model's embeddings.

    linear: (float32 [d], bias) where the head is an affine map, so that it can be a column of a larger product;
    None otherwise. sha256: of the file it comes from, as published.
    """

    name: str
    sha256: str
    model: str
    network: Layers | SafetyChecker
    linear: tuple[np.ndarray, float] | None

    @classmethod
    def of(cls, name: str, sha256: str, model: str, network: Layers | SafetyChecker) -> Head:
        folded = network.folded()
        linear = None if folded is None else (folded[0].astype(np.float32), folded[1])
        return cls(name, sha256, model, network, linear)

    @property
    def dim(self) -> int:
        return self.network.dim

    def exact(self, embeddings: np.ndarray) -> np.ndarray:
        """Scores in float64 of n unit-norm embeddings, float16 or float32 [n, d]; all must be finite.

        Rounding may depend on n; call it with blocks of one size.
        """
        x = embeddings.astype(np.float64)
        if self.linear is not None:
            return np.asarray(x @ self.linear[0].astype(np.float64) + self.linear[1])
        return self.network.exact(x)

    def scores(self, embeddings: np.ndarray) -> np.ndarray:
        """Scores float32 [n] of n unit-norm embeddings, float16 or float32 [n, d].

        NaN for a row that is all zeros or not finite. Computed in float64 in blocks of 1024 rows, the last one filled
        up with zeros, so that a row's score does not depend on how many rows there are.
        """
        if embeddings.ndim != 2 or embeddings.shape[1] != self.dim or embeddings.dtype.kind != "f":
            raise ValueError(f"expected float [n, {self.dim}], got {embeddings.dtype} {list(embeddings.shape)}")
        result = np.empty(len(embeddings), dtype=np.float32)
        for start in range(0, len(embeddings), _BLOCK):
            rows = embeddings[start : start + _BLOCK]
            usable = np.isfinite(rows).all(axis=1) & rows.any(axis=1)
            block = np.zeros((_BLOCK, self.dim), dtype=embeddings.dtype)
            block[: len(rows)][usable] = rows[usable]
            result[start : start + _BLOCK] = np.where(usable, self.exact(block)[: len(rows)], np.nan)
        return result
