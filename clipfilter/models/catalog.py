"""Which models there are, which of them are on this machine, and fetching one for later use without a network."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from clipfilter.errors import RefusedError

#: Kinds of names that cannot be listed, with what they mean.
OTHER_NAMES = (
    ("nano=/path/x.safetensors", "nano's own architecture with weights from `clipfilter train`"),
    ("ARCH=/path/checkpoint", "a local file for one of open_clip's architectures"),
    ("hf-hub:ORG/NAME", "a hub repository with open_clip_config.json, or hf-hub:/folder, its copy"),
    ("hf:ORG/NAME", "a CLIPModel or SiglipModel of transformers, or hf:/folder, its copy"),
    ("onnx:DIR", "a folder written by `clipfilter models export`"),
)


@dataclass(frozen=True)
class ModelEntry:
    """One name that `load_encoder` takes, and what is known of it without its weights.

    dim: numbers of an embedding. image_size: side of the square input in pixels. context_length: tokens of a text.
    activation: "gelu" or "quick_gelu", None for nano. score_kind: "softmax" or "sigmoid". source: where its weights come
    from (a hub repository, a URL, "bundled"). tokenizer: the hub repository of its tokenizer, None for the bundled ones.
    cached: whether weights and tokenizer are on this machine.
    """

    name: str
    dim: int
    image_size: int
    context_length: int
    activation: str | None
    score_kind: str
    source: str
    tokenizer: str | None
    cached: bool

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def list_models() -> list[ModelEntry]:
    """nano, then every architecture/tag of open_clip, by name. No model is built and no network is asked."""
    from clipfilter.models._torch import torch_with_torchvision

    torch_with_torchvision()
    import open_clip

    return [_nano(), *(_entry(architecture, tag) for architecture, tag in sorted(open_clip.list_pretrained()))]


def find_model(pattern: str) -> list[ModelEntry]:
    """The models whose name contains `pattern`, or matches it as a shell pattern; case does not matter."""
    wanted = pattern.lower()
    wild = any(character in wanted for character in "*?[")
    return [
        entry
        for entry in list_models()
        if (fnmatch.fnmatchcase(entry.name.lower(), wanted) if wild else wanted in entry.name.lower())
    ]


def download_model(name: str) -> Path:
    """Fetch everything `load_encoder(name)` reads into the caches; returns the weights (for `hf:`, their folder).

    Raises RefusedError where they cannot be had.
    """
    from clipfilter.models._torch import torch_with_torchvision

    torch_with_torchvision()
    from clipfilter.models import hub, huggingface, nano, openclip
    from clipfilter.models.tokenizer import open_clip_tokenizer

    if name == "nano" or name.startswith("nano@"):
        nano.check_edition(name)
        return nano.WEIGHTS
    if name.startswith(huggingface.PREFIX) and not hub.is_folder(name.removeprefix(huggingface.PREFIX)):
        folder = huggingface.fetch_repository(name.removeprefix(huggingface.PREFIX))
        if not huggingface.weight_files(folder):
            raise RefusedError(
                f"{name} has no weights that clipfilter can read ({', '.join(huggingface.WEIGHTS[::2])})"
            )
        return folder
    local = "=" in name or name.startswith("onnx:") or (":" in name and hub.is_folder(name.partition(":")[2]))
    if local:
        raise RefusedError(f"{name} is on this machine already: there is nothing to download")
    source = openclip.find_source(name)
    open_clip_tokenizer(source.config["text_cfg"], source.folder)
    if source.config["text_cfg"].get("hf_model_name"):
        openclip.text_tower_config(source)
    return source.weights


def _nano() -> ModelEntry:
    from clipfilter.models.nano import bundled_config
    from clipfilter.models.nano.network import class_dim

    config = bundled_config()
    size, length = int(config["preprocess"]["size"]), int(config["context_length"])
    dim = int(config["network"]["caption_dim"]) + class_dim(config["network"])
    return ModelEntry("nano", dim, size, length, None, "softmax", "bundled", None, True)


def _entry(architecture: str, tag: str) -> ModelEntry:
    import open_clip

    from clipfilter.models import openclip

    config = open_clip.get_model_config(architecture)
    record = open_clip.get_pretrained_cfg(architecture, tag)
    text = config["text_cfg"]
    size = config["vision_cfg"].get("image_size", 224)
    quick = record.get("quick_gelu", config.get("quick_gelu", False))
    tokenizer = text.get("hf_tokenizer_name")
    cached = openclip.cached_weights(record) is not None and all(_cached_files(text))
    return ModelEntry(
        name=f"{architecture}/{tag}",
        dim=int(config["embed_dim"]),
        image_size=int(size[0] if isinstance(size, list) else size),
        context_length=int(text.get("context_length", open_clip.tokenizer.DEFAULT_CONTEXT_LENGTH)),
        activation="quick_gelu" if quick else "gelu",
        score_kind="sigmoid" if config.get("init_logit_bias") is not None else "softmax",
        source=str(record.get("hf_hub", "")).rpartition("/")[0] or str(record.get("url", "")),
        tokenizer=tokenizer,
        cached=cached,
    )


def _cached_files(text: dict[str, Any]) -> Iterator[bool]:
    """For each further repository a model needs, whether it is in the cache."""
    from clipfilter.models import hub
    from clipfilter.models.tokenizer import FILES

    if text.get("hf_tokenizer_name"):
        yield any(hub.cached(text["hf_tokenizer_name"], file) is not None for file in FILES)
    if text.get("hf_model_name"):
        yield hub.cached(text["hf_model_name"], "config.json") is not None
