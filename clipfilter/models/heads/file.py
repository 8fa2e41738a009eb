"""Heads in safetensors: what the file holds, checked before anything is computed with it."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from clipfilter.errors import RefusedError
from clipfilter.models.heads.network import Activation, Final, Layers, SafetyChecker, Vocabulary
from clipfilter.storage import replacing

FORMAT = "1"
MAX_BYTES = 256 * 1024 * 1024  # of the tensors that are read
MAX_HEADER_BYTES = 4 * 1024 * 1024
MAX_LAYERS = 32

#: Tensors of the safety checker as Stable Diffusion publishes it, among those of its image tower.
_CHECKER = ("concept_embeds", "concept_embeds_weights", "special_care_embeds", "special_care_embeds_weights")
_CHECKER_MODEL = {768: "ViT-L-14/openai"}


@dataclass(frozen=True)
class HeadFile:
    """The contents of a head's file: numpy tensors by name, and the metadata of the safetensors header.

    Metadata, all text: `clipfilter_head` ("1"), `kind` ("layers" or "safety-checker"), `model` (the embeddings it
    is for, as `--model` names them), `weights_sha256` (optional: of that model's weights, which then decide instead
    of the name), `dim`, and for layers: `layers` (their widths: "64,16,1"), `activation` (none, relu, tanh) and
    `final` (none, sigmoid).
    Tensors: `layers.I.weight` [out, in] and `layers.I.bias` [out]; optionally `input.mean` and `input.scale` [dim],
    and `vocabulary.J.keys` int64 [m] with `vocabulary.J.values` [m] for an input J that is read as a word.
    """

    tensors: dict[str, np.ndarray]
    metadata: dict[str, str]

    def write(self, path: Path) -> None:
        """Write it so that nobody sees half a file."""
        from safetensors.numpy import save

        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, shared=True) as unfinished:
            unfinished.write_bytes(save(self.tensors, self.metadata))

    def network(self, shown: str) -> Layers | SafetyChecker:
        """What the file describes; `shown` names it in refusals."""
        try:
            if self.metadata.get("kind") == "safety-checker":
                return _checker(self.tensors)
            return _layers(self.tensors, self.metadata)
        except KeyError as error:
            raise RefusedError(
                f"the head {shown} lacks {error.args[0]!r}; docs/reference/heads.md says what it holds"
            ) from None
        except _BadHead as error:
            raise RefusedError(f"the head {shown} cannot be used: {error}") from None


class _BadHead(ValueError):
    """One reason why a file is no head."""


def read_head_file(path: Path) -> HeadFile:
    """The head in this safetensors file: ours, or a published safety checker's. Raises RefusedError."""
    if not path.is_file():
        raise RefusedError(f"the head {path} does not exist or is no file")
    try:
        names, metadata = _header(path)
        checker = "clipfilter_head" not in metadata and set(_CHECKER) <= set(names)
        if checker:
            names = {name: names[name] for name in _CHECKER}
        elif metadata.get("clipfilter_head") != FORMAT:
            raise _BadHead(f"its header does not say clipfilter_head: {FORMAT} (docs/reference/heads.md)")
        if sum(_size(entry) for entry in names.values()) > MAX_BYTES:
            raise _BadHead(f"its tensors hold more than {MAX_BYTES // 2**20} MiB")
        tensors = _tensors(path, list(names))
    except _BadHead as error:
        raise RefusedError(f"the head {path} cannot be used: {error}") from None
    if checker:
        dim = int(tensors["concept_embeds"].shape[-1])
        if dim not in _CHECKER_MODEL:
            raise RefusedError(
                f"the safety checker {path} is for embeddings of {dim} numbers, which no known model has"
            )
        metadata = {"clipfilter_head": FORMAT, "kind": "safety-checker", "model": _CHECKER_MODEL[dim], "dim": str(dim)}
    return HeadFile(tensors, metadata)


def _header(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Entries by tensor name, and the metadata."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > MAX_HEADER_BYTES:
                raise _BadHead("it is no safetensors file, or its header is too large")
            header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", {})
        return header, {str(key): str(value) for key, value in metadata.items()}
    except (OSError, struct.error, ValueError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, _BadHead):
            raise
        raise _BadHead("it is damaged or no safetensors file") from None


def _size(entry: Any) -> int:
    try:
        start, stop = entry["data_offsets"]
        return int(stop) - int(start)
    except (KeyError, TypeError, ValueError):
        raise _BadHead("its header is damaged") from None


def _tensors(path: Path, names: list[str]) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return {name: np.asarray(file.get_tensor(name)) for name in names}
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError) as error:
        raise _BadHead(f"it is damaged or no safetensors file ({str(error)[:100]})") from None


def _numbers(tensors: dict[str, np.ndarray], name: str, *shape: int | None) -> np.ndarray:
    """The tensor as float64, of this shape (None: any) and finite."""
    value = tensors[name]
    if value.dtype.kind not in "fiu" or value.ndim != len(shape):
        raise _BadHead(f"{name} must be numbers in {len(shape)} dimensions")
    if any(want is not None and want != has for want, has in zip(shape, value.shape, strict=True)) or not value.size:
        wanted = " x ".join("n" if want is None else str(want) for want in shape)
        raise _BadHead(f"{name} is {' x '.join(map(str, value.shape))}, not {wanted}")
    numbers = value.astype(np.float64)
    if not np.isfinite(numbers).all():
        raise _BadHead(f"{name} holds a number that is not finite")
    return numbers


def _layers(tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> Layers:
    if metadata.get("kind", "layers") != "layers":
        raise _BadHead(f"its kind is {metadata['kind'][:40]!r}, but must be layers or safety-checker")
    try:
        dim, *widths = [int(part) for part in (metadata["dim"], *metadata["layers"].split(","))]
    except ValueError:
        raise _BadHead("dim must be a whole number and layers the widths of the layers, for example 64,16,1") from None
    if dim < 1 or len(widths) > MAX_LAYERS or widths[-1] != 1 or min(widths) < 1:
        raise _BadHead(
            f"layers are {metadata['layers'][:60]!r}, but must be at most {MAX_LAYERS} widths, the last of them 1"
        )
    for key, allowed in (("activation", get_args(Activation)), ("final", get_args(Final))):
        if metadata[key] not in allowed:
            raise _BadHead(f"{key} is {metadata[key][:40]!r}, but must be one of {', '.join(allowed)}")
    weights, biases = [], []
    inputs = dim
    for number, width in enumerate(widths):
        weights.append(_numbers(tensors, f"layers.{number}.weight", width, inputs))
        biases.append(_numbers(tensors, f"layers.{number}.bias", width))
        inputs = width
    standardised = "input.mean" in tensors or "input.scale" in tensors
    scale = _numbers(tensors, "input.scale", dim) if standardised else None
    if scale is not None and not (scale > 0).all():
        raise _BadHead("input.scale must be above 0 everywhere")
    vocabularies = _vocabularies(tensors, dim)
    known = 2 * len(widths) + 2 * standardised + 2 * len(vocabularies)
    if len(tensors) != known:
        raise _BadHead(f"it holds {len(tensors)} tensors where its metadata describes {known}")
    return Layers(
        weights=tuple(weights),
        biases=tuple(biases),
        activation=metadata["activation"],  # type: ignore[arg-type]
        final=metadata["final"],  # type: ignore[arg-type]
        mean=_numbers(tensors, "input.mean", dim) if standardised else None,
        scale=scale,
        vocabularies=vocabularies,
    )


def _vocabularies(tensors: dict[str, np.ndarray], dim: int) -> dict[int, Vocabulary]:
    found = {}
    for position in range(dim):
        name = f"vocabulary.{position}"
        if f"{name}.keys" in tensors:
            keys = tensors[f"{name}.keys"]
            if keys.dtype != np.int64 or keys.ndim != 1 or (np.diff(keys.astype(object)) <= 0).any():
                raise _BadHead(f"{name}.keys must be ascending int64 in one dimension")
            found[position] = Vocabulary(keys, _numbers(tensors, f"{name}.values", len(keys)))
    return found


def _checker(tensors: dict[str, np.ndarray]) -> SafetyChecker:
    concepts = _numbers(tensors, "concept_embeds", None, None)
    special = _numbers(tensors, "special_care_embeds", None, concepts.shape[1])
    return SafetyChecker(
        concepts=_unit("concept_embeds", concepts),
        thresholds=_numbers(tensors, "concept_embeds_weights", len(concepts)),
        special=_unit("special_care_embeds", special),
        special_thresholds=_numbers(tensors, "special_care_embeds_weights", len(special)),
    )


def _unit(name: str, rows: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    if not (norms > 1e-6).all():
        raise _BadHead(f"{name} holds a row of zeros")
    return np.asarray(rows / norms)
