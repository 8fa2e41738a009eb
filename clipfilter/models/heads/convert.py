"""Published files of heads -> our safetensors; each format is read without running anything it contains."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from clipfilter.errors import RefusedError
from clipfilter.models.checkpoint import read_state_dict
from clipfilter.models.heads.file import FORMAT, HeadFile
from clipfilter.models.heads.registry import Format
from clipfilter.models.heads.savedmodel import read_classifier

_MAX_NPY_BYTES = 64 * 1024 * 1024
_EPSILON = 1e-7  # Keras standardises by max(sqrt(variance), epsilon)


def convert(path: Path, kind: Format, model: str) -> HeadFile:
    """The published head at `path`, for embeddings of `model`, as a file of ours.

    kind: "linear" (a state dict with weight [1, d] and bias), "affine-chain" (a state dict `layers.N.weight` of linear
    layers with only dropout between them), "rows" (.npy [2, d]: the score is the product with row 1 minus that with
    row 0), "autokeras" (a zipped TensorFlow SavedModel). Raises RefusedError where the file is damaged or another kind.
    """
    if kind == "rows":
        return _rows(path, model)
    if kind == "autokeras":
        return _autokeras(path, model)
    state = {name: tensor.float().numpy() for name, tensor in read_state_dict(path).items()}
    if kind == "linear":
        state = {f"layers.0.{name}": tensor for name, tensor in state.items()}
    numbers = sorted(
        {int(name.split(".")[1]) for name in state if name.split(".")[1:2][0].isdigit()} if state else set()
    )
    wanted = {f"layers.{number}.{part}" for number in numbers for part in ("weight", "bias")}
    if not numbers or set(state) != wanted or any(state[f"layers.{n}.weight"].ndim != 2 for n in numbers):
        raise RefusedError(f"the head {path} is no state dict of linear layers")
    return _file([(state[f"layers.{n}.weight"], state[f"layers.{n}.bias"]) for n in numbers], model)


def _file(
    layers: list[tuple[np.ndarray, np.ndarray]],
    model: str,
    *,
    activation: str = "none",
    final: str = "none",
    more: dict[str, np.ndarray] | None = None,
) -> HeadFile:
    tensors = dict(more or {})
    for number, (weight, bias) in enumerate(layers):
        tensors[f"layers.{number}.weight"] = np.ascontiguousarray(weight)
        tensors[f"layers.{number}.bias"] = np.ascontiguousarray(bias)
    metadata = {
        "clipfilter_head": FORMAT,
        "kind": "layers",
        "model": model,
        "dim": str(layers[0][0].shape[1]),
        "layers": ",".join(str(len(bias)) for _, bias in layers),
        "activation": activation,
        "final": final,
    }
    return HeadFile(tensors, metadata)


def _rows(path: Path, model: str) -> HeadFile:
    try:
        if path.stat().st_size > _MAX_NPY_BYTES:
            raise RefusedError(f"the head {path} is larger than {_MAX_NPY_BYTES // 2**20} MiB")
        rows = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise RefusedError(f"the head {path} is damaged or no .npy file of numbers ({str(error)[:100]})") from None
    if not isinstance(rows, np.ndarray) or rows.ndim != 2 or len(rows) != 2 or rows.dtype.kind != "f":
        raise RefusedError(f"the head {path} does not hold two rows of numbers")
    difference = rows[1:].astype(np.float64) - rows[:1].astype(np.float64)
    return _file([(difference, np.zeros(1))], model)


def _autokeras(path: Path, model: str) -> HeadFile:
    found = read_classifier(path)
    more = {
        "input.mean": found.mean.astype(np.float64),
        "input.scale": np.maximum(np.sqrt(found.variance.astype(np.float64)), _EPSILON),
    }
    for position, (keys, values) in found.vocabularies.items():
        if len(keys):
            more[f"vocabulary.{position}.keys"] = keys
            more[f"vocabulary.{position}.values"] = values.astype(np.float64)
    layers = [(kernel.T, bias) for kernel, bias in zip(found.kernels, found.biases, strict=True)]
    return _file(layers, model, activation="relu", final="sigmoid", more=more)
