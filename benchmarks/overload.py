"""What the server does when more comes than it can answer: two and four times as much, and clients that go away.

python benchmarks/overload.py --work DIR [--size base | --export DIR] [--max-waiting N] [--threads N] [--write]

One server without a cache; no two pictures that are on their way are the same. First as many requests per second as it
answers with 32 in flight; then Poisson arrivals at two and four times that rate, whatever comes back, and after each
32 in flight again; last, clients that ask and go. The generator runs on the server's cores, so that answers per second
of the server's CPU count where requests are as small as the demo checkpoint's. What came of each second is in --work,
one .csv per load.
"""

import argparse
import asyncio
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import asdict
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import grpc
import numpy as np
import psutil
from florence2_release import configs
from florence2_release.install import install
from florence2_release.server import TritonServer
from load_generator import GIVE_UP, KINDS, NEW_TOKENS, PROMPT, Load, connect, http_request, outcome, picture
from overload_report import GONE, IN_FLIGHT, Flood, Phase, Recovery, report
from tables import environment
from tritonclient.grpc import service_pb2, service_pb2_grpc

HERE = Path(__file__).resolve().parent
TIMES = (2, 4)
"""What comes, of what the server can answer."""
PROBES = 10
T = TypeVar("T")
PATIENCE = (0.1, 0.5)
"""Seconds after which clients go: Triton (24.10) crashes of cancels in the first 50 ms."""


class Overload:
    """A server under load, seen from outside."""

    def __init__(self, server: TritonServer, work: Path) -> None:
        self.server, self.work = server, work
        self.new = (picture(np.random.default_rng(10**6 + seed)) for seed in count())
        found = [self.probe() for _ in range(2 * PROBES)][PROBES:]
        if {kind for kind, _ in found} != {"answered"}:
            raise SystemExit(f"the server does not answer a single request: {found}")
        self.usual = median(seconds for _, seconds in found)

    def check_alive(self) -> None:
        if not self.server.is_alive():
            raise SystemExit(f"the server has ended:\n{self.server.log_tail()}")

    def probe(self) -> tuple[str, float]:
        """One request over a connection of its own -> what became of it, seconds."""

        async def ask(request: bytes) -> str:
            try:
                async with asyncio.timeout(GIVE_UP):
                    connection = await connect(self.server.http_port)
                    kind, _ = outcome(*await connection.ask(request))
                    connection.transport.abort()
                    return kind
            except OSError:
                return "failed"

        request = http_request(next(self.new))
        began = time.monotonic()
        return asyncio.run(ask(request)), time.monotonic() - began

    def recover(self) -> Recovery:
        began, first, answered = time.monotonic(), "", None
        while self.server.is_alive() and (since := time.monotonic() - began) < GIVE_UP:
            kind, seconds = self.probe()
            first = first or f"{kind} after {1000 * seconds:,.0f} ms"
            if kind != "answered":
                time.sleep(0.1)
                continue
            answered = since + seconds if answered is None else answered
            if seconds <= 2 * self.usual:
                return Recovery(first, answered, since)
        return Recovery(first or "the server has ended", answered, None)

    def processes(self, figure: Callable[[psutil.Process], float]) -> dict[str, float]:
        """A figure of tritonserver and of each model's processes."""
        found: dict[str, float] = defaultdict(float)
        with suppress(psutil.Error):
            main = psutil.Process(self.server.pid)
            for process in (main, *main.children(recursive=True)):
                with suppress(psutil.Error):
                    models = [Path(part).parents[1].name for part in process.cmdline() if part.endswith("/model.py")]
                    found[models[0] if models else process.name()] += figure(process)
        return found

    def memory(self) -> dict[str, float]:
        return self.processes(lambda process: process.memory_info().rss / 1e6)

    def server_cpu(self) -> float:
        return sum(self.processes(cpu_seconds).values())

    def measure(self, name: str, load: Load, warm_up: float) -> Phase:
        """The load, measured after its first `warm_up` seconds."""
        self.check_alive()
        seconds = load.seconds - warm_up
        command = [sys.executable, str(HERE / "load_generator.py"), json.dumps(asdict(load))]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout
                start = float(process.stdout.readline()) + warm_up
                generator, memory = psutil.Process(process.pid), [self.memory()]
                sleep_until(start)
                before = self.server_cpu(), cpu_seconds(generator)
                for part in range(1, 61):
                    sleep_until(start + part / 60 * seconds)
                    memory.append(self.memory())
                after = self.server_cpu(), cpu_seconds(generator)
                recovery = self.recover()
                process.wait()
            finally:
                process.kill()
        memory.append(self.memory())
        server_cpu, generator_cpu = (end - begin for begin, end in zip(before, after, strict=True))
        with np.load(load.out) as records:
            phase = Phase(
                name=name,
                rate=load.rate,
                seconds=seconds,
                **{key: records[key] - warm_up for key in ("due", "sent", "ended")},
                kinds=records["kinds"],
                said=json.loads(str(records["said"])),
                server_cpu=server_cpu,
                generator_cpu=generator_cpu,
                memory=memory,
                recovery=recovery,
            )
        self.write_seconds(phase)
        print(f"{name}: {phase.answers:.2f} answers per second; {recovery}", flush=True)
        return phase

    def write_seconds(self, phase: Phase) -> None:
        kinds, bins = KINDS[:4], max(round(phase.seconds), 1)
        rows = np.array([np.arange(bins), *(phase.per_second(kind, bins) for kind in kinds)]).T
        path = self.work / f"{phase.name.replace(' ', '-')}.csv"
        np.savetxt(path, rows, "%d", ",", header=",".join(("second", *kinds)), comments="")

    def flood(self, protocol: str, clients: Callable[[list[bytes]], Coroutine[Any, Any, list[str]]]) -> Flood:
        """Clients that come within a second, and go before they are answered."""
        self.check_alive()
        before = self.server_cpu()
        files = [next(self.new) for _ in range(GONE)]
        seen = Counter(asyncio.run(clients(files)))
        recovery = self.recover()
        return Flood(protocol, seen, self.server_cpu() - before, recovery)

    async def over_http(self, files: list[bytes]) -> list[str]:
        async def client(file: bytes) -> str:
            await asyncio.sleep(random.random())
            connection = await connect(self.server.http_port)
            try:
                return outcome(*await patiently(connection.ask(http_request(file))))[0]
            except TimeoutError:
                return "gone"
            except OSError:
                return "failed"
            finally:
                connection.transport.abort()

        return await asyncio.gather(*map(client, files))

    async def over_grpc(self, files: list[bytes]) -> list[str]:
        async def client(file: bytes) -> str:
            await asyncio.sleep(random.random())
            try:
                await patiently(stub.ModelInfer(grpc_request(file)))
            except TimeoutError:
                return "gone"
            except grpc.aio.AioRpcError as error:
                return "refused" if error.code() == grpc.StatusCode.UNAVAILABLE else "failed"
            return "answered"

        async with grpc.aio.insecure_channel(self.server.grpc_url) as channel:
            await channel.channel_ready()
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            return await asyncio.gather(*map(client, files))


async def patiently(answer: Awaitable[T]) -> T:
    """Cancels it after a while. Raises TimeoutError."""
    async with asyncio.timeout(random.uniform(*PATIENCE)):
        return await answer


def grpc_request(file: bytes) -> service_pb2.ModelInferRequest:
    request = service_pb2.ModelInferRequest(model_name="florence2")
    for name, kind, value in (
        ("image", "BYTES", {"bytes_contents": [file]}),
        ("prompt", "BYTES", {"bytes_contents": [PROMPT.encode()]}),
        ("max_new_tokens", "INT32", {"int_contents": [NEW_TOKENS]}),
    ):
        request.inputs.add(name=name, datatype=kind, shape=[1, 1], contents=value)
    return request


def cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def sleep_until(moment: float) -> None:
    time.sleep(max(moment - time.monotonic(), 0))


def export_of(size: str, work: Path) -> Path:
    """Of the demo checkpoint, or of random weights in the size of Florence-2-base."""
    checkpoint, export = HERE.parent / "demo" / "checkpoint", work / f"{size}-export"
    if size == "base":
        checkpoint = work / "base"
        if not checkpoint.is_dir():
            subprocess.run([sys.executable, HERE / "random_checkpoint.py", checkpoint, "base"], check=True)
    subprocess.run([sys.executable, "-m", "florence2_cli", "export", checkpoint, "--output", export], check=True)
    return export


def set_parameter(repository: Path, model: str, name: str, value: int) -> None:
    path = repository / model / configs.FILE_NAME
    config = configs.parsed(path)
    config.parameters[name].string_value = str(value)
    configs.write(path, config, path.read_text())


def measure(server: TritonServer, work: Path, seconds: float) -> str:
    """All tables."""
    overload, seeds = Overload(server, work), count()
    # Until the first of all those in flight are answered, if not longer.
    warm_up = max(seconds / 20, 5, IN_FLIGHT * overload.usual)

    def phase(name: str, seconds: float, rate: float = 0) -> Phase:
        in_flight = 0 if rate else IN_FLIGHT
        load = Load(server.http_port, warm_up + seconds, next(seeds), str(work / "records.npz"), rate, in_flight)
        return overload.measure(name, load, warm_up)

    phases = [phase("saturation", seconds / 4)]
    if not (rate := phases[0].answers):
        raise SystemExit(f"nothing was answered within {seconds / 4:.0f} s; give more --seconds")
    if phases[0].per_second("refused", 1)[0] > rate:
        raise SystemExit(f"{IN_FLIGHT} in flight are more than the server takes; give more --max-waiting")
    for times in TIMES:
        phases += [phase(f"{times} x", seconds, times * rate), phase(f"saturation after {times} x", seconds / 4)]
    floods = [overload.flood("HTTP", overload.over_http), overload.flood("gRPC", overload.over_grpc)]
    return report(phases, floods, overload.usual)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="scratch folder; 200 MB, 3 GB for base")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--size", choices=("demo", "base"), default="demo", help="what is exported and served")
    what.add_argument("--export", type=Path, help="an export to serve in its place")
    parser.add_argument(
        "--max-waiting", type=int, metavar="N", help="beam_search's parameter; 32 in flight have to fit, so 40 or more"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="of ONNX Runtime in each model; left out, every core")
    parser.add_argument("--seconds", type=float, default=600, help="of each overload (default: %(default)s)")
    parser.add_argument("--write", action="store_true", help="write overload/SIZE.md beside this script, too")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    export = arguments.export or export_of(arguments.size, arguments.work)
    with tempfile.TemporaryDirectory(dir=arguments.work) as repository:
        install(export, Path(repository))
        if arguments.max_waiting:
            set_parameter(Path(repository), "beam_search", "max_waiting", arguments.max_waiting)
        if arguments.threads:
            for model in ("vision_encoder", "beam_search"):
                set_parameter(Path(repository), model, "threads", arguments.threads)
        with TritonServer(repository) as server:
            server.wait_ready()
            found = measure(server, arguments.work, arguments.seconds)
    sizes = {"demo": "the demo checkpoint", "base": "random weights in the size of Florence-2-base"}
    served = f"the export {export.name}" if arguments.export else sizes[arguments.size]
    given = {"max_waiting": arguments.max_waiting, "threads": arguments.threads}
    waiting = "".join(f", {name} {value}" for name, value in given.items() if value)
    text = f"# More than the server can answer\n\nServed: {served}{waiting}. {found}\n{environment('nvidia-pytriton')}"
    print(text)
    if arguments.write:
        (HERE / "overload").mkdir(exist_ok=True)
        (HERE / "overload" / f"{arguments.export.name if arguments.export else arguments.size}.md").write_text(text)


if __name__ == "__main__":
    main()
