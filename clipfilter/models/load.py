"""Load an encoder (a model that puts images and texts into one vector space) by its name."""

from __future__ import annotations

import os

from clipfilter import defaults
from clipfilter.errors import RefusedError
from clipfilter.models.interface import Encoder

# libgomp reads this once, when torch is imported. Its threads spin between parallel regions for milliseconds by default;
# on a machine that does other work too they then spin while the one they wait for has no core. A tenth of a millisecond
# is as fast on an idle machine, and twice as fast on a busy one.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def load_encoder(
    name: str,
    *,
    device: str = "cpu",
    dtype: defaults.Dtype = "fp32",
    threads: int | None = None,
    compile: bool = False,
) -> Encoder:
    """Load the model called `name` onto `device`, in eval mode.

    name: one of
    - `nano` (bundled; `nano@3` pins its edition), or `nano=/path/to/weights.safetensors`;
    - `ARCH/TAG` as open_clip writes it (`ViT-B-32/laion2b_s34b_b79k`), or `ARCH=/path/to/checkpoint` for a local file
      (.safetensors, .pt, .pth, .bin; OpenAI's own archives too);
    - `hf-hub:ORG/NAME`, a repository with open_clip_config.json, or `hf-hub:/folder`, its copy;
    - `hf:ORG/NAME`, a CLIP or SigLIP model of transformers, or `hf:/folder`, its copy;
    - `onnx:DIR`, a folder written by `clipfilter models export`.

    threads: CPU threads of torch's operators in this process; None leaves torch's choice.
    compile: compile the towers with torch.compile (slow to load; the fingerprint says so).

    Raises RefusedError when the model is unknown, cannot be had (no network), or its file does not fit.
    """
    encoder = _load(name, device, dtype, threads)
    if compile:
        _compile(encoder)
    return encoder


def _load(name: str, device: str, dtype: str, threads: int | None) -> Encoder:
    # One branch per kind of name; a further kind is one more module and one more branch.
    if name == "nano" or name.startswith(("nano@", "nano=")):
        from clipfilter.models.nano import load_nano

        return load_nano(name, device=device, dtype=dtype, threads=threads)
    if name.startswith("onnx:"):
        from clipfilter.models.onnx import load_onnx

        return load_onnx(name, device=device, dtype=dtype, threads=threads)
    if name.startswith("hf:"):
        from clipfilter.models.huggingface import load_huggingface

        return load_huggingface(name, device=device, dtype=dtype, threads=threads)
    if "=" in name or "/" in name or _looks_like_open_clip(name):
        from clipfilter.models.openclip import load_openclip

        return load_openclip(name, device=device, dtype=dtype, threads=threads)
    raise RefusedError(
        f"unknown model {name!r}: use nano, an open_clip name with its weights (ViT-B-32/openai), a local checkpoint "
        "(ViT-B-32=/path/to/checkpoint.safetensors), or a repository (hf-hub:ORG/NAME, hf:ORG/NAME)"
    )


def _compile(encoder: Encoder) -> None:
    from clipfilter.models.encoder import TorchEncoder

    if not isinstance(encoder, TorchEncoder) or encoder.name.startswith("onnx:"):
        raise RefusedError(f"{encoder.name} runs outside of torch and cannot be compiled: load it without compile")
    encoder.compile()


def _looks_like_open_clip(name: str) -> bool:
    return name.startswith("hf-hub:") or "-" in name or "_" in name or name.upper().startswith("RN")
