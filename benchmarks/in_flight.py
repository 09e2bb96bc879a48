"""Many requests at once: through Triton in flight, against transformers and against whole batches.

python benchmarks/in_flight.py --work DIR [--rounds N] [SECTION ...]

Florence-2-base with random weights, fp32, all cores. Sections: steps, pictures, mixed, tasks, scale; all of them by
default. Each is measured in turns with what it is compared with, and written to in_flight/SECTION.md.
"""

import argparse
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
from bench import PROMPT_IDS, Bench, benched, in_flight, timed
from one_request import NEW_TOKENS, NUM_BEAMS
from tables import Table, environment

from florence2.generation.caches import CacheSizes
from florence2.generation.engine import Engine
from florence2.generation.request import Request
from florence2.generation.runner import GraphRunner
from florence2.generation.scheduler import Scheduler

IN_FLIGHT = 8
SHORT, LONG, SHORT_SHARE, MIXED = 15, 150, 0.7, 80
TASKS = (
    *("<OD>", "<CAPTION>", "<DETAILED_CAPTION>", "<MORE_DETAILED_CAPTION>"),
    *("<OCR>", "<OCR_WITH_REGION>", "<DENSE_REGION_CAPTION>", "<REGION_PROPOSAL>"),
)
LEVELS = (1, 2, 4, 8, 16, 32, 64)
SCALE_TOKENS = 30


def steps(bench: Bench) -> str:
    """One decoding step, Triton's by its own metrics, transformers' as what 80 more tokens take."""
    times: dict[tuple[str, int], list[float]] = {}
    for _ in range(bench.rounds):
        for requests in (1, IN_FLIGHT):
            before = bench.metrics()
            in_flight(requests, [partial(bench.ask_features, seed, NEW_TOKENS) for seed in range(requests)])
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


def wait_idle(bench: Bench) -> dict[str, float]:
    """The metrics, once the last step is in them and Triton has gathered them."""
    time.sleep(2.5)
    return bench.metrics()


def pictures(bench: Bench) -> str:
    """From JPEG to token ids: pictures per second with 8 in flight, against transformers in batches."""
    rates: dict[str, list[float]] = {}
    compared = equal = 0
    for _ in range(bench.rounds):
        files = [bench.pictures.take() for _ in range(2 * IN_FLIGHT)]
        started = time.perf_counter()
        with ThreadPoolExecutor(IN_FLIGHT) as pool:
            ours = list(pool.map(bench.ask, files))
        rates.setdefault(f"Triton, {IN_FLIGHT} in flight", []).append(len(files) / (time.perf_counter() - started))
        for batch in (1, IN_FLIGHT):
            started = time.perf_counter()
            theirs = bench.transformers(files[:batch])
            rates.setdefault(f"transformers, batch {batch}", []).append(batch / (time.perf_counter() - started))
            compared += batch
            equal += sum(ids == expected for ids, expected in zip(ours, theirs, strict=False))
    rows = Table("pictures per second", "median", "min", "max")
    for name, found in rates.items():
        rows.add(name, *(f"{figure(found):.3f}" for figure in (median, min, max)))
    rate, *others = (median(found) for found in rates.values())
    return (
        f"{NUM_BEAMS} beams, {NEW_TOKENS} tokens; {2 * IN_FLIGHT} pictures a round through Triton. Token ids equal: "
        f"{equal} of {compared}.\n\n{rows}\nTriton / the better of transformers': {rate / max(others):.2f}\n"
    )


def mixed(bench: Bench) -> str:
    """Answers of different lengths on given image features: in flight, against the same graphs in whole batches."""
    choose = random.Random(0)
    found: dict[str, list[tuple[float, float]]] = {}
    for _ in range(bench.rounds):
        short = round(SHORT_SHARE * MIXED)
        lengths = [SHORT] * short + [LONG] * (MIXED - short)
        choose.shuffle(lengths)
        for name, run in (("in flight, Triton", mixed_in_flight), *whole_batches(bench)):
            rate, latencies = run(bench, lengths)
            of_short = [latency for latency, length in zip(latencies, lengths, strict=True) if length == SHORT]
            found.setdefault(name, []).append((rate, median(of_short)))
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


def mixed_in_flight(bench: Bench, lengths: Sequence[int]) -> tuple[float, list[float]]:
    """Requests per second while there are `IN_FLIGHT`: until the last one is sent, when all but those are answered; and
    seconds of each."""
    sent: list[float] = []

    def ask(seed: int) -> None:
        sent.append(time.perf_counter())
        bench.ask_features(seed, lengths[seed])

    latencies = in_flight(IN_FLIGHT, [partial(ask, seed) for seed in range(len(lengths))])
    return (len(lengths) - IN_FLIGHT) / (max(sent) - min(sent)), latencies


def whole_batches(bench: Bench) -> Iterator[tuple[str, Callable[[Bench, Sequence[int]], tuple[float, list[float]]]]]:
    """As everyone who batches `generate` does: the batch takes as long as its slowest member, all rows to the end; and
    what it would be if finished requests left it."""
    caches = CacheSizes.of(bench.sizes, rows=IN_FLIGHT * NUM_BEAMS)
    runner = GraphRunner(bench.export, caches)

    def run(leave: bool, bench: Bench, lengths: Sequence[int]) -> tuple[float, list[float]]:
        latencies: list[float] = []
        for first in range(0, len(lengths), IN_FLIGHT):
            batch = lengths[first : first + IN_FLIGHT]
            engine = Engine(runner, Scheduler(caches, IN_FLIGHT, IN_FLIGHT))
            for seed, length in enumerate(batch, first):
                tokens = length if leave else max(batch)
                settings = bench.settings.override(num_beams=NUM_BEAMS, max_new_tokens=tokens)
                engine.submit(Request(bench.features(seed), PROMPT_IDS, settings, respond=lambda _: None))
            latencies += [timed(engine.finish)] * len(batch)
        return len(lengths) / sum(latencies[::IN_FLIGHT]), latencies

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
        files = [bench.pictures.take() for _ in range(max(4, level))]
        work = [partial(bench.ask, file, new_tokens=SCALE_TOKENS) for file in files]
        started = time.perf_counter()
        latencies = in_flight(level, work)
        rates.append(len(work) / (time.perf_counter() - started))
        tails.append(float(np.percentile(latencies, 95)))
        rows.add(str(level), f"{rates[-1]:.3f}", f"{median(latencies):.1f}", f"{tails[-1]:.1f}")
    plots = f"{plot('pictures per second', rates)}\n{plot('p95, seconds', tails)}"
    return f"{NUM_BEAMS} beams, {SCALE_TOKENS} tokens, waited for to the end.\n\n{rows}\n{plots}"


def plot(name: str, values: Sequence[float]) -> str:
    return (
        f'```mermaid\nxychart-beta\n  title "{name}"\n  x-axis "requests in flight" {list(LEVELS)}\n'
        f'  y-axis "{name}" 0 --> {1.1 * max(values):.2f}\n  line {[round(value, 3) for value in values]}\n```\n'
    )


SECTIONS: dict[str, Callable[[Bench], str]] = {
    section.__name__: section for section in (steps, pictures, mixed, tasks, scale)
}


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
