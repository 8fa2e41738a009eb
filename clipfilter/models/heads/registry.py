"""The published heads that a policy can name: what each is, on which embeddings, where it comes from, its sha256.

A name stands for the same files forever: whatever is corrected or trained anew gets a new name.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import quote

from clipfilter.errors import RefusedError

Format = Literal["linear", "affine-chain", "rows", "autokeras"]

FILE = "file:"  # prefix of anybody's own head


@dataclass(frozen=True)
class Embeddings:
    """OpenAI's weights of one architecture, by every name and file under which they are loaded."""

    dim: int
    names: tuple[str, ...]
    weights_sha256: str  # of OpenAI's own .pt, as `ARCH-quickgelu=/path/to/file.pt` loads it


_L14, _B32, _B16 = "ViT-L-14/openai", "ViT-B-32/openai", "ViT-B-16/openai"


def _openai(architecture: str, dim: int, transformers: str, timm: str, weights_sha256: str) -> Embeddings:
    names = (
        f"{architecture}/openai",
        f"{architecture}-quickgelu/openai",
        f"hf:openai/{transformers}",
        f"hf-hub:timm/{timm}",
    )
    return Embeddings(dim, names, weights_sha256)


EMBEDDINGS = {
    _L14: _openai(
        "ViT-L-14", 768, "clip-vit-large-patch14", "vit_large_patch14_clip_224.openai",
        "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
    ),
    _B32: _openai(
        "ViT-B-32", 512, "clip-vit-base-patch32", "vit_base_patch32_clip_224.openai",
        "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
    ),
    _B16: _openai(
        "ViT-B-16", 512, "clip-vit-base-patch16", "vit_base_patch16_clip_224.openai",
        "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Original:
    """A file as it was published."""

    file: str
    sha256: str
    format: Format
    url: str


@dataclass(frozen=True)
class PublishedHead:
    """One name, its file for each model, and what its score says."""

    originals: dict[str, Original]  # by model
    score: Literal["rating", "probability", "margin"]
    meaning: str
    thresholds: str
    licence: str


_AESTHETIC = "https://raw.githubusercontent.com/LAION-AI/aesthetic-predictor/main/"
_AESTHETIC_2 = "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/"
_SAFETY = "https://raw.githubusercontent.com/LAION-AI/CLIP-based-NSFW-Detector/main/"


def _files(format: Format, folder: str, *files: tuple[str, str, str]) -> dict[str, Original]:
    """By model, of (model, file, sha256)."""
    return {model: Original(file, sha256, format, folder + quote(file)) for model, file, sha256 in files}


HEADS = {
    "laion-aesthetic-v1": PublishedHead(
        _files(
            "linear", _AESTHETIC,
            (_L14, "sa_0_4_vit_l_14_linear.pth", "2cd4e60f4f24ae3bcd57b847b13c1f3ba27edc28cc1a7f9ce74ee9f421243cba"),
            (_B32, "sa_0_4_vit_b_32_linear.pth", "c7b14cead230694acc7b9447974d3cad78003c72da032e402a303b6c2429e85f"),
            (_B16, "sa_0_4_vit_b_16_linear.pth", "8ad3923d7ecf019df20ecd2ab5542a3075fbba0278d239c0371345f3d7fcbde0"),
        ),
        score="rating",
        meaning="how much people like such pictures, 0 to 10",
        thresholds="reject below 7 or 8",
        licence="MIT",
    ),
    "laion-aesthetic-v2": PublishedHead(
        _files(
            "affine-chain", _AESTHETIC_2,
            (_L14, "sac+logos+ava1-l14-linearMSE.pth", "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0"),
        ),
        score="rating",
        meaning="how much people like such pictures, about 1 to 10",
        thresholds="reject below 4.5 to 6.5",
        licence="Apache-2.0",
    ),
    "laion-nsfw": PublishedHead(
        _files(
            "autokeras", _SAFETY,
            (_L14, "clip_autokeras_binary_nsfw.zip", "905520bb0336accc73ee282c605d926aef90cf14248889d44b9cee50eef71f8a"),
            (_B32, "clip_autokeras_nsfw_b32.zip", "78715ab9d64485167e8c9ade3b8e6761a17a16c24d114bd47431ac1dab46462b"),
        ),
        score="probability",
        meaning="probability that the picture is not safe for work, 0 to 1",
        thresholds="review above 0.5, reject above 0.9",
        licence="MIT",
    ),
    "violence": PublishedHead(
        _files(
            "rows", _SAFETY,
            (_L14, "violence_detection_vit_l_14.npy", "cc08f81ef50b1ef71452ddc87285fe6fbbc01b6fe8f8b8c24482c386ef2ab7e1"),
            (_B32, "violence_detection_vit_b_32.npy", "76909cca3e77abbbb21313895756773a9c6fb26c9cc743f3ef0625f025741982"),
        ),
        score="margin",
        meaning="similarity to the learned prompt of violence minus that to its opposite; positive is violent",
        thresholds="review above 0",
        licence="MIT",
    ),
}  # fmt: skip


def check_name(name: str) -> None:
    """Refuse a name that is neither a published head nor `file:/path`, with the nearest known name."""
    if name in HEADS or (name.startswith(FILE) and len(name) > len(FILE)):
        return
    close = difflib.get_close_matches(name[:64].lower(), HEADS, n=1, cutoff=0.6)
    raise RefusedError(
        f"there is no head {name[:60]!r} (heads: {', '.join(HEADS)}; or file:/path/to/head.safetensors)"
        + (f"; did you mean {close[0]!r}?" if close else "")
    )


def same_embeddings(model: str, fingerprint: dict[str, Any]) -> bool:
    """Whether the model with this fingerprint makes the embeddings that heads for `model` were trained on.

    OpenAI's weights are known by their names and by the hash of OpenAI's own file, and only count together with the
    activation they were trained with. Any other `model` must be the fingerprint's name for it.
    """
    named = str(fingerprint.get("model"))
    known = EMBEDDINGS.get(model)
    if known is None:
        return named == model
    if fingerprint.get("activation", "quick_gelu") != "quick_gelu":
        return False
    return named in known.names or fingerprint.get("weights_sha256") == known.weights_sha256
