"""What compiling a policy needs of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import numpy as np


class TextEncoder(Protocol):
    """A model that turns texts into vectors."""

    name: str
    dim: int
    logit_scale: float
    logit_bias: float | None
    score_kind: Literal["softmax", "sigmoid"]
    fingerprint: dict[str, Any]

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray: ...

    def count_truncated(self, texts: Sequence[str]) -> int: ...
