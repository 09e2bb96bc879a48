"""What the machine allows, and how far the graphs are from it: Florence-2-base, fp32, random weights.

python benchmarks/floor.py --work DIR

Memory bandwidth and matrix speed are the best that torch or ONNX Runtime reach here on work that is nothing else.
"""

import argparse
import os
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from bench import PROMPT_IDS, timed
from one_request import NUM_BEAMS, prepare
from onnx.parser import parse_model
from onnxruntime import InferenceSession, SessionOptions
from tables import Table, environment
from torch.utils.flop_counter import FlopCounterMode
from transformers import Florence2ForConditionalGeneration

from florence2.generation.caches import CacheSizes
from florence2.generation.engine import Engine
from florence2.generation.request import Request
from florence2.generation.runner import GraphRunner
from florence2.generation.scheduler import Scheduler
from florence2.generation.sessions import session
from florence2.generation.settings import GenerationSettings
from florence2.manifest import Manifest, Sizes, read_json

SIDE = 2048
MATMUL = """<ir_version: 10, opset_import: ["" : 20]>
g (float[N, N] a, float[N, N] b) => (float[N, N] c) { c = MatMul(a, b) }"""


def bandwidth() -> float:
    """Bytes read per second."""
    block = torch.zeros(100_000_000)
    return 4 * len(block) / min(timed(block.sum) for _ in range(20))


def matrix_speed() -> float:
    """FLOP per second."""
    options = SessionOptions()
    options.intra_op_num_threads = len(os.sched_getaffinity(0))
    graph = InferenceSession(parse_model(MATMUL).SerializeToString(), options, providers=["CPUExecutionProvider"])
    matrix = torch.rand(SIDE, SIDE)
    feeds = {"a": matrix.numpy(), "b": matrix.numpy()}
    works = (lambda: torch.mm(matrix, matrix), lambda: graph.run(None, feeds))
    return 2 * SIDE**3 / min(timed(work) for _ in range(20) for work in works)


@torch.inference_mode()
def vision_flops(model: Any, sizes: Sizes) -> int:
    with FlopCounterMode(display=False) as counter:
        model.get_image_features(torch.zeros(1, 3, sizes.image_height, sizes.image_width))
    return counter.get_total_flops()


def decoder_weights(model: Any) -> int:
    """Numbers that a step reads: cross-attention's keys and values are made by the encoder graph."""
    decoder = model.model.language_model.decoder
    cross = [layer.encoder_attn for layer in decoder.layers]
    made_before = [attention.k_proj for attention in cross] + [attention.v_proj for attention in cross]
    return _count(decoder) - sum(map(_count, made_before))


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def step_seconds(export: Path, caches: CacheSizes, sizes: Sizes, requests: int) -> float:
    """Of requests that run together from the start, 50 tokens each."""
    engine = Engine(GraphRunner(export, caches), Scheduler(caches, requests, requests))
    config = read_json(export / "generation_config.json")
    settings = GenerationSettings.from_config(config, sizes.max_position_embeddings)
    settings = settings.override(num_beams=NUM_BEAMS, max_new_tokens=50)
    for seed in range(requests):
        shape = (sizes.image_tokens, sizes.d_model)
        features = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
        engine.submit(Request(features, PROMPT_IDS, settings, respond=lambda _: None))
    engine.finish()
    return engine.counters.decoder_seconds / engine.counters.steps


def table(checkpoint: Path, export: Path) -> str:
    sizes = Manifest.read(export).sizes
    read_speed, speed = bandwidth(), matrix_speed()
    model = Florence2ForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
    rows = Table("", "work", "floor, ms", "measured, ms", "measured / floor")

    def add(name: str, work: str, least: float, measured: float) -> None:
        rows.add(name, work, f"{1e3 * least:.1f}", f"{1e3 * measured:.1f}", f"{measured / least:.2f}")

    graph = session(export / "vision_encoder.onnx")
    pixels = np.zeros((1, sizes.image_height, sizes.image_width, 3), np.uint8)
    measured = median(timed(lambda: graph.run(None, {"pixels": pixels})) for _ in range(6))
    flops = vision_flops(model, sizes)
    add("vision encoder", f"{flops / 1e9:.0f} GFLOP", flops / speed, measured)

    weights = decoder_weights(model)
    for requests in (1, 8):
        caches = CacheSizes.of(sizes, rows=requests * NUM_BEAMS)
        read = 4 * weights + requests * (sizes.image_tokens + len(PROMPT_IDS)) * 4 * caches.entry_values
        flops = 2 * weights * requests * NUM_BEAMS
        measured = step_seconds(export, caches, sizes, requests)
        work = f"{read / 1e6:.0f} MB read, {flops / 1e9:.1f} GFLOP"
        add(f"decoding step, {requests * NUM_BEAMS} rows", work, max(read / read_speed, flops / speed), measured)
    return (
        f"Memory is read at {read_speed / 1e9:.0f} GB/s, matrices are multiplied at {speed / 1e9:.0f} GFLOP/s. A step "
        "reads the decoder's weights\nonce, the output layer's included, and the cross-attention caches of every "
        f"request; the floor is the longer of\nreading and multiplying.\n\n{rows}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="scratch folder; 3 GB")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    found = table(*prepare(arguments.work))
    print(found)
    target = Path(__file__).resolve().with_suffix(".md")
    target.write_text(f"# What the machine allows\n\n{found}\n{environment()}")


if __name__ == "__main__":
    main()
