"""ONNX: an exported folder gives the source's vectors, whole or not at all, and refuses what is not what it says."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clipfilter.errors import RefusedError
from clipfilter.images.preprocess import prepare
from clipfilter.models import load_encoder
from clipfilter.models.onnx import load_onnx, loss_note
from tests.support.tiny_models import tiny_checkpoint

onnx = pytest.importorskip("onnx", reason="the onnx extra is not installed")
pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")
pytest.importorskip("onnxscript", reason="the onnx extra is not installed")
data = pytest.importorskip("skimage.data", reason="scikit-image has the photographs for these tests")

import torch  # noqa: E402

from clipfilter.models import onnx_int8  # noqa: E402
from clipfilter.models.encoder import TorchEncoder  # noqa: E402
from clipfilter.models.onnx_export import Calibration, export_onnx  # noqa: E402

REPO = Path(__file__).parents[2]
TEXTS = [
    "a dog",
    "",
    "a man who rides a bicycle through the rain while it is getting dark",
    "word " * 200,
    "😀 <b>&amp;</b>",
]
PARITY = 1e-4
# Kernels may sum in another order for another number of rows, nothing more.
NEIGHBOUR_BOUND = 5e-6


def pixels_for(encoder: TorchEncoder) -> np.ndarray:
    photos = [data.astronaut(), data.chelsea(), data.coffee(), data.rocket(), data.immunohistochemistry(), data.cat()]
    return np.stack([prepare(photo, encoder.preprocess) for photo in photos])


def onnx_encoder(folder: Path) -> TorchEncoder:
    return load_onnx(f"onnx:{folder}", device="cpu", dtype="fp32", threads=1)


def worst(left: np.ndarray, right: np.ndarray) -> float:
    """The largest 1 - cosine of two sets of unit rows."""
    return float(1 - (left.astype(np.float64) * right).sum(1).min())


@pytest.fixture(scope="module", autouse=True)
def _exported_once() -> Iterator[None]:
    """torch's exporter takes seconds for a tower: each tower of the tests goes through it once."""
    programs: dict[Any, Any] = {}

    def export(tower: Any, *given: Any, **more: Any) -> Any:
        method = tower._tower
        if not hasattr(method, "__func__"):
            return original(tower, *given, **more)
        if method not in programs:
            programs[method] = original(tower, *given, **more)
        return programs[method]

    with pytest.MonkeyPatch.context() as patch:
        original = torch.onnx.export
        patch.setattr(torch.onnx, "export", export)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def clip(folder: Path) -> TorchEncoder:
    return load_encoder(tiny_checkpoint("tiny-clip", folder), threads=1)  # type: ignore[return-value]


@pytest.fixture(scope="module")
def clip_folder(clip: TorchEncoder, folder: Path) -> Path:
    return export_onnx(clip, folder / "clip").folder


@pytest.fixture
def copied(clip_folder: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(clip_folder, tmp_path / "copy"))


# --- parity


def test_an_exported_clip_gives_its_sources_vectors(clip: TorchEncoder, clip_folder: Path) -> None:
    exported = onnx_encoder(clip_folder)
    pixels = pixels_for(clip)
    assert worst(clip.encode_images(pixels), exported.encode_images(pixels)) < PARITY
    assert worst(clip.encode_texts(TEXTS), exported.encode_texts(TEXTS)) < PARITY
    assert exported.count_truncated(TEXTS) == clip.count_truncated(TEXTS) == 1
    for name in ("dim", "context_length", "preprocess", "logit_scale", "logit_bias", "score_kind"):
        assert getattr(exported, name) == getattr(clip, name), name


def test_a_row_does_not_depend_on_its_batch_neighbours(clip_folder: Path) -> None:
    exported = onnx_encoder(clip_folder)
    pixels = pixels_for(exported)
    alone = np.concatenate([exported.encode_images(pixels[i : i + 1]) for i in range(len(pixels))])
    assert np.abs(alone - exported.encode_images(pixels)).max() < NEIGHBOUR_BOUND
    alone = np.concatenate([exported.encode_texts([text]) for text in TEXTS])
    assert np.abs(alone - exported.encode_texts(TEXTS)).max() < NEIGHBOUR_BOUND
    assert exported.encode_images(pixels[:0]).shape == (0, exported.dim)


def test_a_sigmoid_model_with_texts_of_fixed_length(folder: Path) -> None:
    source: Any = load_encoder(tiny_checkpoint("tiny-sigmoid", folder), threads=1)
    exported = onnx_encoder(export_onnx(source, folder / "sigmoid").folder)
    pixels = pixels_for(source)
    assert worst(source.encode_images(pixels), exported.encode_images(pixels)) < PARITY
    assert worst(source.encode_texts(TEXTS), exported.encode_texts(TEXTS)) < PARITY
    assert (exported.score_kind, exported.logit_bias) == ("sigmoid", -10.0)
    assert onnx_dimension(folder / "sigmoid" / "text.onnx", 1) == source.context_length


def onnx_dimension(path: Path, axis: int) -> int | str:
    size = onnx.load(path).graph.input[0].type.tensor_type.shape.dim[axis]
    return size.dim_param or size.dim_value


def test_the_fingerprint_is_the_sources_but_for_the_backend(clip: TorchEncoder, clip_folder: Path) -> None:
    mine = onnx_encoder(clip_folder).fingerprint
    changed = {name for name in clip.fingerprint if clip.fingerprint[name] != mine.get(name)}
    assert changed == {"model", "backend"}
    assert mine["backend"] == "onnxruntime-cpu"
    assert mine["activation"] == "quick_gelu"


def test_the_folder_is_self_contained_and_tells_nothing_about_this_machine(clip_folder: Path) -> None:
    config = json.loads((clip_folder / "config.json").read_text())
    assert set(config["files"]) | {"config.json", "README.md"} == {path.name for path in clip_folder.iterdir()}
    for name in ("image.onnx", "text.onnx"):
        content = (clip_folder / name).read_bytes()
        assert str(REPO).encode() not in content
        assert b"site-packages" not in content


# --- all or nothing


class BagOfWords(torch.nn.Module):
    """A text tower that is exported in no time."""

    def __init__(self) -> None:
        super().__init__()
        self.words = torch.nn.Embedding(49408, 48)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.words(ids).sum(1)


def encoder_with(clip: TorchEncoder, image_tower: torch.nn.Module) -> TorchEncoder:
    return TorchEncoder(
        name="odd", dim=clip.dim, preprocess=clip.preprocess, logit_scale=1.0, logit_bias=None,
        fingerprint=clip.fingerprint, image_tower=image_tower, text_tower=BagOfWords(),
        tokenizer=clip.tokenizer, cut_to_longest=True, device=clip.device, dtype=clip.dtype,
    )  # fmt: skip


class Unexportable(torch.nn.Module):
    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        flat = pixels.flatten(1)[:, :48]
        return flat if pixels.mean() > 0 else -flat  # a branch on data is in no graph


class Unfaithful(torch.nn.Module):
    """Gives other vectors every time, so that no graph can give the same."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.rand_like(pixels.flatten(1)[:, :48]) - 0.5


@pytest.mark.parametrize(
    ("tower", "says"), [(Unexportable, "cannot export the image tower"), (Unfaithful, "not the source's")]
)
def test_a_model_that_cannot_be_exported_leaves_nothing(
    clip: TorchEncoder, tmp_path: Path, tower: type[torch.nn.Module], says: str
) -> None:
    with pytest.raises(RefusedError, match=says):
        export_onnx(encoder_with(clip, tower()), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_is_refused_before_work(clip: TorchEncoder, clip_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="exists"):
        export_onnx(clip, clip_folder)
    with pytest.raises(RefusedError, match="--measure"):
        export_onnx(clip, tmp_path / "out", int8=True)
    with pytest.raises(RefusedError, match="exported already"):
        export_onnx(onnx_encoder(clip_folder), tmp_path / "out")


# --- refusals when loading


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def damage(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)

    return change


def truncate(folder: Path) -> None:
    os.truncate(folder / "image.onnx", 1000)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (damage("text.onnx"), "text.onnx is not the file that was exported"),
        (damage("bpe.txt.gz"), "sha256 differs"),
        (truncate, "image.onnx is not the file"),
        (lambda folder: (folder / "text.onnx").unlink(), "text.onnx is missing"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json is damaged"),
        (lambda folder: (folder / "config.json").write_text('{"format": 1, "files": []}'), "is missing|damaged|differs"),
        (lambda folder: change_config(folder, format=99), "format 99 .* update clipfilter"),
        (lambda folder: change_config(folder, files={"../x": ""}), "outside of its folder"),
        (lambda folder: change_config(folder, tokenizer={"kind": "new", "file": "x"}), "tokenizer of kind 'new'"),
    ],
)  # fmt: skip
def test_a_folder_that_is_not_what_it_says_is_refused(
    copied: Path, change: Callable[[Path], object], says: str
) -> None:
    change(copied)
    with pytest.raises(RefusedError, match=says):
        onnx_encoder(copied)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="models export"):
        onnx_encoder(tmp_path / "nothing")


def test_device_dtype_and_threads_are_checked(clip_folder: Path) -> None:
    import onnxruntime

    name = f"onnx:{clip_folder}"
    with pytest.raises(RefusedError, match="--dtype fp32"):
        load_onnx(name, device="cpu", dtype="bf16", threads=None)
    with pytest.raises(RefusedError, match="cpu"):
        load_onnx(name, device="abacus", dtype="fp32", threads=None)
    with pytest.raises(RefusedError, match="threads"):
        load_onnx(name, device="cpu", dtype="fp32", threads=0)
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        with pytest.raises(RefusedError, match="onnxruntime-gpu"):
            load_onnx(name, device="cuda", dtype="fp32", threads=None)


# --- int8


@pytest.fixture(scope="module")
def int8_folder(clip: TorchEncoder, folder: Path) -> Path:
    calibration = Calibration(pixels_for(clip)[:3], ["a dog in the snow", "two men on a boat", "a red car"])

    def judge(reference: Any, other: Any) -> dict[str, Any]:
        error = worst(reference.encode_images(pixels_for(clip)), other.encode_images(pixels_for(clip)))
        return {"images": {"n": 6, "mean": 1 - error, "min": 1 - error}, "texts": None, "policy": None}

    return export_onnx(clip, folder / "int8", int8=True, calibration=calibration, judge=judge).folder


def test_int8_stays_near_the_source_and_is_a_model_of_its_own(clip: TorchEncoder, int8_folder: Path) -> None:
    exported = onnx_encoder(int8_folder)
    pixels = pixels_for(clip)
    assert 1e-7 < worst(clip.encode_images(pixels), exported.encode_images(pixels)) < 0.005
    assert 1e-7 < worst(clip.encode_texts(TEXTS), exported.encode_texts(TEXTS)) < 0.005
    assert exported.fingerprint["weights_sha256"] != clip.fingerprint["weights_sha256"]
    assert exported.fingerprint["quantisation"] == "int8"
    note = loss_note(json.loads((int8_folder / "config.json").read_text()))
    assert note is not None
    assert "int8 image and text towers; cosine to float32 mean 0.99" in note


def test_loading_int8_says_what_it_costs(int8_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    from clipfilter.cli.models import _facts

    encoder = load_encoder(f"onnx:{int8_folder}", threads=1)
    note = loss_note(json.loads((int8_folder / "config.json").read_text()))
    assert note in caplog.text
    facts = _facts(encoder)
    assert (facts["note"], facts["dtype"]) == (note, "int8")
    assert facts["bytes"] == sum(path.stat().st_size for path in int8_folder.iterdir())


def test_an_int8_row_does_not_depend_on_its_batch_neighbours(int8_folder: Path) -> None:
    exported = onnx_encoder(int8_folder)
    pixels = pixels_for(exported)
    alone = np.concatenate([exported.encode_images(pixels[i : i + 1]) for i in range(len(pixels))])
    # A last bit that differs may round an activation to its neighbour: far less than a scale shared by the batch does.
    assert worst(alone, exported.encode_images(pixels)) < 1e-4


def test_int8_weights_have_seven_bits(int8_folder: Path) -> None:
    for name in ("image.onnx", "text.onnx"):
        weights = [
            onnx.numpy_helper.to_array(tensor)
            for tensor in onnx.load(int8_folder / name).graph.initializer
            if tensor.data_type == onnx.TensorProto.INT8
        ]
        assert len(weights) == 2 * 4 + (name == "text.onnx") + (name == "image.onnx")
        assert max(int(np.abs(w.astype(int)).max()) for w in weights) <= 64


def linear_graph(weight: np.ndarray, *, gemm: bool) -> Any:
    """y = x w (+ 1, as a Gemm with its weight transposed)."""
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    constants = [numpy_helper.from_array(weight.T.copy() if gemm else weight, "w")]
    if gemm:
        constants.append(numpy_helper.from_array(np.ones(weight.shape[1], np.float32), "b"))
        node = helper.make_node("Gemm", ["x", "w", "b"], ["y"], transB=1)
    else:
        node = helper.make_node("MatMul", ["x", "w"], ["y"])
    graph = helper.make_graph(
        [node], "g", [helper.make_tensor_value_info("x", 1, ["n", weight.shape[0]])],
        [helper.make_tensor_value_info("y", 1, ["n", weight.shape[1]])], constants,
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def run_graph(model: Any, x: np.ndarray, folder: Path) -> np.ndarray:
    from clipfilter.models.onnx import open_session

    onnx_int8.save(model, folder / "graph.onnx")
    return np.asarray(open_session(folder / "graph.onnx", 1).run(None, {"x": x})[0])


@pytest.mark.parametrize("gemm", [False, True])
def test_a_linear_layer_in_int8_is_the_layer_and_smoothing_helps_outliers(tmp_path: Path, gemm: bool) -> None:
    draw = np.random.default_rng(0)
    weight = draw.standard_normal((96, 40)).astype(np.float32)
    x = draw.standard_normal((50, 96)).astype(np.float32)
    x[:, 5] *= 60  # one channel far above the others
    x[7] = 0
    exact = x @ weight + (1 if gemm else 0)

    def error(sizes: np.ndarray) -> float:
        result = run_graph(onnx_int8.quantise(linear_graph(weight, gemm=gemm), {"x": sizes}), x, tmp_path)
        np.testing.assert_allclose(result[7], exact[7], atol=1e-6)
        return float(np.linalg.norm(result - exact) / np.linalg.norm(exact))

    onnx_int8.save(linear_graph(weight, gemm=gemm), tmp_path / "float.onnx")
    sizes = onnx_int8.activation_sizes(tmp_path / "float.onnx", [x[:20], x[20:]], 1)
    np.testing.assert_allclose(sizes["x"], np.linalg.norm(x, axis=0), rtol=1e-4)
    smoothed, plain = error(sizes["x"]), error(np.abs(weight).max(axis=1))
    assert smoothed < 0.02
    assert smoothed < plain / 1.5


def test_convolutional_graphs_are_recognised() -> None:
    helper = onnx.helper
    conv = helper.make_node("Conv", ["x", "k"], ["c"])
    graph = helper.make_graph([conv, conv, helper.make_node("MatMul", ["c", "w"], ["y"])], "g", [], [])
    graph.initializer.append(onnx.numpy_helper.from_array(np.ones((2, 2), np.float32), "w"))
    assert onnx_int8.mostly_convolutions(helper.make_model(graph))
    assert not onnx_int8.mostly_convolutions(linear_graph(np.ones((2, 2), np.float32), gemm=False))


@pytest.mark.integration  # not for what it starts: it exports once more, which takes seconds
def test_large_graphs_keep_their_tensors_in_a_file_beside_them(
    clip: TorchEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_int8, "LARGE", 100_000)  # stands for protobuf's 2 GiB
    pixels = pixels_for(clip)
    loss = {"images": {"n": 1, "mean": 1.0, "min": 1.0}, "texts": None, "policy": None}
    calibration = Calibration(pixels, ["a dog"])
    out = export_onnx(clip, tmp_path / "large", int8=True, calibration=calibration, judge=lambda a, b: loss).folder
    assert (out / "image.onnx").stat().st_size < 300_000 < (out / "image.onnx.data").stat().st_size
    exported = onnx_encoder(out)
    assert worst(clip.encode_images(pixels), exported.encode_images(pixels)) < 0.005
    assert worst(clip.encode_texts(TEXTS), exported.encode_texts(TEXTS)) < 0.005
    os.truncate(out / "image.onnx.data", 1000)
    with pytest.raises(RefusedError, match=r"image\.onnx\.data is not the file"):
        onnx_encoder(out)


# --- tokenizers


def test_a_sentencepiece_like_tokenizer_travels_with_the_model(clip: TorchEncoder, tmp_path: Path) -> None:
    """One with an end token of its own, a cleaned text and padding in its settings, as SigLIP's."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    from clipfilter.models.onnx import load_tokenizer
    from clipfilter.models.onnx_export import _write_tokenizer
    from clipfilter.models.tokenizer import open_clip_tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁a", -1.0), ("▁dog", -2.0), ("▁", -3.0)]
    pieces += [(letter, -5.0) for letter in "abcdefghijklmnopqrstuvwxyz'"]
    fast = Tokenizer(models.Unigram(pieces, unk_id=2))
    fast.normalizer = normalizers.NFKC()
    fast.pre_tokenizer = pre_tokenizers.Metaspace()
    fast.decoder = decoders.Metaspace()
    fast.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast.enable_padding(length=16)
    fast.enable_truncation(16)
    source = tmp_path / "source"
    source.mkdir()
    fast.save(str(source / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "eos_token": "</s>"}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    kwargs = {"clean": "canonicalize", "strip_sep_token": False}
    text_config = {"context_length": 16, "hf_tokenizer_name": "own/siglip", "tokenizer_kwargs": kwargs}
    pytest.importorskip("transformers", reason="the hf extra is not installed")
    tokenizer = open_clip_tokenizer(text_config, source)
    encoder = encoder_with(clip, BagOfWords())
    encoder.tokenizer = tokenizer

    out = tmp_path / "out"
    out.mkdir()
    entry = _write_tokenizer(encoder, out, TEXTS)
    assert (entry["kind"], entry["clean"], entry["end_id"]) == ("tokenizers", "canonicalize", 1)
    texts = ["A dog's  DOG!", *TEXTS]
    assert load_tokenizer(out, entry)(texts) == tokenizer.encode(texts)
    assert len(load_tokenizer(out, entry)(["word " * 200])[0]) > 200
    encoder.tokenizer = replace(tokenizer, encode=lambda texts: [[fast.token_to_id("</s>")] for _ in texts])
    with pytest.raises(RefusedError, match="gives other tokens"):
        _write_tokenizer(encoder, out, TEXTS)
