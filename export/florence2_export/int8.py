"""Every multiplication with a weight in 8 bits: what two activations are multiplied to, convolutions and the embedding
stay float32.

Each row of an activation, a token of one request or a patch of one picture, has its own scale, so that its numbers do
not depend on what else is in the batch; ONNX Runtime's `quantize_dynamic` gives one scale to the whole tensor.
"""

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, helper, numpy_helper

LEVELS = 127
"""Of an activation, on both sides of ZERO_POINT."""
ZERO_POINT = 128
WEIGHT_LEVELS = 64
"""Half of what 8 bits hold: without VNNI, x86 adds pairs of products in 16 bits (vpmaddubsw in MLAS' kernels for AVX2
and AVX-512), and 2 x 255 x 64 still fits. Unsigned weights would have all 8 bits, but no kernel with VNNI or AMX."""


def quantize(model: ModelProto) -> None:
    """In place."""
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    constants = {
        "int8.last_axis": np.array([-1]),
        "int8.least": np.array(np.finfo(np.float32).tiny),
        "int8.step": np.array(1 / LEVELS, np.float32),
        "int8.zero_point": np.array(ZERO_POINT, np.uint8),
    }
    nodes: list[NodeProto] = []
    rows: dict[str, tuple[str, str]] = {}
    for node in graph.node:
        if node.op_type not in ("MatMul", "Gemm") or node.input[1] not in weights:
            nodes.append(node)
            continue
        activation, output = node.input[0], node.output[0]
        if activation not in rows:
            rows[activation] = _quantize_rows(nodes, activation)
        quantized, largest = rows[activation]
        weight = numpy_helper.to_array(weights[node.input[1]])
        transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
        names = f"{output}.weight", f"{output}.scale"
        constants |= zip(names, quantized_weight(weight.T if transposed else weight), strict=True)
        # ONNX Runtime makes this of MatMulInteger and its scales, where that of the activation is a single number.
        inputs = quantized, names[0], "int8.step", names[1], "int8.zero_point"
        product = _add(nodes, "MatMulIntegerToFloat", inputs, f"{output}.product", domain="com.microsoft")
        if node.op_type == "Gemm" and len(node.input) > 2:
            scaled = _add(nodes, "Mul", (product, largest), f"{output}.scaled")
            _add(nodes, "Add", (scaled, node.input[2]), output)
        else:
            _add(nodes, "Mul", (product, largest), output)
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


def _quantize_rows(nodes: list[NodeProto], name: str) -> tuple[str, str]:
    """-> names of u8 [..., N] and of each row's largest absolute value, f32 [..., 1]."""
    # One pass less over the activation than with Abs.
    highest, lowest = (
        _add(nodes, operator, (name, "int8.last_axis"), f"{name}.{operator}") for operator in ("ReduceMax", "ReduceMin")
    )
    negated = _add(nodes, "Neg", (lowest,), f"{name}.negated")
    # A row of zeros is not divided by 0.
    largest = _add(nodes, "Max", (highest, negated, "int8.least"), f"{name}.largest")
    share = _add(nodes, "Div", (name, largest), f"{name}.share")
    quantized = _add(nodes, "QuantizeLinear", (share, "int8.step", "int8.zero_point"), f"{name}.quantized")
    return quantized, largest


def quantized_weight(weight: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """[K, N] -> the same in steps of a scale [N] per output channel."""
    scale = np.maximum(np.abs(weight).max(axis=0), np.finfo(np.float32).tiny) / WEIGHT_LEVELS
    return np.round(weight / scale).astype(np.int8), scale


def _add(nodes: list[NodeProto], operator: str, inputs: tuple[str, ...], output: str, domain: str = "") -> str:
    nodes.append(helper.make_node(operator, inputs, [output], name=output, domain=domain))
    return output
