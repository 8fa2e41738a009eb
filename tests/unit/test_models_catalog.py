"""The list of models agrees with what loads, knows the caches, and builds nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from clipfilter.errors import RefusedError
from clipfilter.models import catalog, load_encoder
from clipfilter.models._torch import torch_with_torchvision

torch_with_torchvision()

import open_clip  # noqa: E402
from huggingface_hub import constants  # noqa: E402


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path / "hub"


def put(cache: Path, repo: str, file: str, content: bytes = b"x") -> Path:
    """A file in the hub's cache as its client leaves it."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    commit = "0" * 40
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text(commit)
    path = folder / "snapshots" / commit / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_every_name_is_listed_once_and_no_model_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was built")

    monkeypatch.setattr(open_clip, "create_model", forbidden)
    entries = catalog.list_models()
    names = [entry.name for entry in entries]
    assert names[0] == "nano"
    assert len(set(names)) == len(names)
    assert set(names[1:]) == {f"{architecture}/{tag}" for architecture, tag in open_clip.list_pretrained()}
    known = {entry.name: entry for entry in entries}
    siglip = known["ViT-SO400M-14-SigLIP-384/webli"]
    assert (siglip.dim, siglip.image_size, siglip.context_length, siglip.score_kind) == (1152, 384, 64, "sigmoid")
    assert known["ViT-B-32/openai"].activation == "quick_gelu"
    assert known["ViT-L-14-336/openai"].image_size == 336
    assert known["roberta-ViT-B-32/laion2b_s12b_b32k"].activation == "quick_gelu"
    assert known["xlm-roberta-base-ViT-B-32/laion5b_s13b_b90k"].tokenizer == "xlm-roberta-base"


def test_nano_is_what_the_list_says() -> None:
    entry, encoder = catalog.list_models()[0], load_encoder("nano")
    assert (entry.dim, entry.context_length) == (encoder.dim, encoder.context_length)
    assert (entry.image_size, entry.score_kind) == (encoder.preprocess.size, encoder.score_kind)
    assert catalog.download_model("nano").is_file()


def test_models_are_found_by_part_or_pattern_of_their_name() -> None:
    assert [entry.name for entry in catalog.find_model("NANO")] == ["nano"]
    assert all("siglip2" in entry.name.lower() for entry in catalog.find_model("siglip2"))
    assert len(catalog.find_model("siglip2")) > 10
    assert {entry.name for entry in catalog.find_model("RN50/*")} == {"RN50/openai", "RN50/yfcc15m", "RN50/cc12m"}
    assert catalog.find_model("no-such-model") == []


def test_the_cache_is_looked_into(cache: Path) -> None:
    def cached() -> set[str]:
        return {entry.name for entry in catalog.list_models() if entry.cached}

    assert cached() == {"nano"}
    weights = put(cache, "timm/vit_base_patch32_clip_224.openai", "open_clip_model.safetensors")
    assert cached() == {"nano", "ViT-B-32/openai", "ViT-B-32-quickgelu/openai"}
    assert catalog.download_model("ViT-B-32/openai") == weights
    put(cache, "timm/ViT-B-16-SigLIP", "open_clip_model.safetensors")
    assert "ViT-B-16-SigLIP/webli" not in cached()  # its tokenizer is missing
    put(cache, "timm/ViT-B-16-SigLIP", "tokenizer.json")
    assert "ViT-B-16-SigLIP/webli" in cached()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("ViT-B-32/openai", "cannot be downloaded"),
        ("ViT-B-32/nonsense", "no weights called"),
        ("hf:openai/clip-vit-base-patch32", "cannot be had"),
        ("hf-hub:laion/model", "cannot be had"),
        ("ViT-B-32=/some/file.pt", "on this machine already"),
        ("onnx:/folder", "on this machine already"),
        ("hf:/folder", "on this machine already"),
        ("nano@99", "bundles nano@"),
        ("nanoo", "no architecture 'nanoo'"),
    ],
)
def test_what_cannot_be_downloaded_is_refused(name: str, says: str) -> None:
    with pytest.raises(RefusedError, match=says):
        catalog.download_model(name)


def test_the_list_is_quick() -> None:
    import time

    catalog.list_models()
    began = time.process_time()
    catalog.list_models()
    assert time.process_time() - began < 2
