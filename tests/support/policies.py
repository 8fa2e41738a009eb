"""A text encoder for policy tests: every text has its own fixed random direction."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np


class FakeEncoder:
    """Deterministic unit vectors seeded by the text's hash; counts what it was asked."""

    def __init__(
        self,
        dim: int = 64,
        logit_scale: float = 20.0,
        score_kind: str = "softmax",
        logit_bias: float | None = None,
        weights_sha256: str = "a" * 64,
    ) -> None:
        self.name = "fake"
        self.dim = dim
        self.logit_scale = logit_scale
        self.logit_bias = logit_bias
        self.score_kind = score_kind
        self.fingerprint: dict[str, Any] = {
            "model": "fake",
            "weights_sha256": weights_sha256,
            "preprocess": {"size": 8},
        }
        self.asked: list[str] = []

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        self.asked += texts
        return np.stack([self.vector(text) for text in texts]).astype(np.float32)

    def vector(self, text: str) -> np.ndarray:
        return text_vector(text, self.dim)

    def count_truncated(self, texts: Sequence[str]) -> int:
        return sum(len(text.split()) > 20 for text in texts)


@cache
def text_vector(text: str, dim: int) -> np.ndarray:
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    vector = np.random.default_rng(seed).standard_normal(dim)
    return vector / np.linalg.norm(vector)


def embeddings(rows: int, dim: int = 64, seed: int = 0) -> np.ndarray:
    """float16 [rows, dim] unit-norm random embeddings."""
    values = np.random.default_rng(seed).standard_normal((rows, dim))
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float16)
