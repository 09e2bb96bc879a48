"""`florence2 label` in one process against the same job on a local Ray cluster, in turns, on one server.

python benchmarks/label.py --work DIR

Pictures cut out of the demo's, each new; the demo checkpoint. The lines must be the same every time.
"""

import argparse
import logging
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import ray
from florence2_apps.label import Job, Source, label, open_source
from florence2_apps.label.ray import label_on_ray
from florence2_client import Florence2Client
from florence2_export.export import export
from florence2_release.install import install
from florence2_release.server import TritonServer
from PIL import Image
from tables import Table, environment

HERE = Path(__file__).resolve().parent
DEMO = HERE.parent / "demo"
JOB = Job("<OD>", {"num_beams": 1, "max_new_tokens": 20})
IN_FLIGHT = 32
"""Of a process; of two workers each has half."""


def make_pictures(folder: Path, count: int) -> None:
    pages = [Image.open(path).convert("RGB") for path in sorted((DEMO / "pictures").glob("*.[jp][pn]g"))]
    chance = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        page = pages[number % len(pages)]
        corner = [chance.randrange(side // 3) for side in page.size]
        page.crop((*corner, *page.size)).save(folder / f"{number:05}.jpg")


def one_process(source: Source, output: Path, url: str) -> None:
    with Florence2Client(url) as client:
        label(source, JOB, output, client, in_flight=IN_FLIGHT)


def on_ray(workers: int) -> Callable[[Source, Path, str], None]:
    def run(source: Source, output: Path, url: str) -> None:
        in_flight = IN_FLIGHT // workers
        label_on_ray(source, JOB, str(output), url=url, model="florence2", in_flight=in_flight, workers=workers)

    return run


def lines(output: Path) -> list[str]:
    files = output.glob("*.jsonl") if output.is_dir() else [output]
    return sorted(line for file in files for line in file.read_text().splitlines())


def compare(source: Source, work: Path, url: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of each run, by way. Stops if the lines differ."""
    ways = {"one process": one_process, "Ray, 1 worker": on_ray(1), "Ray, 2 workers": on_ray(2)}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    expected: list[str] = []
    for turn in range(rounds + 1):
        for way, run in ways.items():
            output = work / f"{way.replace(', ', '-').replace(' ', '-')}-{turn}.jsonl"
            started = time.perf_counter()
            run(source, output, url)
            taken = time.perf_counter() - started
            print(f"{way}: {taken:.1f} s{'' if turn else ', not counted'}", flush=True)
            expected = expected or lines(output)
            if lines(output) != expected:
                raise SystemExit(f"{way}: the lines differ")
            if turn:
                seconds[way].append(taken)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="scratch folder; 200 MB")
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    pictures, exported = arguments.work / "pictures", arguments.work / "export"
    shutil.rmtree(pictures, ignore_errors=True)
    make_pictures(pictures, arguments.pictures)
    export(str(DEMO / "checkpoint"), exported)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory(dir=arguments.work) as scratch:
        install(exported, Path(scratch, "repository"))
        with TritonServer(Path(scratch, "repository")) as server:
            server.wait_ready()
            started = time.perf_counter()
            ray.init("local", num_cpus=2, include_dashboard=False, logging_level=logging.ERROR)
            starting = time.perf_counter() - started
            seconds = compare(open_source(str(pictures)), Path(scratch), server.grpc_url, arguments.rounds)
            ray.shutdown()
    rows = Table(f"{arguments.pictures:,} pictures", "median s", "min s", "max s", "pictures per second")
    for way, times in seconds.items():
        figures = (f"{figure(times):.1f}" for figure in (median, min, max))
        rows.add(way, *figures, f"{arguments.pictures / median(times):.0f}")
    single, one, two = (median(times) for times in seconds.values())
    summary = (
        f"Ray / one process: {one / single:.2f} with one worker, {two / single:.2f} with two; "
        f"{one - single:.1f} s and {two - single:.1f} s more.\n"
        f"Starting Ray here, once, not in the table: {starting:.1f} s.\n"
    )
    print(rows, summary, sep="\n")
    (HERE / "label.md").write_text(
        "# One process and Ray\n\n"
        f"`<OD>`, greedy, up to 20 tokens, {arguments.pictures:,} JPEGs of 100 to 600 pixels a side, the demo\n"
        f"checkpoint, {IN_FLIGHT} requests in flight whichever way; {arguments.rounds} rounds in turns after one that\n"
        "is not counted; the same lines every time. Server, Ray and whoever asks share the cores: this is what Ray\n"
        "costs, not what more machines bring.\n\n"
        f"{rows}\n{summary}\n{environment('nvidia-pytriton', 'ray')}"
    )


if __name__ == "__main__":
    main()
