"""Learned vectors: a concept given by directions in the embedding space, read from a safetensors file."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from clipfilter.errors import RefusedError
from clipfilter.models.heads import same_embeddings

MAX_BYTES = 64 * 1024 * 1024
MAX_ROWS = 1024
_TENSORS = ("positives", "negatives")


@dataclass(frozen=True)
class LearnedVectors:
    """positives: float32 [p, d], unit rows, at least one; negatives: float32 [q, d]. metadata: of the file's header."""

    positives: np.ndarray
    negatives: np.ndarray
    metadata: dict[str, str]

    def check_model(self, path: Path, fingerprint: dict[str, Any], dim: int) -> None:
        """Refuse another model's embeddings: of another size, or, where the header says `model` or `weights_sha256`,
        of other weights."""
        shown = str(fingerprint.get("model"))
        own = self.positives.shape[1]
        if own != dim:
            raise RefusedError(f"the vectors {path} have {own} numbers, but embeddings of {shown} have {dim}")
        weights, model = self.metadata.get("weights_sha256"), self.metadata.get("model")
        if weights is not None and weights != fingerprint.get("weights_sha256"):
            raise RefusedError(
                f"the vectors {path} are for the weights {weights[:12]}... of {model or 'a model'}, not {shown}"
            )
        if weights is None and model is not None and not same_embeddings(model, fingerprint):
            raise RefusedError(f"the vectors {path} are for embeddings of {model[:80]}, not of {shown}")


@lru_cache(maxsize=8)
def read_vectors(path: Path, sha256: str) -> LearnedVectors:
    """The vectors in this safetensors file: tensors `positives` and, where there are any, `negatives`.

    sha256: of the file, so that a changed file is read again. Raises RefusedError.
    """
    from safetensors import SafetensorError, safe_open

    try:
        if path.stat().st_size > MAX_BYTES:
            raise RefusedError(f"the vectors {path} hold more than {MAX_BYTES // 2**20} MiB")
        with safe_open(str(path), framework="numpy") as file:
            names = set(file.keys())
            strange = sorted(names - set(_TENSORS))
            if strange or "positives" not in names:
                what = f"holds {strange[0][:60]!r}" if strange else "lacks positives"
                raise RefusedError(f"the vectors {path} {what}; its tensors are positives and, optionally, negatives")
            for name in names:
                shape = file.get_slice(name).get_shape()
                if len(shape) != 2 or math.prod(shape) == 0 or shape[0] > MAX_ROWS:
                    raise RefusedError(f"{name} of the vectors {path} must be [1 to {MAX_ROWS}, d], not {shape}")
            tensors = {name: file.get_tensor(name) for name in names}
            metadata = dict(file.metadata() or {})
    except (SafetensorError, OSError, TypeError, ValueError) as error:
        raise RefusedError(f"the vectors {path} cannot be read: {str(error)[:200]}") from None
    positives = _unit(path, "positives", tensors["positives"])
    negatives = _unit(path, "negatives", tensors.get("negatives", np.zeros((0, positives.shape[1]))))
    if negatives.shape[1] != positives.shape[1]:
        raise RefusedError(f"positives and negatives of the vectors {path} have different lengths")
    return LearnedVectors(positives, negatives, metadata)


def _unit(path: Path, name: str, rows: np.ndarray) -> np.ndarray:
    """Rows of norm 1, float32; refused where that cannot be."""
    wide = rows.astype(np.float64)
    norms = np.linalg.norm(wide, axis=1, keepdims=True)
    if rows.dtype.kind != "f" or not (np.isfinite(norms) & (norms > 1e-6)).all():
        raise RefusedError(f"{name} of the vectors {path} must be finite floating-point rows that are not zero")
    return np.asarray(wide / norms, dtype=np.float32)
