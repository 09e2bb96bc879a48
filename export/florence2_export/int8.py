"""Every multiplication with a weight in 8 bits: what two activations are multiplied to, convolutions and the embedding
stay float32.

Nobody's numbers depend on what else is in the batch. In encoder and decoder each row of an activation, a token of one
request, has its own scale; ONNX Runtime's `quantize_dynamic` gives one scale to the whole tensor. The vision encoder
does that too, which is faster for its many rows, and takes one picture a run.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, helper, numpy_helper

LEVELS = 127
"""Of an activation, on both sides of ZERO_POINT."""
ZERO_POINT = 128
WEIGHT_LEVELS = 64
"""Half of what 8 bits hold: without VNNI, x86 adds pairs of products in 16 bits (vpmaddubsw in MLAS' kernels for AVX2
and AVX-512), and 2 x 255 x 64 still fits. Unsigned weights would have all 8 bits, but no kernel with VNNI or AMX."""


def quantize(model: ModelProto, one_picture: bool) -> None:
    """In place. `one_picture`: a run of this graph is one picture, whose activations have one scale each."""
    graph = model.graph
    if one_picture:
        for value in (*graph.input, *graph.output):
            value.type.tensor_type.shape.dim[0].dim_value = 1
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    constants: dict[str, np.ndarray] = {
        "int8.last_axis": np.array([-1]),
        "int8.step": np.array(1 / LEVELS, np.float32),
        "int8.zero_point": np.array(ZERO_POINT, np.uint8),
    }
    nodes: list[NodeProto] = []
    rows: dict[str, tuple[str, str]] = {}
    for layer in _linear_layers(graph, weights):
        if isinstance(layer, NodeProto):
            nodes.append(layer)
            continue
        names = f"{layer.output}.weight", f"{layer.output}.scale"
        constants |= zip(names, quantized_weight(layer.weight), strict=True)
        if one_picture:
            inputs = layer.activation, *names, "", layer.bias
            _add(nodes, "DynamicQuantizeMatMul", inputs, layer.output, domain="com.microsoft")
            continue
        if layer.activation not in rows:
            rows[layer.activation] = _quantize_rows(nodes, layer.activation)
        _multiply_rows(nodes, layer, *rows[layer.activation], *names)
    del graph.node[:]
    graph.node.extend(nodes)
    # With shapes at hand ONNX Runtime fuses SkipLayerNormalization, which is slower than its parts.
    del graph.value_info[:]
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    used = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))


@dataclass(frozen=True)
class _Linear:
    activation: str
    weight: NDArray[np.float32]
    """[K, N]"""
    bias: str
    """Name of [N]; "" for none."""
    output: str


def _linear_layers(graph: GraphProto, weights: dict[str, np.ndarray]) -> Iterator[NodeProto | _Linear]:
    """The nodes in their order, multiplications with weights as what they are, the Add of a bias included."""
    readers: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    biases: set[str] = set()
    for node in graph.node:
        if node.output[0] in biases:
            continue
        if node.op_type not in ("MatMul", "Gemm") or node.input[1] not in weights:
            yield node
            continue
        activation, name, *added = node.input
        weight, output = weights[name], node.output[0]
        if any(attribute.name == "transB" and attribute.i for attribute in node.attribute):
            weight = weight.T
        following = readers.get(output, [])
        if node.op_type == "MatMul" and len(following) == 1 and following[0].op_type == "Add":
            added = [other for other in following[0].input if other in weights and weights[other].ndim == 1]
            if added:
                output = following[0].output[0]
                biases.add(output)
        yield _Linear(activation, weight, added[0] if added else "", output)


def _quantize_rows(nodes: list[NodeProto], name: str) -> tuple[str, str]:
    """-> names of u8 [..., N] and of each row's largest absolute value, f32 [..., 1]."""
    absolute = _add(nodes, "Abs", (name,), f"{name}.absolute")
    largest = _add(nodes, "ReduceMax", (absolute, "int8.last_axis"), f"{name}.largest")
    # Of a row of zeros it makes numbers of no meaning, which are multiplied by 0 again.
    share = _add(nodes, "Div", (name, largest), f"{name}.share")
    quantized = _add(nodes, "QuantizeLinear", (share, "int8.step", "int8.zero_point"), f"{name}.quantized")
    return quantized, largest


def _multiply_rows(
    nodes: list[NodeProto], layer: _Linear, quantized: str, largest: str, weight: str, scale: str
) -> None:
    # ONNX Runtime makes this of MatMulInteger and its scales, where that of the activation is a single number.
    inputs = quantized, weight, "int8.step", scale, "int8.zero_point"
    product = _add(nodes, "MatMulIntegerToFloat", inputs, f"{layer.output}.product", domain="com.microsoft")
    if layer.bias:
        product = _add(nodes, "Mul", (product, largest), f"{layer.output}.scaled")
        _add(nodes, "Add", (product, layer.bias), layer.output)
    else:
        _add(nodes, "Mul", (product, largest), layer.output)


def quantized_weight(weight: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """[K, N] -> the same in steps of a scale [N] per output channel."""
    scale = np.maximum(np.abs(weight).max(axis=0), np.finfo(np.float32).tiny) / WEIGHT_LEVELS
    return np.round(weight / scale).astype(np.int8), scale


def _add(nodes: list[NodeProto], operator: str, inputs: tuple[str, ...], output: str, domain: str = "") -> str:
    nodes.append(helper.make_node(operator, inputs, [output], name=output, domain=domain))
    return output
