"""One table per GPU: transformers eager and compiled, ours in process and through Triton, at the true sizes.

python benchmarks/gpu.py --work DIR [--device cuda|cpu] [--models large base] [--in-flight 1 8 32] [--rounds N]

Random weights; fp16 on a GPU, fp32 on a CPU (--device cpu, to try the script without a GPU). Answers of 15 tokens, as
captions are, and of 150, as detections of many objects are; 3 beams. From JPEG to token ids.
"""

import argparse
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
from bench import Pictures
from floor import decoder_weights
from florence2_export.export import export
from gpu_sides import LENGTHS, InProcess, Side, Transformers, profile_of, triton
from one_request import NUM_BEAMS
from tables import Table, environment
from transformers import Florence2ForConditionalGeneration

from florence2.generation.caches import CacheSizes
from florence2.generation.engine import Engine
from florence2.manifest import Manifest, Sizes

HERE = Path(__file__).resolve().parent


@dataclass
class Measured:
    seconds: list[float] = field(default_factory=list)
    """Of all that were in flight together."""
    memory: float = 0.0
    """GB of the device in use at most, the weights included."""
    step: float = 0.0
    first: float = 0.0


@contextmanager
def peak_memory(device: str) -> Iterator[list[float]]:
    """GB in use on the GPU, whoever uses them; nothing on a CPU."""
    peak, over = [0.0], threading.Event()

    def watch() -> None:
        while not over.wait(0.02):
            free, total = torch.cuda.mem_get_info()
            peak[0] = max(peak[0], (total - free) / 1e9)

    watcher = threading.Thread(target=watch, daemon=True)
    if device == "cuda":
        watcher.start()
    yield peak
    over.set()
    if watcher.is_alive():
        watcher.join()


def bandwidth(device: str) -> float:
    """Bytes read per second, the best of what a sum reaches."""
    block = torch.zeros(10**8, device=device)
    best = float("inf")
    for _ in range(20):
        _synchronise(device)
        started = time.perf_counter()
        block.sum()
        _synchronise(device)
        best = min(best, time.perf_counter() - started)
    return 4 * len(block) / best


def _synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def floor_of_step(weights: int, sizes: Sizes, in_flight: int, itemsize: int, speed: float) -> float:
    """Seconds in which a step's weights and cross-attention caches can be read."""
    entry = CacheSizes.of(sizes, 1).entry_values
    return itemsize * (weights + in_flight * sizes.image_tokens * entry) / speed


def measure(side: Side, in_flight: int, new_tokens: int, rounds: int, device: str, pictures: Pictures) -> Measured:
    found = Measured()
    engine: Engine | None = getattr(side, "engine", None)
    # The first ones compile, capture and fill caches.
    for _ in range(3):
        side([pictures.take() for _ in range(in_flight)], new_tokens)
    before = engine and (engine.counters.steps, engine.counters.decoder_seconds)
    firsts = engine and (engine.counters.first_tokens, engine.counters.first_token_seconds)
    with peak_memory(device) as peak:
        for _ in range(rounds):
            files = [pictures.take() for _ in range(in_flight)]
            started = time.perf_counter()
            answers = side(files, new_tokens)
            found.seconds.append(time.perf_counter() - started)
            assert [len(ids) for ids in answers] == [new_tokens + 1] * in_flight, (
                "random weights were to fill the length"
            )
    found.memory = peak[0]
    if engine and before and firsts:
        found.step = (engine.counters.decoder_seconds - before[1]) / (engine.counters.steps - before[0])
        found.first = (engine.counters.first_token_seconds - firsts[1]) / (engine.counters.first_tokens - firsts[0])
    return found


def compare(name: str, arguments: argparse.Namespace, speed: float) -> str:
    """One model; every side by itself, so that each one's memory is its own."""
    device, work = arguments.device, arguments.work
    checkpoint = work / name
    if not checkpoint.is_dir():
        subprocess.run([sys.executable, HERE / "random_checkpoint.py", checkpoint, name], check=True)
    precision, itemsize = ("fp16", 2) if device == "cuda" else ("fp32", 4)
    folder = work / f"{name}-{precision}"
    export(str(checkpoint), folder, precision=precision)
    sizes = Manifest.read(folder).sizes
    weights = decoder_weights(Florence2ForConditionalGeneration.from_pretrained(checkpoint))
    pictures = Pictures()
    rows = Table(
        "in flight",
        "tokens",
        "side",
        "s",
        "pictures/s",
        "against eager",
        "peak GB",
        "first token, ms",
        "step, ms",
        "floor, ms",
    )
    eager: dict[tuple[int, int], float] = {}

    def run(side: Side, title: str, in_flight: int) -> None:
        for new_tokens in LENGTHS.values():
            found = measure(side, in_flight, new_tokens, arguments.rounds, device, pictures)
            seconds = median(found.seconds)
            eager.setdefault((in_flight, new_tokens), seconds)
            floor = floor_of_step(weights, sizes, in_flight, itemsize, speed)
            rows.add(
                *(str(in_flight), str(new_tokens), title, f"{seconds:.3f}", f"{in_flight / seconds:.2f}"),
                f"{eager[in_flight, new_tokens] / seconds:.2f} x",
                f"{found.memory:.1f}" if found.memory else "",
                *((f"{1e3 * value:.2f}" if value else "") for value in (found.first, found.step)),
                f"{1e3 * floor:.2f}" if found.step else "",
            )
            print(rows.last, flush=True)

    for compiled in (False, True):
        side = Transformers(checkpoint, device, compiled)
        title = f"transformers, {precision}, {'torch.compile' if compiled else 'eager'}"
        for in_flight in arguments.in_flight:
            try:
                run(side, title, in_flight)
            except Exception as error:
                if not compiled:
                    raise
                print(f"{title} does not work: {str(error).splitlines()[0]}", flush=True)
                break
        del side
        if device == "cuda":
            torch.cuda.empty_cache()
    for in_flight in arguments.in_flight:
        run(InProcess(folder, device, in_flight), f"in process, {precision}", in_flight)
    with triton(folder, work, profile_of(device)) as side:
        for in_flight in arguments.in_flight:
            run(side, f"Triton, {precision}, profile {profile_of(device)}", in_flight)
    return f"## Florence-2-{name}\n\n{rows}"


def gpu_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "CPU"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="scratch folder; 12 GB")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--models", nargs="+", default=["large", "base"], choices=["base", "large"])
    parser.add_argument("--in-flight", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --device cpu tries the script on the CPU")
    arguments.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    speed = bandwidth(arguments.device)
    found = "\n".join(compare(name, arguments, speed) for name in arguments.models)
    name = gpu_name(arguments.device)
    target = HERE / "gpu" / f"{re.sub(r'[^a-z0-9]+', '-', name.lower())}.md"
    target.parent.mkdir(exist_ok=True)
    target.write_text(
        f"# {name}\n\n"
        f"Random weights, {NUM_BEAMS} beams, from JPEG to token ids; medians of {arguments.rounds}. transformers runs "
        "what is in flight as one batch.\nMemory is what the device holds, whoever uses it. Step and first token are "
        f"the engine's; the floor of a step is its\nweights and cross-attention caches read at {speed / 1e9:.0f} GB/s."
        f"\n\n{found}\n{environment('onnx')}"
    )
    print(target.read_text())


if __name__ == "__main__":
    main()
