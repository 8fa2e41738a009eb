"""Rewrites the linear layers of an ONNX graph to int8 arithmetic that any x86 CPU runs fast and exactly.

Weights have 7 bits and one scale per output channel: without VNNI a CPU multiplies unsigned by signed bytes and adds
neighbouring products in 16 bits, and only below 2 * 255 * 64 = 32 640 that sum never saturates. Activations have 8
bits and one scale per row (token), taken from the row itself: a tensor-wide scale, as DynamicQuantizeLinear has it,
would make an embedding depend on the other images of its batch. Channels whose activations are much larger than their
neighbours' would cost the others their precision; a part of that size moves into the weights beforehand (SmoothQuant
with alpha = 0.5, Xiao et al. 2022, arXiv:2211.10438). Everything else stays float32: convolutions, embeddings,
attention, norms.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

_WEIGHT_LIMIT = 64
_ACTIVATION_LIMIT = 127
_ZERO_POINT = 128
_SHARED: dict[str, np.ndarray] = {
    "int8_step": np.array(1 / _ACTIVATION_LIMIT, np.float32),
    "int8_tiny": np.array(1e-20, np.float32),  # a row of zeros has a scale too
    "int8_one": np.array(1, np.float32),
    "int8_zero_point": np.array(_ZERO_POINT, np.uint8),
    "int8_last_axis": np.array([-1], np.int64),
}


@dataclass(frozen=True)
class Linear:
    """A MatMul, or a Gemm that is one: `source` [..., k] times `weight` [k, n], plus `bias` [n] where there is one."""

    node: NodeProto
    source: str
    weight: np.ndarray
    bias: str | None


def linear_layers(model: onnx.ModelProto) -> list[Linear]:
    """Every product with a constant matrix in the graph, in its order."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    found = []
    for node in model.graph.node:
        if node.op_type not in ("MatMul", "Gemm") or node.input[1] not in constants:
            continue
        weight = numpy_helper.to_array(constants[node.input[1]])
        bias = None
        if node.op_type == "Gemm":
            given = {item.name: helper.get_attribute_value(item) for item in node.attribute}
            if given.get("alpha", 1.0) != 1 or given.get("beta", 1.0) != 1 or given.get("transA", 0):
                continue
            weight = weight.T if given.get("transB", 0) else weight
            bias = node.input[2] if len(node.input) > 2 else None
        if weight.ndim == 2 and weight.dtype == np.float32:
            found.append(Linear(node, node.input[0], weight, bias))
    return found


def mostly_convolutions(model: onnx.ModelProto) -> bool:
    """Whether the graph's work is in convolutions, which stay float32 here."""
    kinds = Counter(node.op_type for node in model.graph.node)
    return kinds["Conv"] > len(linear_layers(model))


def activation_sizes(path: Path, batches: Iterable[np.ndarray], threads: int) -> dict[str, np.ndarray]:
    """Root sum of squares per channel of what flows into each linear layer of the float32 graph at `path`.

    batches: inputs of the graph. Returns float64 [k] by the name of the tensor.
    """
    import tempfile

    from clipfilter.models.onnx import open_session

    model = onnx.load(path)
    layers = {layer.source: layer.weight.shape[0] for layer in linear_layers(model)}
    names = {}
    for number, (source, width) in enumerate(layers.items()):
        name = f"int8_sum_{number}"
        shape = numpy_helper.from_array(np.array([-1, width], np.int64), f"{name}_shape")
        axis = numpy_helper.from_array(np.array([0], np.int64), f"{name}_axis")
        model.graph.initializer.extend([shape, axis])
        model.graph.node.append(helper.make_node("Reshape", [source, shape.name], [f"{name}_rows"]))
        model.graph.node.append(helper.make_node("ReduceSumSquare", [f"{name}_rows", axis.name], [name], keepdims=0))
        model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [width]))
        names[name] = source
    totals = {source: np.zeros(width) for source, width in layers.items()}
    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder) / "sums.onnx")
        session = open_session(Path(folder) / "sums.onnx", threads)
        entry = session.get_inputs()[0].name
        for batch in batches:
            for name, sums in zip(names, session.run(list(names), {entry: batch}), strict=True):
                totals[names[name]] += sums
    return {source: np.sqrt(total) for source, total in totals.items()}


def quantise(model: onnx.ModelProto, sizes: dict[str, np.ndarray]) -> onnx.ModelProto:
    """The graph with its linear layers in int8; `sizes` as `activation_sizes` gives them. Changes `model` itself."""
    layers = linear_layers(model)
    by_output = {layer.node.output[0]: layer for layer in layers}
    smoothing = {source: _smoothing([x for x in layers if x.source == source], size) for source, size in sizes.items()}
    builder = _Builder()
    for node in model.graph.node:
        layer = by_output.get(node.output[0])
        if layer is None:
            builder.nodes.append(node)
        else:
            builder.linear(layer, smoothing[layer.source])
    del model.graph.node[:]
    model.graph.node.extend(builder.nodes)
    used = {name for node in model.graph.node for name in node.input}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend([*kept, *builder.constants.values()])
    del model.graph.value_info[:]  # shapes of tensors that are no longer there; the runtime infers its own
    return model


def _smoothing(layers: list[Linear], size: np.ndarray) -> np.ndarray:
    """float32 [k]: what each channel is divided by before it is rounded, and its weights multiplied with."""
    weight = np.max([np.abs(layer.weight).max(axis=1) for layer in layers], axis=0)
    size, weight = (np.maximum(values, 1e-3 * values.mean() + 1e-12) for values in (size, weight))
    ratio = np.sqrt(size / size.mean() / (weight / weight.mean()))
    return np.asarray(ratio, np.float32)


class _Builder:
    """Collects nodes and constants; layers that read the same tensor share its rounding."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.constants: dict[str, TensorProto] = {}
        self._rounded: dict[str, tuple[str, str]] = {}
        for name, value in _SHARED.items():
            self._constant(name, value)

    def linear(self, layer: Linear, smoothing: np.ndarray) -> None:
        rounded, row_scale = self._round(layer.source, smoothing)
        weight = layer.weight * smoothing[:, None]
        scale = np.maximum(np.abs(weight).max(axis=0), 1e-20) / _WEIGHT_LIMIT
        whole = np.clip(np.round(weight / scale), -_WEIGHT_LIMIT, _WEIGHT_LIMIT).astype(np.int8)
        out = layer.node.output[0]
        matrix = self._constant(f"{out}_weight_int8", whole)
        columns = self._constant(f"{out}_weight_scale", scale.astype(np.float32))
        product = self._node("MatMulInteger", [rounded, matrix, "int8_zero_point"], f"{out}_int32")
        product = self._node("Cast", [product], f"{out}_float", to=TensorProto.FLOAT)
        product = self._node("Mul", [product, columns], f"{out}_columns")
        if layer.bias is None:
            self._node("Mul", [product, row_scale], out)
        else:
            product = self._node("Mul", [product, row_scale], f"{out}_rows")
            self._node("Add", [product, layer.bias], out)

    def _round(self, source: str, smoothing: np.ndarray) -> tuple[str, str]:
        """(uint8 [..., k] around the zero point, float32 [..., 1] scales) of the tensor `source` [..., k]."""
        if source not in self._rounded:
            divisor = self._constant(f"{source}_smoothing", np.asarray(1 / smoothing, np.float32))
            smooth = self._node("Mul", [source, divisor], f"{source}_smooth")
            size = self._node("Abs", [smooth], f"{source}_abs")
            size = self._node("ReduceMax", [size, "int8_last_axis"], f"{source}_max", keepdims=1)
            size = self._node("Max", [size, "int8_tiny"], f"{source}_size")
            scale = self._node("Mul", [size, "int8_step"], f"{source}_scale")
            share = self._node("Div", [smooth, scale], f"{source}_share")
            rounded = self._node("QuantizeLinear", [share, "int8_one", "int8_zero_point"], f"{source}_uint8")
            self._rounded[source] = (rounded, scale)
        return self._rounded[source]

    def _node(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [output], name=output, **attributes))
        return output

    def _constant(self, name: str, value: np.ndarray) -> str:
        self.constants[name] = numpy_helper.from_array(value, name)
        return name


#: Protobuf cannot hold 2 GiB in one message; tensors of larger graphs lie in a file beside it.
LARGE = 1_800_000_000


def save(model: onnx.ModelProto, path: Path) -> None:
    """Write a graph; its tensors go to `<path>.data` when they are too large for one file."""
    size = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    if size < LARGE:
        onnx.save(model, path)
    else:
        onnx.save(model, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=1024)


def move(path: Path, target: Path) -> None:
    """Rename a graph; one with a file of tensors beside it is rewritten, since it names that file."""
    if not path.with_name(f"{path.name}.data").exists():
        path.rename(target)
        return
    save(onnx.load(path), target)
    remove(path)


def remove(path: Path) -> None:
    """Delete a graph and the file of tensors beside it."""
    path.unlink()
    path.with_name(f"{path.name}.data").unlink(missing_ok=True)
