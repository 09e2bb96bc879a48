"""A torch module -> an ONNX file in the precision that is asked for."""

import contextlib
import copy
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from onnx import ModelProto, TensorProto
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.onnx_model import ONNXModel
from torch import nn
from torch.onnx import ONNXProgram

OPSET = 20
"""The first with Gelu as one operator; TensorRT 10 and Triton's ONNX Runtime read it."""

PRECISIONS = ("fp32", "fp16", "int8")
"""fp16 is for GPUs; bf16 drifts eight times as far and is no faster there. int8 is for CPUs: 8-bit weights, and
activations whose scale is found as they come (benchmarks/int8/graphs.md says why not static)."""


@dataclass(frozen=True)
class Signature:
    """What `torch.onnx.export` needs to know: an example in the weights' type, names, which dimensions vary."""

    example: Callable[[torch.dtype], tuple]
    dynamic_shapes: tuple
    input_names: list[str]
    output_names: list[str]


def write_onnx(module: nn.Module, signature: Signature, path: Path, precision: str, external_data: bool) -> None:
    """`external_data`: weights in PATH.data beside the graph, else in the graph's own file, which ends at 2 GB."""
    save(trace(module, signature, precision == "fp16"), path, precision, external_data)


def trace(module: nn.Module, signature: Signature, half: bool) -> ONNXProgram:
    # A copy: the checkpoint's own weights are what the graphs are compared with.
    module, dtype = (copy.deepcopy(module).half(), torch.float16) if half else (module, torch.float32)
    with quiet("torch.onnx"):
        program = torch.onnx.export(
            module.eval(),
            signature.example(dtype),
            dynamo=True,
            dynamic_shapes=signature.dynamic_shapes,
            input_names=signature.input_names,
            output_names=signature.output_names,
            opset_version=OPSET,
            verbose=False,
        )
    assert program is not None
    return program


def save(program: ONNXProgram, path: Path, precision: str, external_data: bool) -> None:
    """`program`: traced in half for fp16, else not."""
    if precision == "int8":
        _quantize(program.model_proto, path, external_data)
    else:
        program.save(path, external_data=external_data)


def _quantize(model: ModelProto, path: Path, external_data: bool) -> None:
    """Every multiplication with a weight; what two activations are multiplied to, convolutions and the embedding
    stay float32."""
    _untie(model)
    found = ONNXModel(model)
    # Gemm has no dynamically quantized kernel.
    found.replace_gemm_with_matmul()
    # Shapes that the exporter noted, and that hold no more after that.
    del found.model.graph.value_info[:]
    with quiet("root"):
        quantize_dynamic(
            found.model,
            path,
            op_types_to_quantize=["MatMul"],
            # A scale per output channel costs nothing, and the weights of attention differ much between channels.
            per_channel=True,
            weight_type=QuantType.QInt8,
            use_external_data_format=external_data,
            extra_options={"DefaultTensorType": TensorProto.FLOAT},
        )


def _untie(model: ModelProto) -> None:
    """Gives a Gemm a copy of its weights where the embedding reads them too: they are about to be transposed."""
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    others = {name for node in model.graph.node if node.op_type != "Gemm" for name in node.input}
    for node in model.graph.node:
        if node.op_type == "Gemm" and node.input[1] in others and node.input[1] in weights:
            own = model.graph.initializer.add()
            own.CopyFrom(weights[node.input[1]])
            own.name = node.input[1] = f"{own.name}.untied"


@contextlib.contextmanager
def quiet(*loggers: str) -> Iterator[None]:
    """The exporter's remarks on axis names and transformers' on lengths given twice help nobody here."""
    levels: dict[Any, int] = {logging.getLogger(name): logging.getLogger(name).level for name in loggers}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for found in levels:
                found.setLevel(logging.ERROR)
            yield
    finally:
        for found, level in levels.items():
            found.setLevel(level)
