"""Reads an AutoKeras classifier out of a zipped TensorFlow SavedModel, without TensorFlow.

Two files matter. `variables/variables.*` is a tensor bundle: a table of LevelDB's format whose values are protobuf
messages that say where each tensor lies in the data file. `saved_model.pb` is the graph: it holds the vocabularies of
inputs that the network reads as words, as constants. Field numbers are those of tensorflow/core/protobuf
(saved_model, tensor_bundle) and tensorflow/core/framework (graph, function, node_def, tensor). Every length is checked
against what is there before it is used.
"""

from __future__ import annotations

import math
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clipfilter.errors import RefusedError
from clipfilter.models.heads.network import NEGATIVE_ZERO

MAX_ARCHIVE_BYTES = 64 * 1024 * 1024
MAX_MEMBER_BYTES = 64 * 1024 * 1024
MAX_MEMBERS = 1000

_FLOAT, _STRING, _INT64 = 1, 7, 9  # DataType
_TABLE_MAGIC = 0xDB4775248B80FB57
_WORD = re.compile(rb"-?\d{1,9}\.\d{6}\Z")  # what "%f" writes of a number that an embedding can hold
_SPLIT = re.compile(r"(.*/split):output:(\d+)\Z")


class DamagedError(ValueError):
    """The bytes are not what the format says."""


@dataclass(frozen=True)
class AutoKerasClassifier:
    """Tensors of the classifier: standardisation, dense layers in order, vocabularies by input."""

    mean: np.ndarray  # float32 [d]
    variance: np.ndarray  # float32 [d]
    kernels: tuple[np.ndarray, ...]  # float32 [in, out]
    biases: tuple[np.ndarray, ...]  # float32 [out]
    vocabularies: dict[int, tuple[np.ndarray, np.ndarray]]  # sorted int64 words in millionths, int64 values


def read_classifier(path: Path) -> AutoKerasClassifier:
    """The classifier in this zip. Raises RefusedError where it is damaged or something else."""
    try:
        index, data, graph = _members(path)
        tensors = read_bundle(index, data)
        vocabularies = read_vocabularies(graph)
        return _classifier(tensors, vocabularies)
    except (
        DamagedError,
        zipfile.BadZipFile,
        zlib.error,
        OSError,
        EOFError,
        NotImplementedError,
        RuntimeError,
    ) as error:
        raise RefusedError(f"the archive {path} is damaged or no AutoKeras classifier ({str(error)[:160]})") from None
    except (ValueError, KeyError, IndexError, struct.error, OverflowError, zipfile.LargeZipFile) as error:
        reason = f"{type(error).__name__} {str(error)[:100]}"
        raise RefusedError(f"the archive {path} is damaged or no AutoKeras classifier ({reason})") from None


def _members(path: Path) -> tuple[bytes, bytes, bytes]:
    """variables.index, variables.data and saved_model.pb, read into memory and never unpacked to disk."""
    if path.stat().st_size > MAX_ARCHIVE_BYTES:
        raise DamagedError(f"it is larger than {MAX_ARCHIVE_BYTES // 2**20} MiB")
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if len(members) > MAX_MEMBERS:
            raise DamagedError(f"it has more than {MAX_MEMBERS} members")

        def read(ending: str) -> bytes:
            found = [member for member in members if f"/{member.filename}".endswith(ending)]
            if len(found) != 1:
                raise DamagedError(f"it has {len(found)} members {ending[1:]}")
            with archive.open(found[0]) as file:
                content = file.read(MAX_MEMBER_BYTES + 1)
            if len(content) > MAX_MEMBER_BYTES:
                raise DamagedError(f"{found[0].filename[-60:]} is larger than {MAX_MEMBER_BYTES // 2**20} MiB")
            return content

        return (
            read("/variables/variables.index"),
            read("/variables/variables.data-00000-of-00001"),
            read("/saved_model.pb"),
        )


def _classifier(
    tensors: dict[str, np.ndarray], vocabularies: dict[int, tuple[np.ndarray, np.ndarray]]
) -> AutoKerasClassifier:
    found: dict[tuple[int, str], np.ndarray] = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"layer_with_weights-(\d{1,4})/(\w+)/\.ATTRIBUTES/VARIABLE_VALUE", name)
        if match:
            found[int(match[1]), match[2]] = tensor
    dense = sorted(number for number, attribute in found if attribute == "kernel")
    standard = [number for number, attribute in found if attribute == "mean"]
    if not dense or len(standard) != 1:
        raise DamagedError("it has no dense layers, or no single standardisation")
    mean, variance = found[standard[0], "mean"], found[standard[0], "variance"]
    kernels = tuple(found[number, "kernel"] for number in dense)
    biases = tuple(found[number, "bias"] for number in dense)
    width = len(mean)
    if any(not 0 <= position < width for position in vocabularies):
        raise DamagedError("a vocabulary belongs to no input")
    for kernel, bias in zip(kernels, biases, strict=True):
        if kernel.ndim != 2 or bias.ndim != 1 or kernel.shape != (width, len(bias)):
            raise DamagedError("its layers do not fit each other")
        width = len(bias)
    if width != 1 or mean.ndim != 1 or mean.shape != variance.shape or (variance < 0).any():
        raise DamagedError("it is no classifier with one output")
    return AutoKerasClassifier(mean, variance, kernels, biases, vocabularies)


# ---------------------------------------------------------------- protobuf


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 70:
        if at >= len(data):
            raise DamagedError("a message ends too early")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise DamagedError("a number has too many bytes")


def fields(message: bytes | memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(field number, value) of a protobuf message: an int for varints, bytes for everything else."""
    data = memoryview(message)
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield tag >> 3, value
            continue
        if kind == 2:
            size, at = _varint(data, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise DamagedError(f"a message has a field of wire type {kind}")
        if size > len(data) - at:
            raise DamagedError("a message ends too early")
        yield tag >> 3, data[at : at + size]
        at += size


def _messages(message: bytes | memoryview, number: int) -> list[memoryview]:
    return [value for found, value in fields(message) if found == number and isinstance(value, memoryview)]


def _message(message: bytes | memoryview, number: int) -> memoryview:
    found = _messages(message, number)
    if not found:
        raise DamagedError(f"a message lacks its field {number}")
    return found[-1]


def _integer(message: bytes | memoryview, number: int) -> int:
    """An int64 field, 0 where it is not written."""
    found = [value for tag, value in fields(message) if tag == number and isinstance(value, int)]
    value = found[-1] if found else 0
    return value - (1 << 64) if value >= 1 << 63 else value


def _text(message: bytes | memoryview, number: int) -> str:
    found = _messages(message, number)
    return bytes(found[-1]).decode("utf-8", "replace") if found else ""


def _shape(message: memoryview) -> tuple[int, ...]:
    """TensorShapeProto."""
    shape = tuple(_integer(dimension, 1) for dimension in _messages(message, 2))
    if any(size < 0 for size in shape) or len(shape) > 8:
        raise DamagedError("a tensor has an impossible shape")
    return shape


# ---------------------------------------------------------------- the tensor bundle


def read_bundle(index: bytes, data: bytes) -> dict[str, np.ndarray]:
    """The float32 tensors of a bundle with one data file, by name."""
    found = {}
    for key, value in _table(index):
        if not key:  # BundleHeaderProto
            if _integer(value, 1) != 1 or _integer(value, 2) != 0:
                raise DamagedError("its tensors are in several files or of the other byte order")
            continue
        if _integer(value, 1) != _FLOAT:
            continue
        shapes = _messages(value, 2)
        shape = _shape(shapes[-1]) if shapes else ()
        offset, size = _integer(value, 4), _integer(value, 5)
        if size != 4 * math.prod(shape) or not 0 <= offset <= len(data) - size:
            raise DamagedError(f"the tensor {key[:60]!r} lies outside of its file")
        tensor = np.frombuffer(data, "<f4", count=size // 4, offset=offset).reshape(shape)
        if not np.isfinite(tensor).all():
            raise DamagedError(f"the tensor {key[:60]!r} holds numbers that are not finite")
        found[key.decode("utf-8", "replace")] = tensor
    return found


def _table(content: bytes) -> Iterator[tuple[bytes, memoryview]]:
    """Keys and values of a table: a footer, an index block, data blocks, keys with shared prefixes."""
    data = memoryview(content)
    if len(data) < 48 or struct.unpack("<Q", data[-8:])[0] != _TABLE_MAGIC:
        raise DamagedError("its index of tensors has no footer")
    footer = data[-48:-8]
    _, at = _varint(footer, 0)  # the meta index: offset,
    _, at = _varint(footer, at)  # and size
    offset, at = _varint(footer, at)
    size, _ = _varint(footer, at)
    for _, handle in _block(data, offset, size):
        start, at = _varint(handle, 0)
        length, _ = _varint(handle, at)
        yield from _block(data, start, length)


def _block(data: memoryview, offset: int, size: int) -> Iterator[tuple[bytes, memoryview]]:
    if size < 4 or offset + size + 5 > len(data):  # behind a block: its compression and a checksum
        raise DamagedError("a block of its index lies outside of the file")
    if data[offset + size] != 0:
        raise DamagedError("its index is compressed")
    block = data[offset : offset + size]
    (restarts,) = struct.unpack("<I", block[-4:])
    end = len(block) - 4 * (restarts + 1)
    if end < 0:
        raise DamagedError("a block of its index is too short")
    at, key = 0, b""
    while at < end:
        shared, at = _varint(block, at)
        own, at = _varint(block, at)
        length, at = _varint(block, at)
        if shared > len(key) or own > end - at or length > end - at - own:
            raise DamagedError("an entry of its index ends too late")
        key = key[:shared] + bytes(block[at : at + own])
        at += own
        yield key, block[at : at + length]
        at += length


# ---------------------------------------------------------------- the graph


@dataclass
class _Node:
    name: str
    op: str
    inputs: list[str]
    message: memoryview


def _node(message: memoryview) -> _Node:
    """NodeDef, its attributes still to be read."""
    return _Node(
        _text(message, 1), _text(message, 2), [bytes(item).decode() for item in _messages(message, 3)], message
    )


def _attribute(node: _Node, name: str) -> memoryview:
    """AttrValue of this name."""
    for entry in _messages(node.message, 5):
        if _text(entry, 1) == name:
            return _message(entry, 2)
    raise DamagedError(f"the node {node.name[-60:]!r} lacks {name!r}")


def _called(node: _Node) -> str:
    """Name of the function that a call node runs."""
    return _text(_message(_attribute(node, "f"), 10), 1)


@dataclass(frozen=True)
class _Function:
    arguments: list[str]
    nodes: list[_Node]


def read_vocabularies(saved_model: bytes) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """By input: the words it may be (int64, sorted, in millionths) and what each becomes (int64).

    Follows the graph from the network to the constants: input J is column J of a split, made a word by AsString, looked
    up in a table that is an argument of the function; the call of the function says which table that is, and another
    call fills that table from two constants.
    """
    graph = _message(_message(saved_model, 2), 2)
    nodes = {node.name: node for node in map(_node, _messages(graph, 1))}
    functions = {}
    for message in _messages(_message(graph, 2), 1):
        signature = _message(message, 1)
        functions[_text(signature, 1)] = message
    network = _only("network", [name for name in functions if "__wrapped_model_" in name])
    wrapper = _only("serving function", [name for name in functions if "_signature_wrapper_" in name])
    inner = _function(functions[network])
    outer = _function(functions[wrapper])
    inside = _only("call of the network", [n for n in outer.nodes if n.op in _CALLS and _called(n) == network])
    outside = _only("call of the model", [n for n in nodes.values() if n.op in _CALLS and _called(n) == wrapper])
    given = dict(zip(outer.arguments, outside.inputs, strict=True))
    argument = {name: given[passed] for name, passed in zip(inner.arguments, inside.inputs, strict=True)}

    constants: dict[str, tuple[_Node, _Node]] = {}
    for node in nodes.values():
        if node.op in _CALLS and len(node.inputs) == 3:
            words, values = (nodes.get(name) for name in node.inputs[1:])
            if words is not None and values is not None and words.op == values.op == "Const":
                constants[node.inputs[0]] = (words, values)
    as_string = {node.name: node for node in inner.nodes if node.op == "AsString"}
    found = {}
    for node in inner.nodes:
        if node.op == "LookupTableFindV2":
            table, word, default = node.inputs
            source = as_string[word.removesuffix(":output:0")]
            match = _SPLIT.match(source.inputs[0])
            if match is None:
                raise DamagedError("a word is not read from a column of the embedding")
            fallback = nodes[argument[default]]
            if fallback.op != "Const" or _int64(_tensor(fallback)).tolist() != [0]:
                raise DamagedError("unknown words do not become 0")
            listed, becomes = (_tensor(constant) for constant in constants[argument[table]])
            found[int(match[2])] = _vocabulary(_strings(listed), _int64(becomes))
    return found


_CALLS = ("StatefulPartitionedCall", "PartitionedCall")


def _only(what: str, found: Sequence[Any]) -> Any:
    if len(found) != 1:
        raise DamagedError(f"its graph has {len(found)} candidates for the {what}")
    return found[0]


def _function(message: memoryview) -> _Function:
    """FunctionDef."""
    signature = _message(message, 1)
    return _Function(
        [_text(item, 1) for item in _messages(signature, 2)], [_node(item) for item in _messages(message, 3)]
    )


def _tensor(constant: _Node) -> memoryview:
    return _message(_attribute(constant, "value"), 8)


def _strings(tensor: memoryview) -> list[bytes]:
    if _integer(tensor, 1) != _STRING:
        raise DamagedError("a vocabulary is not of words")
    words = [bytes(word) for word in _messages(tensor, 8)]
    if len(words) != math.prod(_shape(_message(tensor, 2))):
        raise DamagedError("a vocabulary is not complete")
    return words


def _int64(tensor: memoryview) -> np.ndarray:
    """TensorProto of int64: as raw bytes, or as numbers of which the last fills up the shape."""
    if _integer(tensor, 1) != _INT64:
        raise DamagedError("a vocabulary does not give whole numbers")
    count = math.prod(_shape(_message(tensor, 2)))
    raw = _messages(tensor, 4)
    if raw and len(raw[-1]):
        if len(raw[-1]) != 8 * count:
            raise DamagedError("a vocabulary is not complete")
        return np.frombuffer(raw[-1], "<i8")
    numbers: list[int] = []
    for tag, value in fields(tensor):
        if tag == 10 and isinstance(value, int):
            numbers.append(value)
        elif tag == 10 and isinstance(value, memoryview):
            at = 0
            while at < len(value):
                number, at = _varint(value, at)
                numbers.append(number)
    if not 0 < len(numbers) <= count or (count > 1 and len(numbers) != count):
        raise DamagedError("a vocabulary is not complete")
    return np.array([number - (1 << 64) if number >= 1 << 63 else number for number in numbers], dtype=np.int64)


def _vocabulary(words: list[bytes], values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Words that "%f" can write as sorted millionths; no other word can ever be met."""
    if len(words) != len(values):
        raise DamagedError("a vocabulary has words without numbers")
    pairs: dict[int, int] = {}
    for word, value in zip(words, values.tolist(), strict=True):
        if _WORD.match(word):
            number = int(word.replace(b".", b""))
            pairs[int(NEGATIVE_ZERO) if number == 0 and word.startswith(b"-") else number] = value
    keys = sorted(pairs)
    return np.array(keys, dtype=np.int64), np.array([pairs[key] for key in keys], dtype=np.int64)
