"""The published heads give the numbers that the original code gives (needs the published files)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from clipfilter.models.heads import HEADS, Head, load_head
from tests.support.engine import SHARED

ORIGINALS = SHARED / "heads"
DIMS = {"ViT-L-14/openai": 768, "ViT-B-32/openai": 512, "ViT-B-16/openai": 512}

pytestmark = pytest.mark.skipif(
    not ORIGINALS.is_dir(), reason="the published heads are not in CLIPFILTER_SHARED/heads (or ../shared/heads)"
)


@pytest.fixture(autouse=True)
def local(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPFILTER_HEADS", str(ORIGINALS))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "heads-cache"))


def load(name: str, model: str) -> Head:
    return load_head(name, {"model": model}, DIMS[model])


def random_rows(dim: int) -> np.ndarray:
    """The input of the golden values, float64 [4096, dim]."""
    x = np.random.default_rng(0).standard_normal((4096, dim))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("ViT-L-14/openai", [3.99617, 2.24010, 3.63436, 3.83667]),
        ("ViT-B-32/openai", [1.95856, 3.85755, 2.30427, 2.29078]),
        ("ViT-B-16/openai", [2.26163, 1.45208, 2.90280, 3.27072]),
    ],
)
def test_aesthetic_v1(model: str, expected: list[float]) -> None:
    head = load("laion-aesthetic-v1", model)
    assert head.scores(random_rows(head.dim)[:4].astype(np.float32)) == pytest.approx(expected, abs=1e-5)
    assert head.linear is not None


def test_aesthetic_v1_orders_the_ratings() -> None:
    head = load("laion-aesthetic-v1", "ViT-L-14/openai")
    folder = ORIGINALS / "aesthetic_rating_embeddings" / "vit_l_14_embeddings"
    means = [float(head.scores(np.load(folder / f"rating{rating}.npy")).mean()) for rating in range(10)]
    expected = [-2.458, -0.138, 1.895, 3.585, 5.100, 6.470, 7.787, 9.048, 10.226, 11.304]
    assert means == pytest.approx(expected, abs=6e-4)


def test_aesthetic_v2_is_one_affine_map() -> None:
    import torch

    head = load("laion-aesthetic-v2", "ViT-L-14/openai")
    assert head.linear is not None
    state = torch.load(ORIGINALS / "sac+logos+ava1-l14-linearMSE.pth", weights_only=True, map_location="cpu")
    x = torch.from_numpy(random_rows(768))
    layers = x
    for number in (0, 2, 4, 6, 7):  # between them the original has dropout, which does nothing at inference
        layers = layers @ state[f"layers.{number}.weight"].double().T + state[f"layers.{number}.bias"].double()
    weight, bias = head.linear
    np.testing.assert_allclose(head.scores(x.float().numpy()), layers[:, 0], atol=1e-5)
    np.testing.assert_allclose(x.numpy() @ weight + bias, layers[:, 0], atol=1e-5)


@pytest.mark.parametrize(
    ("model", "file"),
    [("ViT-L-14/openai", "clip_autokeras_binary_nsfw"), ("ViT-B-32/openai", "clip_autokeras_nsfw_b32")],
)
@pytest.mark.parametrize(("dtype", "key"), [(np.float32, "y64"), (np.float16, "y16")])
def test_nsfw(model: str, file: str, dtype: type, key: str) -> None:
    expected = json.loads((ORIGINALS / "nsfw_reference_outputs.json").read_text())[file][key]
    head = load("laion-nsfw", model)
    scores = head.scores(random_rows(head.dim).astype(dtype))
    assert np.abs(scores[:64] - np.array(expected)).max() < 1e-5
    assert head.linear is None


def test_nsfw_without_its_vocabularies_is_wrong() -> None:
    """The trap: the inputs that are read as words matter, so the test above would notice if they were not."""
    from dataclasses import replace

    head = load("laion-nsfw", "ViT-L-14/openai")
    assert sorted(head.network.vocabularies) == [180, 316, 413, 440, 644]  # type: ignore[union-attr]
    assert sorted(load("laion-nsfw", "ViT-B-32/openai").network.vocabularies) == [92, 133, 312]  # type: ignore[union-attr]
    naive = replace(head, network=replace(head.network, vocabularies={}))  # type: ignore[arg-type, type-var]
    rows = random_rows(768)[:64].astype(np.float16)
    assert np.abs(naive.scores(rows) - head.scores(rows)).max() > 0.01


@pytest.mark.parametrize("model", ["ViT-L-14/openai", "ViT-B-32/openai"])
def test_violence_is_positive_where_row_1_wins(model: str) -> None:
    head = load("violence", model)
    rows = random_rows(head.dim).astype(np.float16)
    prompts = np.load(ORIGINALS / HEADS["violence"].originals[model].file)
    wins = (rows.astype(np.float64) @ prompts.T.astype(np.float64)).argmax(axis=1) == 1
    assert 100 < wins.sum() < 4000
    assert ((head.scores(rows) > 0) == wins).all()
    assert head.linear is not None


def test_the_cache_serves_once_the_originals_are_gone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = random_rows(512)[:100].astype(np.float16)
    first = load("laion-nsfw", "ViT-B-32/openai")
    monkeypatch.setenv("CLIPFILTER_HEADS", str(tmp_path))
    again = load("laion-nsfw", "ViT-B-32/openai")
    assert again.sha256 == first.sha256 == HEADS["laion-nsfw"].originals["ViT-B-32/openai"].sha256
    np.testing.assert_array_equal(again.scores(rows), first.scores(rows))
