"""What a step of the decoder costs the host beside its graph: CPU time of the engine's thread.

python benchmarks/host_step.py --work DIR [--write]

The engine, its scheduler, searches and runner as they serve, with shapes rounded as on a GPU; in the place of the
decoder's graph stand candidates that were drawn before, so that of ONNX Runtime only the binding is left. The searches
alone are held against tests/generation/one_search.py, one request at a time, in turns.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np
from florence2_export.export import export
from numpy.typing import NDArray
from tables import Table, environment

from florence2.generation.beam_search import new_searches
from florence2.generation.caches import CacheSizes
from florence2.generation.decoder_steps import DecoderSteps
from florence2.generation.engine import Engine
from florence2.generation.request import Request
from florence2.generation.runner import GraphRunner
from florence2.generation.scheduler import Scheduler
from florence2.generation.settings import GenerationSettings
from florence2.manifest import Manifest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests" / "generation"))
from one_search import start  # noqa: E402

REQUESTS = (1, 8, 32)
LENGTHS = (100, 400)
BEAMS, CANDIDATES, STEPS, DRAWN = 3, 16, 100, 64
SETTINGS = GenerationSettings(
    decoder_start_token_id=2,
    eos_token_id=2,
    max_length=1024,
    positions=1024,
    forced_bos_token_id=0,
    forced_eos_token_id=2,
    num_beams=BEAMS,
    early_stopping=True,
    no_repeat_ngram_size=3,
)
"""As Florence-2's."""


def drawn(rows: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """Candidates of `rows` beams, [R, C], without an end; mostly the best is far better than the others."""
    rng = np.random.default_rng(rows)
    ids = rng.integers(10, 51000, (DRAWN, rows, CANDIDATES))
    logprobs = -np.sort(rng.exponential(3, ids.shape).astype(np.float32), axis=2)
    logprobs[:, :, 0] *= np.float32(0.1)
    return cycle(zip(ids, logprobs, strict=True))


class WithoutGraph(DecoderSteps):
    """Binds and copies as ever, and gives what was drawn."""

    def prepare(self) -> None:
        self.drawn: dict[int, Any] = {}
        self.nothing: Any = SimpleNamespace(run_with_iobinding=lambda binding, options: None)
        self.moves = 0

    def run(
        self, feeds: Mapping[str, NDArray[np.int64]], past: Any, cross: Any, columns: Any, may_capture: bool
    ) -> Any:
        rows = len(feeds["input_ids"])
        if rows not in self.drawn:
            self.drawn[rows] = drawn(rows)
        self.moves += len(feeds["moved_from"])
        self._step(feeds, past, cross, columns).run(self.nothing, feeds)
        return next(self.drawn[rows])


def engine_of(folder: Path, requests: int, length: int) -> Engine:
    """With so many running, and that many tokens in each."""
    sizes = Manifest.read(folder).sizes
    caches = CacheSizes.of(sizes, rows=96, requests=32, block=64)
    runner = GraphRunner(folder, caches, threads=1)
    runner._rounds = True
    decoder: Any = runner._decoder
    decoder.__class__ = WithoutGraph
    decoder.prepare()
    engine = Engine(runner, Scheduler(runner.caches, max_waiting=requests, encoder_batch=8))
    settings = replace(SETTINGS, max_length=sizes.max_position_embeddings)
    features = np.zeros((sizes.image_tokens, sizes.d_model), np.float32)
    for _ in range(requests):
        engine.submit(Request(features, np.arange(3, 13), settings, lambda answer: None))
    for _ in range(length + requests // 8):
        engine.step()
    return engine


def cpu_ms(*steps: Callable[[], None]) -> list[float]:
    """Of each, in turns; the median of ten tenths, as other processes take caches away."""
    found: list[list[float]] = [[] for _ in steps]
    for _ in range(10):
        for step, own in zip(steps, found, strict=True):
            started = time.thread_time()
            for _ in range(STEPS // 10):
                step()
            own.append((time.thread_time() - started) / (STEPS // 10))
    return [1e3 * median(own) for own in found]


def searches_of(requests: int, length: int) -> tuple[Callable[[], None], Callable[[], None]]:
    """A step of all searches at once, and of each by itself."""
    together, alone = new_searches(BEAMS), [start(SETTINGS) for _ in range(requests)]
    for index in range(requests):
        together.add(index, SETTINGS)
    candidates, others = drawn(requests * BEAMS), drawn(requests * BEAMS)
    shape = requests, BEAMS, CANDIDATES

    def all_at_once() -> None:
        together.banned_tokens()
        ids, logprobs = next(candidates)
        together.advance(ids.reshape(shape), logprobs.reshape(shape))

    def one_by_one() -> None:
        ids, logprobs = next(others)
        for search, own, its in zip(alone, ids.reshape(shape), logprobs.reshape(shape), strict=True):
            search.banned_tokens()
            search.advance(own, its)

    for _ in range(length):
        all_at_once()
        one_by_one()
    return all_at_once, one_by_one


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="scratch folder; 10 MB")
    parser.add_argument("--write", action="store_true", help="write host_step.md beside this script, too")
    arguments = parser.parse_args()
    folder = arguments.work / "demo"
    export(str(HERE.parent / "demo" / "checkpoint"), folder)
    table = Table("requests", "tokens", "step ms", "of it searches ms", "one by one ms", "times", "moves, padded")
    for requests in REQUESTS:
        for length in LENGTHS:
            engine = engine_of(folder, requests, length)
            decoder: Any = engine.runner._decoder  # type: ignore[attr-defined]
            decoder.moves = 0
            (step,) = cpu_ms(engine.step)
            moves = decoder.moves / STEPS
            together, alone = cpu_ms(*searches_of(requests, length))
            figures = (f"{step:.2f}", f"{together:.3f}", f"{alone:.2f}", f"{alone / together:.1f}", f"{moves:.0f}")
            table.add(f"{requests} x {BEAMS}", str(length), *figures)
            print(table.last, flush=True)
    text = f"# A step on the host\n\n{table}\n{environment()}"
    print(text)
    if arguments.write:
        (HERE / "host_step.md").write_text(text)


if __name__ == "__main__":
    main()
