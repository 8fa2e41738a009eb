"""What the engine and the policies need of a model, whatever it is built from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import numpy as np

    from clipfilter.images import PreprocessConfig


class Encoder(Protocol):
    """What the engine and the policies need of a model, whatever it is built from."""

    name: str
    dim: int
    context_length: int  # tokens, the special ones included
    preprocess: PreprocessConfig
    logit_scale: float  # already exponentiated: logits are logit_scale * cosine (+ logit_bias)
    logit_bias: float | None
    score_kind: Literal["softmax", "sigmoid"]
    fingerprint: dict[str, Any]  # JSON; two encoders with equal fingerprints give the same embeddings

    def encode_images(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 [n, 3, size, size] as `images.preprocess.prepare` makes it -> float32 [n, dim], unit norm."""

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        """n texts -> float32 [n, dim], unit norm; texts beyond the context are truncated."""

    def count_truncated(self, texts: Sequence[str]) -> int:
        """How many of `texts` are longer than the context and lose their end."""
