"""Many requests at once: through Triton in flight, against transformers and against whole batches.

python benchmarks/in_flight.py --work /tmp/in_flight [--rounds N] [SECTION ...]

Florence-2-base with random weights, fp32, all cores. Sections: steps, pictures, mixed, tasks, scale; all of them by
default. Each is measured in turns with what it is compared with, and written to in_flight/SECTION.md.
"""

import argparse
import io
import os
import random
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import tritonclient.grpc as triton
from florence2_client import Florence2Client
from florence2_release.install import install
from florence2_release.server import TritonServer
from one_request import NEW_TOKENS, NUM_BEAMS, TASK, prepare
from PIL import Image
from report import Table, environment
from transformers import Florence2ForConditionalGeneration, Florence2Processor
from transformers.modeling_outputs import BaseModelOutput

from florence2.generation.caches import CacheSizes
from florence2.generation.engine import Engine
from florence2.generation.request import Request
from florence2.generation.runner import GraphRunner
from florence2.generation.scheduler import Scheduler
from florence2.generation.settings import GenerationSettings
from florence2.manifest import Manifest, read_json

IN_FLIGHT = 8
SHORT, LONG, SHORT_SHARE = 15, 150, 0.7
PROMPT_IDS = np.array([0, 500, 600, 700, 800, 900, 1000, 1100, 1200, 2])
TASKS = (
    *("<OD>", "<CAPTION>", "<DETAILED_CAPTION>", "<MORE_DETAILED_CAPTION>"),
    *("<OCR>", "<OCR_WITH_REGION>", "<DENSE_REGION_CAPTION>", "<REGION_PROPOSAL>"),
)
LEVELS = (1, 2, 4, 8, 16, 32, 64)


def picture(seed: int) -> bytes:
    """A JPEG of 1280 x 960 that no other seed gives."""
    noise = np.random.default_rng(seed).integers(0, 256, (12, 16, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize((1280, 960), Image.Resampling.BICUBIC).save(file, "JPEG")
    return file.getvalue()


class Pictures:
    """Every picture is new, so that nothing is remembered from before."""

    def __init__(self) -> None:
        self._seeds, self._lock = iter(range(10**6)), threading.Lock()

    def take(self) -> bytes:
        with self._lock:
            seed = next(self._seeds)
        return picture(seed)


@dataclass
class Bench:
    """What the sections share."""

    checkpoint: Path
    export: Path
    server: TritonServer
    rounds: int
    pictures: Pictures = field(default_factory=Pictures)

    def __post_init__(self) -> None:
        self.sizes = Manifest.read(self.export).sizes
        positions = self.sizes.max_position_embeddings
        self.settings = GenerationSettings.from_config(read_json(self.export / "generation_config.json"), positions)
        shape = (2 * IN_FLIGHT, self.sizes.image_tokens, self.sizes.d_model)
        self._features = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        self.processor = Florence2Processor.from_pretrained(self.checkpoint)
        self.model = Florence2ForConditionalGeneration.from_pretrained(self.checkpoint, dtype=torch.float32).eval()

    def ask(self, file: bytes, task: str = TASK, new_tokens: int = NEW_TOKENS) -> list[int]:
        with Florence2Client(self.server.grpc_url) as client:
            return client.ask(file, task, num_beams=NUM_BEAMS, max_new_tokens=new_tokens).token_ids.tolist()

    @torch.inference_mode()
    def transformers(self, files: Sequence[bytes]) -> list[list[int]]:
        images = [Image.open(io.BytesIO(file)).convert("RGB") for file in files]
        inputs = self.processor(images=images, text=[TASK] * len(images), return_tensors="pt")
        return self.model.generate(**inputs, num_beams=NUM_BEAMS, max_new_tokens=NEW_TOKENS).tolist()

    @torch.inference_mode()
    def transformers_text(self, batch: int, new_tokens: int) -> None:
        """Decoding alone, from what the encoder made."""
        hidden = BaseModelOutput(torch.randn(batch, self.sizes.image_tokens + len(PROMPT_IDS), self.sizes.d_model))
        self.model.generate(encoder_outputs=hidden, num_beams=NUM_BEAMS, max_new_tokens=new_tokens)

    def metrics(self) -> dict[str, float]:
        """beam_search's own, by name."""
        with urllib.request.urlopen(self.server.metrics_url) as response:
            lines = response.read().decode().splitlines()
        found = (line.rsplit(" ", 1) for line in lines if line.startswith("florence2_"))
        return {name.partition("{")[0]: float(value) for name, value in found}

    def features(self, seed: int) -> np.ndarray:
        """[N, D]"""
        return self._features[seed % len(self._features)]


def timed(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def in_flight(count: int, work: Sequence[Callable[[], Any]]) -> list[float]:
    """Closed loop: `count` at any time until all is done -> seconds of each, in the order of `work`."""
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(timed, work))


def steps(bench: Bench) -> str:
    """One decoding step, Triton's by its own metrics, transformers' as what 80 more tokens take."""
    times: dict[tuple[str, int], list[float]] = {}
    for _ in range(bench.rounds):
        for requests in (1, IN_FLIGHT):
            before = bench.metrics()
            in_flight(requests, [partial(ask_features, bench, seed, NEW_TOKENS) for seed in range(requests)])
            after = wait_idle(bench)
            grown = {name: after[name] - before[name] for name in after}
            ours = grown["florence2_decoder_seconds_total"] / grown["florence2_steps_total"]
            more, less = (timed(partial(bench.transformers_text, requests, tokens)) for tokens in (100, 20))
            times.setdefault(("Triton", requests), []).append(ours * 1e3)
            times.setdefault(("transformers", requests), []).append((more - less) / 80 * 1e3)
    rows = Table("one decoding step, ms", "Triton", "transformers", "ratio")
    for requests in (1, IN_FLIGHT):
        ours, theirs = (median(times[side, requests]) for side in ("Triton", "transformers"))
        rows.add(f"{requests * NUM_BEAMS} rows", f"{ours:.1f}", f"{theirs:.1f}", f"{theirs / ours:.2f}")
    return (
        f"Triton: the decoder's time over its steps, of requests that arrive together ({IN_FLIGHT - 1} of the steps of "
        f"{IN_FLIGHT} requests are\ntaken before all of them run). transformers: `generate` on given encoder output, "
        f"what 80 of 100 tokens take.\n\n{rows}"
    )


def ask_features(bench: Bench, seed: int, new_tokens: int) -> None:
    """beam_search alone, over gRPC."""
    tensors = {
        "image_features": bench.features(seed)[None],
        "input_ids": PROMPT_IDS[None],
        "num_beams": np.array([[NUM_BEAMS]], np.int32),
        "max_new_tokens": np.array([[new_tokens]], np.int32),
    }
    inputs = []
    for name, value in tensors.items():
        inputs.append(triton.InferInput(name, value.shape, triton_type(value)))
        inputs[-1].set_data_from_numpy(value)
    client = triton.InferenceServerClient(bench.server.grpc_url)
    ids = client.infer("beam_search", inputs).as_numpy("token_ids")
    client.close()
    assert ids.shape[1] == new_tokens + 1, "random weights were to fill the length"


def triton_type(value: np.ndarray) -> str:
    return {"float32": "FP32", "int64": "INT64", "int32": "INT32"}[value.dtype.name]


def wait_idle(bench: Bench) -> dict[str, float]:
    """The metrics, once the last step is in them and Triton has gathered them."""
    time.sleep(2.5)
    return bench.metrics()


def pictures(bench: Bench) -> str:
    """From JPEG to token ids: pictures per second with 8 in flight, against transformers in batches."""
    rates: dict[str, list[float]] = {}
    for _ in range(bench.rounds):
        files = [bench.pictures.take() for _ in range(2 * IN_FLIGHT)]
        seconds = timed(partial(in_flight, IN_FLIGHT, [partial(bench.ask, file) for file in files]))
        rates.setdefault(f"Triton, {IN_FLIGHT} in flight", []).append(len(files) / seconds)
        for batch in (1, IN_FLIGHT):
            seconds = timed(partial(bench.transformers, files[:batch]))
            rates.setdefault(f"transformers, batch {batch}", []).append(batch / seconds)
    rows = Table("pictures per second", "median", "min", "max")
    for name, found in rates.items():
        rows.add(name, *(f"{figure(found):.3f}" for figure in (median, min, max)))
    ours, *theirs = (median(found) for found in rates.values())
    return (
        f"{NUM_BEAMS} beams, {NEW_TOKENS} tokens; {2 * IN_FLIGHT} pictures a round through Triton.\n\n"
        f"{rows}\nTriton / the better of transformers': {ours / max(theirs):.2f}\n"
    )


def mixed(bench: Bench) -> str:
    """Answers of different lengths on given image features: in flight, against the same graphs in whole batches."""
    choose = random.Random(0)
    found: dict[str, list[tuple[float, float]]] = {}
    for _ in range(bench.rounds):
        lengths = [SHORT if choose.random() < SHORT_SHARE else LONG for _ in range(10 * IN_FLIGHT)]
        for name, run in (("in flight, Triton", mixed_in_flight), *whole_batches(bench)):
            started = time.perf_counter()
            latencies = run(bench, lengths)
            rate = len(lengths) / (time.perf_counter() - started)
            short = [latency for latency, length in zip(latencies, lengths, strict=True) if length == SHORT]
            found.setdefault(name, []).append((rate, median(short)))
    rows = Table("mixed load", "requests per second", "p50 of the short ones, s")
    medians = {name: tuple(map(median, zip(*figures, strict=True))) for name, figures in found.items()}
    for name, (rate, short) in medians.items():
        rows.add(name, f"{rate:.2f}", f"{short:.2f}")
    (rate, short), (batch_rate, batch_short) = list(medians.values())[:2]
    return (
        f"{SHORT_SHARE:.0%} of {SHORT} tokens, the rest of {LONG}, {IN_FLIGHT} in flight, {NUM_BEAMS} beams. The "
        "batches run in process, on the\nsame graphs, and their requests are all there when a batch starts.\n\n"
        f"{rows}\nRequests per second: {rate / batch_rate:.2f} x the whole batches'. p50 of the short ones: "
        f"{short / batch_short:.2f} of theirs.\n"
    )


def mixed_in_flight(bench: Bench, lengths: Sequence[int]) -> list[float]:
    return in_flight(IN_FLIGHT, [partial(ask_features, bench, seed, length) for seed, length in enumerate(lengths)])


def whole_batches(bench: Bench) -> Iterator[tuple[str, Callable[[Bench, Sequence[int]], list[float]]]]:
    """As everyone who batches `generate` does: the batch takes as long as its slowest member, all rows to the end; and
    what it would be if finished requests left it."""
    caches = CacheSizes.of(bench.sizes, rows=IN_FLIGHT * NUM_BEAMS)
    runner = GraphRunner(bench.export, caches)

    def run(leave: bool, bench: Bench, lengths: Sequence[int]) -> list[float]:
        latencies: list[float] = []
        for first in range(0, len(lengths), IN_FLIGHT):
            batch = lengths[first : first + IN_FLIGHT]
            engine = Engine(runner, Scheduler(caches, IN_FLIGHT, IN_FLIGHT))
            for seed, length in enumerate(batch, first):
                tokens = length if leave else max(batch)
                settings = bench.settings.override(num_beams=NUM_BEAMS, max_new_tokens=tokens)
                engine.submit(Request(bench.features(seed), PROMPT_IDS, settings, respond=lambda _: None))
            latencies += [timed(engine.finish)] * len(batch)
        return latencies

    yield "whole batches", partial(run, False)
    yield "whole batches that finished requests leave", partial(run, True)


def tasks(bench: Bench) -> str:
    """Eight tasks at once, on one picture or each on its own, with the response cache."""
    times: dict[str, list[float]] = {}
    for _ in range(bench.rounds):
        for name, count in (("8 tasks on 8 pictures", 8), ("8 tasks on one picture", 1)):
            files = [bench.pictures.take() for _ in range(count)] * (8 // count)
            work = [partial(bench.ask, file, task) for file, task in zip(files, TASKS, strict=True)]
            times.setdefault(name, []).append(timed(partial(in_flight, 8, work)))
    rows = Table("eight tasks, seconds", "median", "min", "max")
    for name, found in times.items():
        rows.add(name, *(f"{figure(found):.2f}" for figure in (median, min, max)))
    apart, together = (median(found) for found in times.values())
    return f"Each answer of {NEW_TOKENS} tokens.\n\n{rows}\nOn one picture {apart / together:.2f} x faster.\n"


def scale(bench: Bench) -> str:
    """From JPEG to token ids, 1 to 64 in flight."""
    rows = Table("in flight", "pictures per second", "p50, s", "p95, s")
    rates, tails = [], []
    for level in LEVELS:
        work = [partial(bench.ask, bench.pictures.take()) for _ in range(max(12, level + level // 2))]
        started = time.perf_counter()
        latencies = in_flight(level, work)
        rates.append(len(work) / (time.perf_counter() - started))
        tails.append(float(np.percentile(latencies, 95)))
        rows.add(str(level), f"{rates[-1]:.3f}", f"{median(latencies):.1f}", f"{tails[-1]:.1f}")
    plots = f"{plot('pictures per second', rates)}\n{plot('p95, seconds', tails)}"
    return f"{NUM_BEAMS} beams, {NEW_TOKENS} tokens.\n\n{rows}\n{plots}"


def plot(name: str, values: Sequence[float]) -> str:
    return (
        f'```mermaid\nxychart-beta\n  title "{name}"\n  x-axis "requests in flight" {list(LEVELS)}\n'
        f'  y-axis "{name}" 0 --> {1.1 * max(values):.2f}\n  line {[round(value, 3) for value in values]}\n```\n'
    )


SECTIONS: dict[str, Callable[[Bench], str]] = {
    section.__name__: section for section in (steps, pictures, mixed, tasks, scale)
}


@contextmanager
def benched(work: Path, rounds: int) -> Iterator[Bench]:
    checkpoint, export = prepare(work)
    # In the same file system the weights are linked, not copied.
    with tempfile.TemporaryDirectory(dir=work) as repository:
        install(export, Path(repository))
        with TritonServer(repository, cache_size=2**28) as server:
            server.wait_ready()
            bench = Bench(checkpoint, export, server, rounds)
            bench.ask(bench.pictures.take())
            bench.transformers([bench.pictures.take()])
            yield bench


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="scratch folder; 3 GB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    arguments = parser.parse_args()
    unknown = set(arguments.sections) - set(SECTIONS)
    if unknown:
        parser.error(f"unknown section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    arguments.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    folder = Path(__file__).resolve().parent / "in_flight"
    folder.mkdir(exist_ok=True)
    with benched(arguments.work, arguments.rounds) as bench:
        for name in arguments.sections or SECTIONS:
            section = SECTIONS[name]
            found = section(bench)
            print(found, flush=True)
            head = f"# {(section.__doc__ or '').strip()}\n\n"
            (folder / f"{name}.md").write_text(f"{head}{found}\n{environment('nvidia-pytriton')}")


if __name__ == "__main__":
    main()
