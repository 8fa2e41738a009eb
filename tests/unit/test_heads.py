"""Heads: what they compute against plain definitions, their files, and every way to have none."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import pickle
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from clipfilter.errors import RefusedError
from clipfilter.models import heads
from clipfilter.models.heads import HEADS, Head, HeadFile, convert, load_head, read_head_file, registry, same_embeddings
from clipfilter.models.heads import load as loading

RNG = np.random.default_rng(3)
L14 = {"model": "ViT-L-14/openai", "weights_sha256": "f" * 64, "activation": "quick_gelu"}
MODEL = {"model": "some/model", "weights_sha256": "b" * 64}


def rows(n: int = 50, dim: int = 8, dtype: Any = np.float16, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((n, dim))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(dtype)


def mlp(widths: tuple[int, ...] = (8, 5, 3, 1), **metadata: str) -> HeadFile:
    tensors = {}
    for number, (inner, outer) in enumerate(itertools.pairwise(widths)):
        tensors[f"layers.{number}.weight"] = RNG.normal(size=(outer, inner)).astype("f4")
        tensors[f"layers.{number}.bias"] = RNG.normal(size=outer).astype("f4")
    usual = {
        "clipfilter_head": "1",
        "model": "some/model",
        "dim": str(widths[0]),
        "activation": "relu",
        "final": "none",
    }
    return HeadFile(tensors, usual | {"layers": ",".join(map(str, widths[1:]))} | metadata)


def checker(dim: int = 768) -> dict[str, np.ndarray]:
    return {
        "concept_embeds": RNG.normal(size=(17, dim)).astype("f4"),
        "concept_embeds_weights": RNG.uniform(0.0, 0.08, 17).astype("f4"),
        "special_care_embeds": RNG.normal(size=(3, dim)).astype("f4"),
        "special_care_embeds_weights": RNG.uniform(0.0, 0.05, 3).astype("f4"),
    }


def write(path: Path, content: HeadFile) -> str:
    content.write(path)
    return f"file:{path}"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CLIPFILTER_HEADS", raising=False)
    return tmp_path / "cache" / "clipfilter" / "heads"


# ---------------------------------------------------------------- what they compute


@pytest.mark.parametrize("activation", ["none", "relu", "tanh"])
@pytest.mark.parametrize("final", ["none", "sigmoid"])
@pytest.mark.parametrize("standardised", [False, True])
def test_layers_are_torchs(tmp_path: Path, activation: str, final: str, standardised: bool) -> None:
    content = mlp(activation=activation, final=final)
    x = torch.from_numpy(rows(70).astype(np.float64))
    inputs = x
    if standardised:
        content.tensors["input.mean"] = RNG.normal(size=8).astype("f4")
        content.tensors["input.scale"] = RNG.uniform(0.5, 2, 8).astype("f4")
        inputs = (x - torch.from_numpy(content.tensors["input.mean"])) / torch.from_numpy(
            content.tensors["input.scale"]
        )
    between = {"none": torch.nn.Identity(), "relu": torch.nn.ReLU(), "tanh": torch.nn.Tanh()}[activation]
    network = torch.nn.Sequential()
    for number in range(3):
        weight = torch.from_numpy(content.tensors[f"layers.{number}.weight"]).double()
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0]).double()
        layer.load_state_dict({"weight": weight, "bias": torch.from_numpy(content.tensors[f"layers.{number}.bias"])})
        network.extend(
            [layer, between if number < 2 else torch.nn.Sigmoid() if final == "sigmoid" else torch.nn.Identity()]
        )
    expected = network(inputs)[:, 0].detach().numpy()
    head = load_head(write(tmp_path / "h.safetensors", content), MODEL, 8)
    np.testing.assert_allclose(head.scores(rows(70)), expected, atol=2e-6)
    assert (head.linear is not None) == (activation == "none" and final == "none")
    if head.linear is not None:
        np.testing.assert_allclose(rows(70).astype(np.float64) @ head.linear[0] + head.linear[1], expected, atol=2e-6)


@pytest.mark.parametrize("activation", ["none", "relu"])
def test_a_score_does_not_depend_on_the_rows_around_it(tmp_path: Path, activation: str) -> None:
    head = load_head(write(tmp_path / "h.safetensors", mlp((64, 32, 1), activation=activation)), MODEL, 64)
    x = rows(2500, 64)
    whole = head.scores(x)
    assert whole.dtype == np.float32
    np.testing.assert_array_equal(head.scores(x[:1024]), whole[:1024])
    np.testing.assert_array_equal(head.scores(x[2048:]), whole[2048:])
    np.testing.assert_array_equal(head.scores(x[:1]), whole[:1])
    x[3], x[4, 1], x[5, 0] = 0, np.nan, np.inf
    damaged = head.scores(x)
    assert np.isnan(damaged[[3, 4, 5]]).all()
    np.testing.assert_array_equal(np.delete(damaged, [3, 4, 5]), np.delete(whole, [3, 4, 5]))
    assert head.scores(x[:0]).shape == (0,)
    with pytest.raises(ValueError, match=r"expected float \[n, 64\]"):
        head.scores(rows(3, 63))


def test_the_safety_checker_is_its_formula(tmp_path: Path) -> None:
    tensors = checker() | {"vision_model.layer.weight": np.zeros((4, 4), "f4")}  # as published: beside an image tower
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    head = load_head(f"file:{tmp_path / 'model.safetensors'}", L14, 768)
    x = rows(300, 768)
    expected, careful = [], 0
    for row in x.astype(np.float64):

        def above(kind: str, row: np.ndarray = row) -> list[float]:
            found = zip(tensors[f"{kind}_embeds"], tensors[f"{kind}_embeds_weights"], strict=True)
            return [row @ c.astype(float) / np.linalg.norm(c.astype(float)) / np.linalg.norm(row) - t for c, t in found]

        care = any(value > 0 for value in above("special_care"))
        careful += care
        expected.append(max(value + (0.01 if care else 0.0) for value in above("concept")))
    assert 20 < careful < 280
    np.testing.assert_allclose(head.scores(x), expected, atol=1e-6)
    assert head.linear is None


# ---------------------------------------------------------------- published formats, made up


def test_state_dicts_of_linear_layers(tmp_path: Path) -> None:
    one = torch.nn.Linear(8, 1)
    torch.save(one.state_dict(), tmp_path / "one.pth")
    chain = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Dropout(0.2), torch.nn.Linear(4, 1))
    torch.save({f"layers.{name}": value for name, value in chain.state_dict().items()}, tmp_path / "chain.pth")
    x = torch.from_numpy(rows(20, dtype=np.float32))
    for path, kind, network in (
        (tmp_path / "one.pth", "linear", one),
        (tmp_path / "chain.pth", "affine-chain", chain.eval()),
    ):
        head = Head.of("h", "0" * 64, "m", convert(path, kind, "m").network("h"))  # type: ignore[arg-type]
        np.testing.assert_allclose(head.scores(x.numpy()), network(x)[:, 0].detach().numpy(), atol=1e-6)
        assert head.linear is not None


def test_two_rows_are_their_difference(tmp_path: Path) -> None:
    prompts = RNG.normal(size=(2, 8)).astype("f4")
    np.save(tmp_path / "p.npy", prompts)
    head = Head.of("h", "0" * 64, "m", convert(tmp_path / "p.npy", "rows", "m").network("h"))
    x = rows(200)
    assert ((head.scores(x) > 0) == ((x.astype(float) @ prompts.T).argmax(axis=1) == 1)).all()


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return (os.mkdir, (str(self.path),))


def test_pickles_are_refused_and_never_run(tmp_path: Path) -> None:
    evil = Evil(tmp_path / "it-ran")
    torch.save({"weight": evil, "bias": torch.zeros(1)}, tmp_path / "evil.pth")
    with pytest.raises(RefusedError, match="holds more than weights"):
        convert(tmp_path / "evil.pth", "linear", "m")
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(evil, protocol=2))
    with pytest.raises(RefusedError):
        convert(tmp_path / "raw.pth", "linear", "m")
    np.save(tmp_path / "evil.npy", np.array([[evil, 1], [2, 3]], dtype=object), allow_pickle=True)
    with pytest.raises(RefusedError, match=r"damaged or no .npy file"):
        convert(tmp_path / "evil.npy", "rows", "m")
    assert not evil.path.exists()
    pickle.loads(pickle.dumps(evil))
    assert evil.path.exists()


def test_other_contents_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "p.npy", np.zeros((3, 8), "f4"))
    with pytest.raises(RefusedError, match="two rows"):
        convert(tmp_path / "p.npy", "rows", "m")
    for state in (
        {"weight": torch.zeros(1, 8)},
        {"weight": torch.zeros(8), "bias": torch.zeros(1)},
        {"x": torch.zeros(1)},
    ):
        torch.save(state, tmp_path / "s.pth")
        with pytest.raises(RefusedError, match="no state dict of linear layers"):
            convert(tmp_path / "s.pth", "linear", "m")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "s.pth").read_bytes()[:300])
    with pytest.raises(RefusedError, match="damaged"):
        convert(tmp_path / "cut.pth", "affine-chain", "m")


# ---------------------------------------------------------------- files of ours


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.metadata.pop("clipfilter_head"), "clipfilter_head: 1"),
        (lambda f: f.metadata.pop("activation"), "lacks 'activation'"),
        (lambda f: f.metadata.update(activation="gelu"), "activation is 'gelu', but must be one of none, relu, tanh"),
        (lambda f: f.metadata.update(final="softmax"), "final is 'softmax'"),
        (lambda f: f.metadata.update(layers="5,3"), "the last of them 1"),
        (lambda f: f.metadata.update(layers="5,x,1"), "whole number"),
        (lambda f: f.metadata.update(dim="9"), "layers.0.weight is 5 x 8, not 5 x 9"),
        (lambda f: f.metadata.update(kind="forest"), "kind is 'forest'"),
        (lambda f: f.tensors.pop("layers.1.bias"), "lacks 'layers.1.bias'"),
        (lambda f: f.tensors.update(more=np.zeros(2, "f4")), "holds 7 tensors where its metadata describes 6"),
        (lambda f: f.tensors["layers.0.bias"].fill(np.inf), "not finite"),
        (lambda f: f.tensors.update({"input.mean": np.zeros(8), "input.scale": np.zeros(8)}), "above 0 everywhere"),
        (lambda f: f.tensors.update({"layers.0.bias": np.array([True] * 5)}), "must be numbers"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(
    tmp_path: Path, change: Callable[[HeadFile], Any], message: str
) -> None:
    content = mlp()
    change(content)
    name = write(tmp_path / "h.safetensors", content)
    with pytest.raises(RefusedError) as caught:
        load_head(name, MODEL, 8)
    assert message in str(caught.value)
    with pytest.raises(RefusedError):
        heads.check_file(tmp_path / "h.safetensors")


def test_damaged_files_are_refused_in_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "h.safetensors"
    mlp().write(path)
    raw = path.read_bytes()
    cases = [b"", raw[:5], raw[:200], raw[:-8], struct.pack("<Q", 1 << 60) + raw[8:], struct.pack("<Q", 3) + b"[1]"]
    cases.append(struct.pack("<Q", 8192) + b"[" * 8192)
    header = json.dumps({"__metadata__": {"clipfilter_head": "1"}, "x": 1}).encode()
    cases.append(struct.pack("<Q", len(header)) + header)
    for case in cases:
        path.write_bytes(case)
        with pytest.raises(RefusedError, match=r"damaged|no safetensors file"):
            heads.check_file(path)
    with pytest.raises(RefusedError, match="does not exist"):
        heads.check_file(tmp_path)
    assert list(tmp_path.iterdir()) == [path]


def test_a_huge_file_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from clipfilter.models.heads import file

    name = write(tmp_path / "h.safetensors", mlp())
    monkeypatch.setattr(file, "MAX_BYTES", 100)
    with pytest.raises(RefusedError, match="more than 0 MiB"):
        load_head(name, MODEL, 8)


# ---------------------------------------------------------------- whose embeddings


def test_a_model_is_known_by_its_names_and_by_openais_file() -> None:
    original = registry.EMBEDDINGS["ViT-L-14/openai"].weights_sha256
    for fingerprint, same in (
        ({"model": "ViT-L-14/openai"}, True),
        ({"model": "ViT-L-14-quickgelu/openai"}, True),
        ({"model": "hf:openai/clip-vit-large-patch14"}, True),
        ({"model": "hf-hub:timm/vit_large_patch14_clip_224.openai", "activation": "quick_gelu"}, True),
        ({"model": "hf-hub:timm/vit_large_patch14_clip_224.openai", "activation": "gelu"}, False),
        ({"model": "ViT-L-14-quickgelu=ViT-L-14.pt", "weights_sha256": original, "activation": "quick_gelu"}, True),
        ({"model": "ViT-L-14=ViT-L-14.pt", "weights_sha256": original, "activation": "gelu"}, False),
        ({"model": "ViT-L-14-336/openai"}, False),
        ({"model": "ViT-L-14/laion2b_s32b_b82k"}, False),
        ({"model": "nano@2"}, False),
        ({}, False),
    ):
        assert same_embeddings("ViT-L-14/openai", fingerprint) == same, fingerprint
    assert same_embeddings("nano@2", {"model": "nano@2"})
    assert not same_embeddings("nano@2", {"model": "nano@3"})


def test_open_clip_agrees_on_openais_files() -> None:
    from clipfilter.models._torch import torch_with_torchvision

    torch_with_torchvision()
    import open_clip

    for model, known in registry.EMBEDDINGS.items():
        config = open_clip.get_pretrained_cfg(*model.split("/"))
        assert "hf-hub:" + config["hf_hub"].strip("/") in known.names
        assert known.weights_sha256 in config["url"]
        assert config["quick_gelu"]
        assert open_clip.get_model_config(model.split("/")[0])["embed_dim"] == known.dim
        assert all(len(original.sha256) == 64 for head in HEADS.values() for original in head.originals.values())


def test_a_head_for_other_embeddings_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError) as caught:
        load_head("laion-aesthetic-v2", {"model": "nano@2"}, 256)
    assert str(caught.value) == (
        "the head laion-aesthetic-v2 is for embeddings of ViT-L-14/openai, not of nano@2: "
        "use --model ViT-L-14/openai, or a head made for nano@2"
    )
    name = write(tmp_path / "h.safetensors", mlp())
    with pytest.raises(RefusedError, match="for embeddings of some/model, not of other/model"):
        load_head(name, {"model": "other/model"}, 8)
    with pytest.raises(RefusedError, match="reads embeddings of 8 numbers, some/model makes 9"):
        load_head(name, MODEL, 9)
    bound = write(tmp_path / "b.safetensors", mlp(weights_sha256="b" * 64))
    assert load_head(bound, MODEL, 8).dim == 8
    assert load_head(bound, MODEL | {"model": "onnx:/exported"}, 8).dim == 8
    with pytest.raises(RefusedError, match="other weights of some/model"):
        load_head(bound, MODEL | {"weights_sha256": "c" * 64}, 8)
    save_file(checker(512), tmp_path / "c.safetensors", {"format": "pt"})
    with pytest.raises(RefusedError, match="embeddings of 512 numbers, which no known model has"):
        load_head(f"file:{tmp_path / 'c.safetensors'}", L14, 768)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("laion-asthetic-v2", "did you mean 'laion-aesthetic-v2'?"),
        ("LAION-NSFW", "did you mean 'laion-nsfw'?"),
        ("file:", "there is no head 'file:'"),
        ("zzz", "there is no head 'zzz' (heads: laion-aesthetic-v1, "),
    ],
)
def test_unknown_names_get_a_suggestion(name: str, message: str) -> None:
    with pytest.raises(RefusedError) as caught:
        load_head(name, L14, 768)
    assert message in str(caught.value)


def test_the_reference_holds_what_the_registry_holds() -> None:
    text = (Path(__file__).parents[2] / "docs" / "reference" / "heads.md").read_text()
    for name, published in HEADS.items():
        models = ", ".join(f"`{model}`" for model in published.originals)
        row = f"| `{name}` | {published.meaning} | {models} | {published.thresholds} | {published.licence} |"
        assert row in text
        for original in published.originals.values():
            assert re.search(rf"\| `{re.escape(original.file)}` \| .* \| `{original.sha256[:12]}\.\.\.` \|", text)


def test_the_references_refusal_and_its_own_head_are_true(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[2] / "docs" / "reference" / "heads.md").read_text()
    with pytest.raises(RefusedError) as caught:
        load_head("laion-aesthetic-v2", {"model": "nano@3"}, 640)
    assert f"\nclipfilter: rule 'dull': {caught.value}\n" in text
    code = re.search(r"```python\n(import torch\n.*?)```", text, re.DOTALL)
    assert code
    monkeypatch.chdir(tmp_path)
    made: dict[str, Any] = {}
    exec(code[1], made)
    head = load_head("file:head.safetensors", {"model": "ViT-B-32/laion2b_s34b_b79k"}, 512)
    x = rows(20, 512)
    expected = torch.sigmoid(made["network"](torch.from_numpy(x.astype("f4")))).detach()[:, 0]
    np.testing.assert_allclose(head.scores(x), expected, atol=1e-6)


# ---------------------------------------------------------------- finding the file


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> registry.Original:
    """A published head of our own making, in the place of laion-aesthetic-v2."""
    folder = tmp_path / "publisher"
    folder.mkdir()
    torch.manual_seed(0)
    torch.save(torch.nn.Linear(768, 1).state_dict(), folder / "one.pth")
    sha256 = hashlib.sha256((folder / "one.pth").read_bytes()).hexdigest()
    original = registry.Original("one.pth", sha256, "linear", "https://publisher.invalid/one.pth")
    head = registry.PublishedHead({"ViT-L-14/openai": original}, "rating", "", "", "MIT")
    monkeypatch.setitem(HEADS, "laion-aesthetic-v2", head)
    return original


def serve(monkeypatch: pytest.MonkeyPatch, content: bytes | None) -> list[str]:
    """Downloads give this content, or fail as they do without a network; -> what was asked for."""
    asked: list[str] = []

    def download(url: str) -> bytes:
        asked.append(url)
        if content is None:
            raise OSError("Name or service not known")
        return content

    monkeypatch.setattr(loading, "_download", download)
    return asked


def test_a_head_is_downloaded_once_and_then_cached(
    published: registry.Original, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: Path
) -> None:
    asked = serve(monkeypatch, (tmp_path / "publisher" / "one.pth").read_bytes())
    first = load_head("laion-aesthetic-v2", L14, 768)
    assert asked == [published.url]
    again = load_head("laion-aesthetic-v2", L14, 768)
    assert asked == [published.url]
    assert first.sha256 == again.sha256 == published.sha256
    np.testing.assert_array_equal(again.scores(rows(9, 768)), first.scores(rows(9, 768)))
    (converted,) = cache.glob("*.safetensors")
    assert read_head_file(converted).metadata["source_sha256"] == published.sha256
    converted.write_bytes(converted.read_bytes()[:-20])  # a damaged cache is made anew
    np.testing.assert_array_equal(
        load_head("laion-aesthetic-v2", L14, 768).scores(rows(9, 768)), first.scores(rows(9, 768))
    )
    assert asked == [published.url]


def test_a_download_that_is_another_file_is_not_used(
    published: registry.Original, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    serve(monkeypatch, b"something else")
    with pytest.raises(RefusedError, match="is not the file it was"):
        load_head("laion-aesthetic-v2", L14, 768)
    assert not cache.exists()


def test_without_a_network_the_sentence_says_what_to_do(
    published: registry.Original, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: Path
) -> None:
    serve(monkeypatch, None)
    with pytest.raises(RefusedError) as caught:
        load_head("laion-aesthetic-v2", L14, 768)
    said = str(caught.value)
    assert published.url in said
    assert str(cache / "one.pth") in said
    assert "CLIPFILTER_HEADS" in said
    cache.mkdir(parents=True)
    (cache / "one.pth").write_bytes((tmp_path / "publisher" / "one.pth").read_bytes())
    assert load_head("laion-aesthetic-v2", L14, 768).dim == 768


def test_a_folder_of_originals_needs_no_network(
    published: registry.Original, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    serve(monkeypatch, None)
    monkeypatch.setenv("CLIPFILTER_HEADS", str(tmp_path / "publisher"))
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")  # not writable: only costs the time
    assert load_head("laion-aesthetic-v2", L14, 768).dim == 768
    (tmp_path / "publisher" / "one.pth").write_bytes(b"changed")
    with pytest.raises(RefusedError, match="is not the head laion-aesthetic-v2 as it was published"):
        load_head("laion-aesthetic-v2", L14, 768)


def test_only_https_is_downloaded(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("x")
    with pytest.raises(OSError, match="away from https"):
        loading._download((tmp_path / "x").as_uri())
    assert all(o.url.startswith("https://") for head in HEADS.values() for o in head.originals.values())


def test_loading_a_head_from_its_file_imports_no_torch(tmp_path: Path) -> None:
    name = write(tmp_path / "h.safetensors", mlp())
    code = (
        "import sys; from clipfilter.models.heads import load_head; "
        f"load_head({name!r}, {MODEL!r}, 8); assert not {{'torch', 'open_clip'}} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
