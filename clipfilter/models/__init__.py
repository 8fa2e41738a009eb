"""Load an encoder (a model that puts images and texts into one vector space) by its name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

from clipfilter.errors import RefusedError

if TYPE_CHECKING:
    import numpy as np

    from clipfilter.images.preprocess import PreprocessConfig

__all__ = ["DEFAULT_MODEL", "Encoder", "load_encoder"]

DEFAULT_MODEL = "nano"


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


def load_encoder(
    name: str,
    *,
    device: str = "cpu",
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32",
    threads: int | None = None,
) -> Encoder:
    """Load the model called `name` onto `device`, in eval mode.

    name: `nano` (bundled; `nano@1` pins its edition), `ARCH/TAG` as open_clip writes it
    (`ViT-B-32/laion2b_s34b_b79k`), or `ARCH=/path/to/checkpoint.safetensors` (also .pt, .pth, .bin) for a local
    open_clip checkpoint.
    threads: CPU threads of torch's operators in this process; None leaves torch's choice.

    Raises RefusedError when the model is unknown, cannot be had (no network), or its file does not fit.
    """
    # One branch per kind of name; a further kind is one more module and one more branch.
    if name == "nano" or name.startswith("nano@"):
        from clipfilter.models.nano import load_nano

        return load_nano(name, device=device, dtype=dtype, threads=threads)
    if "=" in name or "/" in name or _looks_like_open_clip(name):
        from clipfilter.models.openclip import load_openclip

        return load_openclip(name, device=device, dtype=dtype, threads=threads)
    raise RefusedError(
        f"unknown model {name!r}: use nano, an open_clip name with its weights (ViT-B-32/openai), "
        "or a local checkpoint (ViT-B-32=/path/to/checkpoint.safetensors)"
    )


def _looks_like_open_clip(name: str) -> bool:
    return "-" in name or name.upper().startswith("RN")
