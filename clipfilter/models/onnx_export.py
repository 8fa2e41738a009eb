"""Exports an encoder to a folder of ONNX graphs that `onnx:DIR` loads: self-contained, checked, written whole."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import io
import json
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from clipfilter.errors import RefusedError, reason
from clipfilter.models.encoder import TorchEncoder
from clipfilter.models.onnx import (
    CONFIG,
    FORMAT,
    IMAGE,
    INSTALL,
    ONNX_PREFIX,
    TEXT,
    folder_size,
    load_onnx,
    load_tokenizer,
)
from clipfilter.storage import file_sha256
from clipfilter.version import __version__

if TYPE_CHECKING:
    from torch import Tensor

    from clipfilter.models.interface import Encoder

#: Largest 1 - cosine between the source's vectors and the exported model's.
PARITY = 1e-4
#: A tower whose int8 vectors have a smaller mean cosine to its float32 ones stays float32.
INT8_COSINE = 0.995
_OPSET = 20
_CALIBRATION_BATCH = 8
_TOWERS: tuple[Literal["image", "text"], ...] = ("image", "text")
_FILES = {"image": IMAGE, "text": TEXT}
_INPUTS = {"image": "pixels", "text": "ids"}
#: What the exported text tower is compared on beside the caller's texts; the tokenizer must agree on all of them.
_TEXTS = (
    "a photo of a dog", "", "Two men ride horses along the beach at sunset, while a third one looks on.", "日本語のテキスト",
    "😀🎉 ÇA VA?", "<b>&amp; don't</b>", "l'été  \t\n  naïve", "word " * 300,
)  # fmt: skip


@dataclass(frozen=True)
class Calibration:
    """Real data to choose int8 scales on and to check an export with.

    pixels: uint8 [n, 3, S, S] as the model's preprocessing makes them. texts: captions; none leaves the text tower in
    float32.
    """

    pixels: np.ndarray
    texts: Sequence[str] = ()


@dataclass(frozen=True)
class ExportReport:
    """What was written: the folder, its config (config.json as JSON) and its size in bytes."""

    folder: Path
    config: dict[str, Any]
    bytes: int


def export_onnx(
    encoder: TorchEncoder,
    out: Path,
    *,
    int8: bool = False,
    calibration: Calibration | None = None,
    judge: Callable[[Encoder, Encoder], dict[str, Any]] | None = None,
) -> ExportReport:
    """Write `encoder` (float32, on the CPU) as ONNX graphs to the new folder `out`.

    The graphs take any number of images, and texts of any length up to the context where the tower allows it. The
    folder appears whole, after the graphs gave the source's vectors: of calibration.pixels, or of made-up pictures.

    int8: store the linear layers as int8; needs `calibration`, and `judge`, which is given the float32 and the int8
    encoder and returns what int8 costs, for config.json. A tower that is mostly convolutions, or would lose more than
    INT8_COSINE allows, stays float32.

    Raises RefusedError when `out` exists, a package is missing, or the model cannot be exported faithfully.
    """
    _check(encoder, out, int8, calibration, judge)
    pixels = calibration.pixels if calibration is not None else _pictures(encoder.preprocess.size)
    texts = [*_TEXTS, *(calibration.texts if calibration is not None else ())]
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        config = _write(encoder, work, pixels, texts)
        if int8:
            assert calibration is not None
            assert judge is not None
            _to_int8(work, config, encoder, calibration, judge)
        (work / "README.md").write_text(_readme(config), encoding="utf-8")
        work.chmod(0o755)
        _rename(work, out)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return ExportReport(out, config, folder_size(out))


def weight_size(encoder: TorchEncoder) -> tuple[int, int]:
    """(numbers, bytes) of the weights of both towers, each tensor once."""
    modules = [m for tower in _towers(encoder).values() for m in _modules(tower)]
    tensors = {p.data_ptr(): p for module in modules for p in module.parameters()}.values()
    return sum(tensor.numel() for tensor in tensors), sum(tensor.nbytes for tensor in tensors)


def _check(
    encoder: TorchEncoder, out: Path, int8: bool, calibration: Calibration | None, judge: Callable[..., Any] | None
) -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise RefusedError(f"exporting needs the package {error.name}: {INSTALL}") from None
    if not isinstance(encoder, TorchEncoder) or not _modules(encoder.image_tower):
        raise RefusedError(f"{encoder.name} is exported already: give the model it was made from")
    if encoder.dtype != torch.float32 or encoder.device.type != "cpu":
        raise RefusedError(
            "models are exported in float32 on the CPU: load the model with --device cpu and --dtype fp32"
        )
    if out.exists():
        raise RefusedError(f"{out} exists: name a new folder, or remove it")
    if int8 and (calibration is None or judge is None or len(calibration.pixels) == 0):
        raise RefusedError("int8 changes every vector: name images to measure how much, with --measure SOURCE")


def _write(encoder: TorchEncoder, work: Path, pixels: np.ndarray, texts: Sequence[str]) -> dict[str, Any]:
    """Both graphs, the tokenizer and config.json in float32, compared with the source."""
    tokenizer = _write_tokenizer(encoder, work, texts)
    for name, tower in _towers(encoder).items():
        _export_tower(encoder, name, tower, work / _FILES[name])
    config: dict[str, Any] = {
        "format": FORMAT,
        "created_by": f"clipfilter {__version__}",
        "source": encoder.name,
        "fingerprint": {name: value for name, value in encoder.fingerprint.items() if name not in ("model", "backend")},
        "dim": encoder.dim,
        "context_length": encoder.context_length,
        "cut_to_longest": encoder.cut_to_longest,
        "logit_scale": encoder.logit_scale,
        "logit_bias": encoder.logit_bias,
        "preprocess": encoder.preprocess.to_json(),
        "tokenizer": tokenizer,
        "parameters": weight_size(encoder)[0],
        "quantisation": None,
    }
    _write_config(work, config)
    exported = _load(work)
    pairs = {
        "image": (encoder.encode_images(pixels), exported.encode_images(pixels)),
        "text": (encoder.encode_texts(texts), exported.encode_texts(texts)),
    }
    config["parity"] = {name: float(1 - _cosines(*pair).min()) for name, pair in pairs.items()}
    for name, error in config["parity"].items():
        if not error <= PARITY:
            raise RefusedError(
                f"the exported {name} tower of {encoder.name} is not the source's (1 - cosine {error:.1e}, at most "
                f"{PARITY:.0e}), so nothing was written: this model cannot be exported with these versions of torch and onnx"
            )
    _write_config(work, config)
    return config


# --- graphs -----------------------------------------------------------------------------------------------------------


class _Tower(torch.nn.Module):
    """A tower as a module that knows its weights, which the exporter wants."""

    def __init__(self, tower: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.held = torch.nn.ModuleList(_modules(tower))
        self._tower = tower

    def forward(self, batch: Tensor) -> Tensor:
        return self._tower(batch)


def _towers(encoder: TorchEncoder) -> dict[str, Callable[[Tensor], Tensor]]:
    return {"image": encoder.image_tower, "text": encoder.text_tower}


def _modules(tower: Callable[[Tensor], Tensor]) -> list[torch.nn.Module]:
    """The modules a tower computes with: itself, the object it is a method of, and those its closure names."""
    named = [tower, getattr(tower, "__self__", None)]
    if inspect.isfunction(tower):
        named += inspect.getclosurevars(tower).nonlocals.values()
    return [item for item in named if isinstance(item, torch.nn.Module)]


def _export_tower(encoder: TorchEncoder, name: str, tower: Callable[[Tensor], Tensor], path: Path) -> None:
    """One tower's graph, checked by onnx: `pixels` float32 [n, 3, S, S] or `ids` int32 [n, length] -> `features`."""
    import onnx

    size = encoder.preprocess.size
    shape: dict[int, Any] = {0: torch.export.Dim("n", min=1)}
    if name == "image":
        example = torch.zeros(2, 3, size, size)
    else:
        # int32: ONNX Runtime has no ArgMax of 64-bit integers, which towers use to find the end of a text.
        example = torch.from_numpy(token_batch(encoder, _TEXTS[:2]))
        if encoder.cut_to_longest:
            shape[1] = torch.export.Dim("length", min=2, max=encoder.context_length)
    with _quiet(), torch.no_grad():
        try:
            program = torch.onnx.export(
                _Tower(tower).eval(), (example,), dynamo=True, dynamic_shapes=(shape,), opset_version=_OPSET,
                input_names=[_INPUTS[name]], output_names=["features"], verbose=False,
            )  # fmt: skip
        except Exception as error:  # the exporter has a dozen classes, and shows whole programs in their text
            raise RefusedError(
                f"torch cannot export the {name} tower of {encoder.name} to ONNX: {reason(error)}"
            ) from None
    assert program is not None
    from clipfilter.models import onnx_int8

    tensors = program.model.graph.initializers.values()
    large = sum(tensor.const_value.nbytes for tensor in tensors if tensor.const_value is not None) > onnx_int8.LARGE
    program.save(str(path), external_data=large)
    graph = onnx.load(path, load_external_data=False)
    _strip(graph)
    path.write_bytes(graph.SerializeToString())
    onnx.checker.check_model(str(path))


def _strip(model: Any) -> None:
    """Remove what the exporter notes about the code it came from: stack traces with this machine's paths."""
    graph = model.graph
    for item in (model, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del item.metadata_props[:]
        item.doc_string = ""


def token_batch(encoder: TorchEncoder, texts: Sequence[str]) -> np.ndarray:
    """int32 [n, length]: the ids of `texts` as the text tower gets them."""
    batch: np.ndarray = encoder.pad(encoder.tokens(texts)).numpy().astype(np.int32)
    return batch


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter reports its progress on both streams, in the log and in warnings; failures raise."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    sink = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


# --- tokenizer --------------------------------------------------------------------------------------------------------


def _write_tokenizer(encoder: TorchEncoder, work: Path, texts: Sequence[str]) -> dict[str, Any]:
    """Copy the tokenizer's file; its entry in config.json. RefusedError where the copy does not give the same ids."""
    known = encoder.tokenizer
    entry = {"pad_id": known.pad_id, "end_id": known.end_id, "pad_left": known.pad_left}
    entry |= _tokenizer_file(encoder, work)
    if load_tokenizer(work, entry)(texts) != known.encode(texts):
        raise RefusedError(f"the tokenizer of {encoder.name} cannot be exported: its copy gives other tokens")
    return entry


def _tokenizer_file(encoder: TorchEncoder, work: Path) -> dict[str, Any]:
    from open_clip.tokenizer import SimpleTokenizer, default_bpe, get_clean_fn
    from tokenizers import Tokenizer
    from tokenizers.implementations import BaseTokenizer

    held = inspect.getclosurevars(encoder.tokenizer.encode).nonlocals

    def cleaning(function: Any) -> str | None:
        return next((name for name in ("lower", "whitespace", "canonicalize") if get_clean_fn(name) is function), None)

    around = {"clean": cleaning(held.get("clean")), "zero_id": held.get("zero_id")}
    for item in held.values():
        if isinstance(item, SimpleTokenizer):
            shutil.copyfile(default_bpe(), work / "bpe.txt.gz")
            return {"kind": "clip-bpe", "file": "bpe.txt.gz", "clean": cleaning(item.clean_fn)}
        fast = getattr(item, "backend_tokenizer", item)  # most of transformers' tokenizers hold one of these
        if isinstance(fast, Tokenizer | BaseTokenizer):
            fast.save(str(work / "tokenizer.json"))
            return {"kind": "tokenizers", "file": "tokenizer.json", **around}
        if hasattr(item, "save_pretrained"):
            item.save_pretrained(str(work))
            return {"kind": "transformers", **around}
    raise RefusedError(f"the tokenizer of {encoder.name} is of a kind that cannot be exported")


# --- int8 -------------------------------------------------------------------------------------------------------------


def _to_int8(
    work: Path,
    config: dict[str, Any],
    encoder: TorchEncoder,
    calibration: Calibration,
    judge: Callable[[Encoder, Encoder], dict[str, Any]],
) -> None:
    """Replace each tower by its int8 form where that is faithful enough; measure what it costs."""
    from clipfilter.models import onnx_int8

    pixels, texts = calibration.pixels, calibration.texts
    batches = {
        "image": [encoder.normalise(pixels[part]).numpy() for part in _parts(len(pixels))],
        "text": [token_batch(encoder, texts[part]) for part in _parts(len(texts))],
    }
    reasons = {}
    for name in _TOWERS:
        found = _quantised(work / _FILES[name], batches[name])
        if isinstance(found, str):
            reasons[name] = found
        else:
            onnx_int8.remove(work / _FILES[name])
            onnx_int8.move(found, work / _FILES[name])
    if len(reasons) == len(_TOWERS):
        why = "; ".join(f"{name} tower: {why_not}" for name, why_not in reasons.items())
        raise RefusedError(f"no tower of {encoder.name} can be int8 ({why}): export it without --int8")
    weights = "".join(f"{name} {file_sha256(work / _FILES[name])}\n" for name in _TOWERS)
    config["fingerprint"] |= {"weights_sha256": hashlib.sha256(weights.encode()).hexdigest(), "quantisation": "int8"}
    config["quantisation"] = {
        "scheme": "7-bit weights per channel, 8-bit activations per row, smoothed",
        "towers": {name: "float32" if name in reasons else "int8" for name in _TOWERS},
        "reasons": reasons,
        "source_weights_sha256": encoder.fingerprint["weights_sha256"],
        "loss": None,
    }
    _write_config(work, config)
    config["quantisation"]["loss"] = judge(encoder, _load(work))
    _write_config(work, config)


def _parts(count: int) -> list[slice]:
    return [slice(at, at + _CALIBRATION_BATCH) for at in range(0, count, _CALIBRATION_BATCH)]


def _quantised(path: Path, batches: Sequence[np.ndarray]) -> Path | str:
    """The int8 form of the graph at `path`, in a file beside it; or why the graph stays as it is."""
    import onnx

    from clipfilter.models import onnx_int8

    model = onnx.load(path)
    if onnx_int8.mostly_convolutions(model):
        return "it is mostly convolutions, which lose too much"
    if not batches:
        return "there were no captions to calibrate on"
    threads = len(os.sched_getaffinity(0))
    candidate = path.with_name(f"int8-{path.name}")
    onnx_int8.save(onnx_int8.quantise(model, onnx_int8.activation_sizes(path, batches, threads)), candidate)
    cosine = _mean_cosine(path, candidate, batches, threads)
    if cosine < INT8_COSINE:
        onnx_int8.remove(candidate)
        return f"its mean cosine to float32 would be {cosine:.4f}"
    return candidate


def _mean_cosine(path: Path, other: Path, batches: Sequence[np.ndarray], threads: int) -> float:
    """Mean cosine of two graphs' outputs."""
    from clipfilter.models.onnx import open_session

    features = []
    for graph in (path, other):
        session = open_session(graph, threads)
        entry = session.get_inputs()[0].name
        rows = np.concatenate([session.run(None, {entry: batch})[0] for batch in batches])
        features.append(rows / np.linalg.norm(rows, axis=1, keepdims=True))
    return float(_cosines(*features).mean())


# --- the folder -------------------------------------------------------------------------------------------------------


def _load(work: Path) -> TorchEncoder:
    return load_onnx(f"{ONNX_PREFIX}{work}", device="cpu", dtype="fp32", threads=torch.get_num_threads())


def _cosines(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """float64 [n] of unit rows."""
    return np.asarray((left.astype(np.float64) * right).sum(axis=1))


def _write_config(work: Path, config: dict[str, Any]) -> None:
    names = sorted(path.name for path in work.iterdir() if path.name != CONFIG)
    config["files"] = {name: file_sha256(work / name) for name in names}
    (work / CONFIG).write_text(json.dumps(config, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _rename(work: Path, out: Path) -> None:
    try:
        work.rename(out)
    except OSError:
        raise RefusedError(f"{out} appeared while the model was exported: name a new folder, or remove it") from None


def _pictures(size: int) -> np.ndarray:
    """uint8 [4, 3, size, size]: smooth random pictures, where no photographs are at hand."""
    coarse = torch.from_numpy(np.random.default_rng(0).uniform(0, 255, (4, 3, 9, 9))).float()
    fine = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic").clamp(0, 255)
    return fine.to(torch.uint8).numpy()


def _readme(config: dict[str, Any]) -> str:
    size, dim, context = config["preprocess"]["size"], config["dim"], config["context_length"]
    length = "length" if config["cut_to_longest"] else str(context)
    return f"""# {config["source"]} in ONNX

Written by {config["created_by"]}; load it with `--model onnx:THIS_FOLDER`. The weights keep the licence of their source.

- `{IMAGE}`: `pixels` float32 [n, 3, {size}, {size}] (RGB / 255, minus mean, over std) to `features` float32 [n, {dim}]
- `{TEXT}`: `ids` int32 [n, {length}] (at most {context}, padded with {config["tokenizer"]["pad_id"]}) to `features`
- `{CONFIG}`: preprocessing, tokenizer, logit scale, hash of every file

Features are not normalised: divide each row by its length before taking cosines.
"""
