"""8 bits on a CPU: pictures per second against transformers in fp32 and bf16, and what each graph is quantized to.

python benchmarks/int8.py --work DIR8 [--rounds N] [SECTION ...]

Florence-2-base with random weights, all cores. Sections: graphs, pictures; both by default.
"""

import argparse
import io
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx
import torch
from bench import PROMPT_IDS, Pictures, timed
from floor import step_seconds
from florence2_client import Florence2Client
from florence2_export.export import export
from florence2_release.install import install
from florence2_release.server import TritonServer
from one_request import NEW_TOKENS, NUM_BEAMS, TASK, prepare
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.onnx_model import ONNXModel
from PIL import Image
from tables import Table, environment
from transformers import Florence2ForConditionalGeneration, Florence2Processor

from florence2.generation.caches import CacheSizes
from florence2.generation.sessions import session
from florence2.manifest import Manifest

IN_FLIGHT = 8
MATMULS: dict[str, Any] = {"op_types_to_quantize": ["MatMul"], "extra_options": {"DefaultTensorType": 1}}
HERE = Path(__file__).resolve().parent


# --- pictures per second ---


def pictures(work: Path, rounds: int) -> str:
    """From JPEG to token ids with 8 in flight, in turns with transformers in batches of 1 and 8."""
    checkpoint, whole = prepare(work)
    small = work / "base-int8"
    export(str(checkpoint), small, precision="int8")
    processor = Florence2Processor.from_pretrained(checkpoint)
    files = Pictures()
    works: dict[str, Callable[[], tuple[int, float]]] = {}
    with ExitStack() as stack:
        for name, folder in (("Triton, int8", small), ("Triton, fp32", whole)):
            repository = stack.enter_context(tempfile.TemporaryDirectory(dir=work))
            install(folder, Path(repository))
            server = stack.enter_context(TritonServer(repository))
            server.wait_ready()
            works[name] = lambda url=server.grpc_url: _served(url, [files.take() for _ in range(4 * IN_FLIGHT)])
        for dtype in ("float32", "bfloat16"):
            model = Florence2ForConditionalGeneration.from_pretrained(checkpoint, dtype=getattr(torch, dtype)).eval()
            for batch in (1, IN_FLIGHT):
                works[f"transformers, {dtype}, batch {batch}"] = lambda model=model, batch=batch: _transformers(
                    model, processor, [files.take() for _ in range(batch)]
                )
        rates: dict[str, list[float]] = {}
        for turn in range(rounds + 1):
            for name, measure in works.items():
                count, seconds = measure()
                # The first turn warms up.
                if turn:
                    rates.setdefault(name, []).append(count / seconds)
                print(f"{name}: {count / seconds:.3f} pictures per second", flush=True)
    rows = Table("pictures per second", "median", "min", "max", "int8 is faster by")
    ours = median(rates["Triton, int8"])
    for name, found in rates.items():
        rows.add(name, *(f"{figure(found):.3f}" for figure in (median, min, max)), f"{ours / median(found):.2f}")
    return f"{NUM_BEAMS} beams, {NEW_TOKENS} tokens; {4 * IN_FLIGHT} pictures a round through Triton.\n\n{rows}"


def _served(url: str, files: Sequence[bytes]) -> tuple[int, float]:
    def ask(file: bytes) -> None:
        with Florence2Client(url) as client:
            ids = client.run(TASK, file, num_beams=NUM_BEAMS, max_new_tokens=NEW_TOKENS).token_ids
        assert len(ids) == NEW_TOKENS + 1, "random weights were to fill the length"

    started = time.perf_counter()
    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        list(pool.map(ask, files))
    return len(files), time.perf_counter() - started


@torch.inference_mode()
def _transformers(model: Any, processor: Any, files: Sequence[bytes]) -> tuple[int, float]:
    started = time.perf_counter()
    images = [Image.open(io.BytesIO(file)).convert("RGB") for file in files]
    inputs = processor(images=images, text=[TASK] * len(images), return_tensors="pt").to(model.dtype)
    model.generate(**inputs, num_beams=NUM_BEAMS, max_new_tokens=NEW_TOKENS)
    return len(files), time.perf_counter() - started


# --- graph by graph ---


class _Calibration(CalibrationDataReader):
    def __init__(self, feeds: Sequence[dict[str, np.ndarray]]) -> None:
        self._feeds: Iterator[dict[str, np.ndarray]] = iter(feeds)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._feeds, None)


def graphs(work: Path, rounds: int) -> str:
    """Ways to 8 bits: milliseconds of one run, in turns, and the largest difference from fp32 in percent of the largest
    value."""
    checkpoint, whole = prepare(work)
    small = work / "base-int8"
    export(str(checkpoint), small, precision="int8")
    sizes = Manifest.read(whole).sizes
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (4, 1, sizes.image_height // 64, sizes.image_width // 64, 3)).astype(np.uint8)
    pictures = [{"pixels": block.repeat(64, axis=1).repeat(64, axis=2)} for block in blocks]
    shape = (1, sizes.image_tokens, sizes.d_model)
    ids = {"input_ids": PROMPT_IDS[None], "attention_mask": np.ones_like(PROMPT_IDS)[None]}
    prompts = [{"image_features": rng.normal(size=shape).astype(np.float32), **ids} for _ in range(4)]
    rows = Table("graph", "way", "ms", "difference, %")
    for name, feeds in (("vision_encoder", pictures), ("encoder", prompts)):
        ways = {"fp32": whole / f"{name}.onnx", "shipped": small / f"{name}.onnx"}
        ways["a scale per activation"] = _quantized_dynamically(whole / f"{name}.onnx", work)
        ways["static"] = _quantized_statically(whole / f"{name}.onnx", work, feeds[1:])
        sessions = {way: session(path) for way, path in ways.items()}
        reference = sessions["fp32"].run(None, feeds[0])[0]
        times: dict[str, list[float]] = {}
        for _ in range(rounds + 1):
            for way, graph in sessions.items():
                times.setdefault(way, []).append(timed(lambda graph=graph, feeds=feeds: graph.run(None, feeds[0])))
        for way, graph in sessions.items():
            difference = np.abs(graph.run(None, feeds[0])[0] - reference).max() / np.abs(reference).max()
            rows.add(name, way, f"{1e3 * median(times[way][1:]):.0f}", f"{100 * difference:.1f}")
    others = _with_decoder(small, _quantized_dynamically(whole / "decoder.onnx", work), work / "ways" / "export")
    folders = {"fp32": whole, "shipped": small, "a scale per activation": others}
    for requests in (1, IN_FLIGHT):
        caches = CacheSizes.of(sizes, rows=requests * NUM_BEAMS)
        times = {way: [] for way in folders}
        for _ in range(rounds):
            for way, folder in folders.items():
                times[way].append(step_seconds(folder, caches, sizes, requests))
        for way, found in times.items():
            rows.add(f"decoder, {requests * NUM_BEAMS} rows", way, f"{1e3 * median(found):.1f}", "")
    return str(rows)


def _with_decoder(export: Path, decoder: Path, folder: Path) -> Path:
    """`folder`: an export whose other files are links."""
    folder.mkdir(exist_ok=True)
    for file in export.iterdir():
        link = folder / file.name
        link.unlink(missing_ok=True)
        link.symlink_to((decoder if file.name == decoder.name else file).resolve())
    return folder


def _quantized_dynamically(graph: Path, work: Path) -> Path:
    """ONNX Runtime's own way, a scale for a whole activation."""
    path = work / "ways" / graph.name
    path.parent.mkdir(exist_ok=True)
    model = ONNXModel(_untied(onnx.load(graph)))
    # Gemm has no dynamically quantized kernel.
    model.replace_gemm_with_matmul()
    quantize_dynamic(
        model.model,
        path,
        weight_type=QuantType.QInt8,
        per_channel=True,
        # On processors without VNNI its sums overflow without it.
        reduce_range=True,
        **MATMULS,
    )
    return path


def _untied(model: onnx.ModelProto) -> onnx.ModelProto:
    """`replace_gemm_with_matmul` transposes weights in place: those that the embedding reads too are copied first."""
    # Shapes that the exporter noted, and that hold no more after that.
    del model.graph.value_info[:]
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    shared = {name for node in model.graph.node if node.op_type != "Gemm" for name in node.input}
    for node in model.graph.node:
        if node.op_type == "Gemm" and node.input[1] in shared and node.input[1] in weights:
            own = model.graph.initializer.add()
            own.CopyFrom(weights[node.input[1]])
            own.name = node.input[1] = f"{own.name}.own"
    return model


def _quantized_statically(graph: Path, work: Path, feeds: Sequence[dict[str, np.ndarray]]) -> Path:
    path = work / "ways" / f"{graph.stem}-static.onnx"
    path.parent.mkdir(exist_ok=True)
    model = onnx.load(graph)
    del model.graph.value_info[:]
    quantize_static(
        model,
        path,
        _Calibration(feeds),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        reduce_range=True,
        # Only what weights are multiplied with: attention's own products lose too much.
        nodes_to_quantize=_with_weights(model),
        **MATMULS,
    )
    return path


def _with_weights(model: onnx.ModelProto) -> list[str]:
    weights = {tensor.name for tensor in model.graph.initializer}
    return [node.name for node in model.graph.node if node.op_type == "MatMul" and node.input[1] in weights]


SECTIONS: dict[str, Callable[[Path, int], str]] = {"graphs": graphs, "pictures": pictures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="scratch folder; 5 GB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    arguments = parser.parse_args()
    unknown = set(arguments.sections) - set(SECTIONS)
    if unknown:
        parser.error(f"unknown section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    arguments.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    folder = HERE / "int8"
    folder.mkdir(exist_ok=True)
    for name in arguments.sections or SECTIONS:
        section = SECTIONS[name]
        found = section(arguments.work, arguments.rounds)
        print(found, flush=True)
        head = f"# int8, {name}\n\n{(section.__doc__ or '').strip()}\n\n"
        (folder / f"{name}.md").write_text(f"{head}{found}\n{environment('onnx', 'nvidia-pytriton')}")


if __name__ == "__main__":
    main()
