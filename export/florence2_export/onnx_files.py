"""A torch module -> an ONNX file in the precision that is asked for."""

import contextlib
import copy
import gc
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from onnxscript import ir
from torch import nn
from torch.onnx import ONNXProgram

from florence2_export.int8 import quantize

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
    one_picture: bool = False
    """In 8 bits the batch is 1, see `quantize`."""


def write_onnx(module: nn.Module, signature: Signature, path: Path, precision: str, external_data: bool) -> None:
    """`external_data`: weights in PATH.data beside the graph, else in the graph's own file, which ends at 2 GB."""
    save(trace(module, signature, precision == "fp16"), signature, path, precision, external_data)


def trace(module: nn.Module, signature: Signature, half: bool) -> ONNXProgram:
    # A copy: the checkpoint's own weights are what the graphs are compared with.
    module, dtype = (copy.deepcopy(module).half(), torch.float16) if half else (module, torch.float32)
    with quiet("torch.onnx"), uncollected():
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
    # Where in this machine's files each operator came from: the same checkpoint gives the same bytes everywhere.
    ClearMetadataAndDocStringPass()(program.model)
    return program


def save(program: ONNXProgram, signature: Signature, path: Path, precision: str, external_data: bool) -> None:
    """`program`: traced in half for fp16, else not."""
    if precision == "int8":
        model = program.model_proto
        quantize(model, signature.one_picture)
        ir.save(ir.from_proto(model), path, external_data=f"{path.name}.data" if external_data else None)
    else:
        program.save(path, external_data=external_data)


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """The exporter makes millions of objects that stay until its end; to look through them for garbage takes a tenth of
    its time."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


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
