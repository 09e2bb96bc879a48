"""Twenty releases in a row under load: failed requests, mixed answers, and what a switch costs.

python benchmarks/redeploy.py --work DIR

The demo checkpoint and one with other weights in every part take turns, as `florence2 release` brings them to a
running server. 16 requests are in flight all the while, over gRPC and HTTP, from threads and coroutines elsewhere.
"""

import argparse
import asyncio
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as sync_grpc
import tritonclient.grpc.aio as async_grpc
import tritonclient.http as sync_http
import tritonclient.http.aio as async_http
from florence2_export.export import export
from florence2_release.gate import Gate
from florence2_release.install import install
from florence2_release.make_export import Prepared
from florence2_release.model_control import Triton
from florence2_release.repository import Repository
from florence2_release.rollout import Rollout
from florence2_release.server import TritonServer
from safetensors.numpy import load_file, save_file
from side_by_side import fine_tune
from tables import Table, environment

HERE = Path(__file__).resolve().parent
DEMO = HERE.parent / "demo"
PICTURES = sorted(path for path in (DEMO / "pictures").iterdir() if path.suffix in (".png", ".jpg"))
WORKERS = 4
"""Of each kind: gRPC and HTTP, threads and coroutines."""
REST = 5.0
"""Seconds between releases."""


@dataclass(frozen=True)
class Answer:
    started: float
    ended: float
    version: str
    picture: int
    token_ids: list[int]
    error: str | None


def variant(work: Path, name: str, length: int, noise: float) -> Path:
    """An export of the demo checkpoint with other weights, whose answers end after `length` tokens at most."""
    folder, checkpoint = work / name, work / f"{name}-checkpoint"
    if not folder.exists():
        shutil.copytree(DEMO / "checkpoint", checkpoint, dirs_exist_ok=True)
        weights = load_file(checkpoint / "model.safetensors")
        rng = np.random.default_rng(0)
        for key, value in weights.items():
            weights[key] = (value + noise * value.std() * rng.standard_normal(value.shape)).astype(value.dtype)
        save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})
        settings = json.loads((checkpoint / "generation_config.json").read_text())
        (checkpoint / "generation_config.json").write_text(json.dumps(settings | {"max_length": length}))
        export(str(checkpoint), folder)
    return folder


def inputs(module: Any, picture: bytes) -> list[Any]:
    found = []
    for name, value in (("image", picture), ("prompt", b"<OD>")):
        found.append(module.InferInput(name, [1, 1], "BYTES"))
        found[-1].set_data_from_numpy(np.array([[value]], np.object_))
    return found


def version_of(result: Any) -> str:
    response = result.get_response()
    return response["model_version"] if isinstance(response, dict) else response.model_version


def load(grpc_url: str, http_url: str, out: Path, stop: Path) -> None:
    """Asks until `stop` exists, and writes what came."""
    pictures = [path.read_bytes() for path in PICTURES]
    answers: list[Answer] = []

    def note(started: float, picture: int, result: Any, error: Exception | None) -> None:
        version, ids = ("", []) if error else (version_of(result), result.as_numpy("token_ids")[0].tolist())
        answers.append(Answer(started, time.monotonic(), version, picture, ids, error and str(error)))

    def thread(module: Any, url: str, place: int) -> None:
        client = module.InferenceServerClient(url)
        for turn in range(place, 10**9):
            if stop.exists():
                return
            started, picture = time.monotonic(), turn % len(pictures)
            try:
                note(started, picture, client.infer("florence2", inputs(module, pictures[picture])), None)
            except Exception as error:
                note(started, picture, None, error)

    async def coroutine(client: Any, module: Any, place: int) -> None:
        for turn in range(place, 10**9):
            if stop.exists():
                return
            started, picture = time.monotonic(), turn % len(pictures)
            try:
                note(started, picture, await client.infer("florence2", inputs(module, pictures[picture])), None)
            except Exception as error:
                note(started, picture, None, error)

    async def coroutines() -> None:
        async with (
            async_grpc.InferenceServerClient(grpc_url) as grpc_client,
            async_http.InferenceServerClient(http_url) as http_client,
        ):
            kinds = [(grpc_client, async_grpc), (http_client, async_http)]
            await asyncio.gather(
                *(coroutine(client, module, place) for client, module in kinds for place in range(WORKERS))
            )

    threads = [
        threading.Thread(target=thread, args=(module, url, place))
        for module, url in ((sync_grpc, grpc_url), (sync_http, http_url))
        for place in range(WORKERS)
    ]
    for one in threads:
        one.start()
    asyncio.run(coroutines())
    for one in threads:
        one.join()
    out.write_text("".join(json.dumps(vars(answer)) + "\n" for answer in answers))


def expected(export: Path) -> list[list[int]]:
    """What the export answers to every picture, served alone."""
    with tempfile.TemporaryDirectory() as folder:
        install(export, Path(folder))
        with TritonServer(folder) as server:
            server.wait_ready()
            client = sync_grpc.InferenceServerClient(server.grpc_url)
            answers = (client.infer("florence2", inputs(sync_grpc, path.read_bytes())) for path in PICTURES)
            return [answer.as_numpy("token_ids")[0].tolist() for answer in answers]


def overlapping(answers: Sequence[Answer], start: float, end: float) -> Iterator[float]:
    for answer in answers:
        if answer.started < end and answer.ended > start:
            yield 1000 * (answer.ended - answer.started)


def p99(values: Sequence[float]) -> float:
    return float(np.percentile(values, 99))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="scratch folder; 200 MB")
    parser.add_argument("--releases", type=int, default=20)
    parser.add_argument("--load", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load:
        grpc_url, http_url, out, stop = arguments.load
        load(grpc_url, http_url, Path(out), Path(stop))
        return
    work = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    exports = [variant(work, "first", 512, 0.0), variant(work, "second", 7, 1e-3)]
    wanted = [expected(one) for one in exports]
    repository, out, stop = Repository(work / "repository"), work / "answers.jsonl", work / "stop"
    shutil.rmtree(repository.folder, ignore_errors=True)
    stop.unlink(missing_ok=True)
    install(exports[0], repository.folder)
    said: list[tuple[float, str]] = []
    marks: list[dict[str, float]] = []
    with TritonServer(repository.folder) as server:
        server.wait_ready()
        urls = [server.grpc_url, f"127.0.0.1:{server.http_port}"]
        command = [sys.executable, __file__, "--work", str(work), "--load", *urls, str(out), str(stop)]
        asking = subprocess.Popen(command)
        try:
            time.sleep(2 * REST)
            gate = Gate(watch_seconds=0, latency_ratio=100)
            for number in range(2, arguments.releases + 2):
                said.clear()
                began = time.monotonic()
                rollout = Rollout(
                    repository, Triton(server.grpc_url), gate, lambda line: said.append((time.monotonic(), line))
                )
                # In files of other bytes each time: every model is loaded anew.
                new = fine_tune(exports[(number + 1) % 2], work / "new", number, whole=True)
                rollout.run(Prepared(new, None), "florence2")
                times = {line: at for at, line in said}
                marks.append({"began": began, "switch": times["switch ..."], "ended": time.monotonic()})
                time.sleep(REST)
        finally:
            stop.touch()
            asking.wait()
    answers = [Answer(**json.loads(line)) for line in out.read_text().splitlines()]
    failed = [answer for answer in answers if answer.error]
    mixed = [
        one for one in answers if not one.error and one.token_ids != wanted[(int(one.version) + 1) % 2][one.picture]
    ]
    good = [answer for answer in answers if not answer.error]
    switches, windows = [], []
    for place, mark in enumerate(marks):
        old = [answer.ended for answer in good if int(answer.version) <= place + 1 and answer.started < mark["ended"]]
        windows.append((mark["switch"], max([mark["switch"], *(ended for ended in old if ended > mark["switch"])])))
        switches += list(overlapping(good, *windows[-1]))
    busy = [(mark["began"], mark["ended"]) for mark in marks]
    outside = [
        1000 * (one.ended - one.started)
        for one in good
        if not any(one.started < end and one.ended > start for start, end in busy)
    ]
    loading = [value for mark in marks for value in overlapping(good, mark["began"], mark["switch"])]
    rows = Table("", "requests", "median ms", "p99 ms")
    for name, values in (
        ("outside of releases", outside),
        ("while a release is loaded, warmed up and measured", loading),
        ("during a switch", switches),
    ):
        rows.add(name, f"{len(values):,}", f"{np.median(values):.0f}", f"{p99(values):.0f}")
    seconds = [end - start for start, end in windows]
    summary = (
        f"{len(answers):,} requests, {len(failed)} failed, {len(mixed)} not wholly of the release that they name; "
        f"{len(Counter(one.version for one in good))} releases answered.\n"
        f"A switch, from the reload of the ensemble until the new release alone answers: median "
        f"{1000 * float(np.median(seconds)):.0f} ms, longest {1000 * max(seconds):.0f} ms.\n"
        f"p99 during a switch / outside: {p99(switches) / p99(outside):.2f}\n"
    )
    (HERE / "redeploy.md").write_text(
        f"# {arguments.releases} releases in a row under load\n\n"
        "The demo checkpoint and one that differs in the weights of every part, in turns, each time in new files:\n"
        "all four models are loaded. 16 requests in flight, gRPC and HTTP, threads and coroutines; no cache.\n\n"
        f"{rows}\n{summary}\n{environment('nvidia-pytriton')}"
    )
    print(rows, summary, sep="\n")
    for one in failed[:5]:
        print(one)


if __name__ == "__main__":
    main()
