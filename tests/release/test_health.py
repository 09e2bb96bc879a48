"""What a probe is told, and what the watchdog does, with a server that only says what a test says."""

import http.client
import os
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.error import URLError

import pytest
from florence2_release import crashes, processes
from florence2_release import health as health_module
from florence2_release import watchdog as watchdog_module
from florence2_release.health import Health, close_health, serve_health
from florence2_release.server import ServerError
from florence2_release.watchdog import Watchdog

PINS = {"preprocess": 1, "vision_encoder": 1, "beam_search": 2, "postprocess": 1}
STEPS = [{"model_name": model, "model_version": str(version)} for model, version in PINS.items()]


class Server:
    """Everything there, until a test takes something away."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, repository: Path) -> None:
        self.repository, self.http_url, self.alive, self.killed = repository, "http://nowhere", True, False
        self.ready: set[tuple[str, int]] = {("florence2", 2), *PINS.items()}
        self.lost: set[tuple[str, int]] = set()
        monkeypatch.setattr(processes, "ready", lambda server: self.found())
        monkeypatch.setattr(processes, "incomplete", lambda server, versions: self.lost & versions)
        monkeypatch.setattr(
            processes, "config", lambda server, model, version: {"ensemble_scheduling": {"step": STEPS}}
        )
        self.names, self.crashed = ["florence2"], False
        self.error: Exception | None = None
        for module in (health_module, watchdog_module):
            monkeypatch.setattr(module, "Repository", lambda folder: SimpleNamespace(names=lambda: self.names))
        monkeypatch.setattr(health_module, "FRESH", -1)

    def found(self) -> set[tuple[str, int]]:
        if self.error:
            raise self.error
        return set(self.ready)

    def is_alive(self) -> bool:
        return self.alive

    def has_crashed(self) -> bool:
        return self.crashed

    def kill(self) -> None:
        self.killed = True


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Server:
    return Server(monkeypatch, tmp_path)


def test_ready_is_everything_there(server: Server) -> None:
    health: Any = Health(server)  # type: ignore[arg-type]
    assert health.trouble() == ""
    # A release that is looked at, or one that is kept, is nobody's business.
    server.lost = {("beam_search", 1)}
    assert health.trouble() == ""
    server.lost = {("beam_search", 2)}
    assert health.trouble() == "beam_search 2 has lost its process"
    server.lost = set()
    server.ready -= {("vision_encoder", 1)}
    assert health.trouble() == "vision_encoder 1 is not ready"
    server.ready |= {("vision_encoder", 1)}
    server.ready -= {("florence2", 2)}
    assert health.trouble() == "florence2 is not ready"
    server.error = TimeoutError("timed out")
    assert health.trouble() == "the server does not answer: TimeoutError('timed out')"
    server.error = URLError(ConnectionRefusedError(111, "Connection refused"))
    assert health.trouble() == "the server is being started"
    server.alive = False
    assert health.trouble() == "the server is being started"


def test_a_server_that_has_crashed_and_does_not_end_is_ended(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its endpoints say that all is well."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(crashes, "time", SimpleNamespace(monotonic=lambda: clock.now))
    health: Any = Health(server)  # type: ignore[arg-type]
    said: list[str] = []
    watchdog: Any = Watchdog(server, said.append)  # type: ignore[arg-type]
    watchdog._look()
    server.crashed = True
    assert health.trouble() == "the server has crashed"
    # It may end by itself yet.
    for _ in range(10):
        watchdog._look()
        clock.now += 0.99
    assert not server.killed
    clock.now += 1
    watchdog._look()
    assert server.killed
    assert said == ["the server has crashed, and did not end of it: it is ended"]
    # Another that is started in its place has its time, too.
    server.killed = False
    watchdog._look()
    assert not server.killed


@pytest.mark.parametrize(
    ("log", "blocked", "has"),
    [
        ("I1 x\ncorrupted double-linked list\nSignal (6) received.\n", 1 << 5, True),
        ("Signal (11) received.\n 0# 0x1", 1 << 10, True),
        # As Ctrl-C and a stop are told.
        ("Signal (2) received.\nSignal (15) received.\n", 1 << 1 | 1 << 14, False),
        # What a client sent.
        ("a panic of: <OD>\nSignal (6) received.", 0, False),
        ("Signal (6) received.", 1 << 10, False),
        ('W1 the prompt says "Signal (6) received."', 1 << 5, False),
        ("", 1 << 5, False),
    ],
)
def test_what_a_crash_looks_like(tmp_path: Path, log: str, blocked: int, has: bool) -> None:
    for thread, mask in ((7, 0), (8, blocked)):
        (tmp_path / "7" / "task" / str(thread)).mkdir(parents=True)
        (tmp_path / "7" / "task" / str(thread) / "status").write_text(f"Name:\tx\nSigBlk:\t{mask:016x}\nSigIgn:\t0\n")
    assert crashes.has_crashed(log, 7, tmp_path) is has
    assert not crashes.has_crashed(log, 9, tmp_path)


@pytest.mark.parametrize(
    ("groups", "processes_of"),
    [
        ([{"count": 2}], 2),
        ([{"count": 1, "gpus": [0, 1]}], 2),
        ([{"count": 2, "gpus": [0]}, {"count": 1, "gpus": []}], 3),
    ],
)
def test_every_gpu_has_its_instances(monkeypatch: pytest.MonkeyPatch, groups: list[Any], processes_of: int) -> None:
    monkeypatch.setattr(processes, "config", lambda *_: {"backend": "python", "instance_group": groups})
    assert processes._instances(None, ("beam_search", 1)) == processes_of  # type: ignore[arg-type]


def test_probes_ask_in_several_ways(server: Server) -> None:
    endpoint = serve_health(Health(server), "127.0.0.1", 0)  # type: ignore[arg-type]
    try:
        for method, path, expected in (("HEAD", "/ready", 200), ("GET", "/ready?x=1", 200), ("GET", "/readyz", 404)):
            connection = http.client.HTTPConnection("127.0.0.1", endpoint.server_port, timeout=10)
            connection.request(method, path)
            response = connection.getresponse()
            assert response.status == expected
            said = b"ready\n" if expected == 200 else b"there is /ready\n"
            assert response.read() == (b"" if method == "HEAD" else said)
            connection.close()
    finally:
        close_health(endpoint)


def test_a_name_counts_once_it_was_ready(server: Server) -> None:
    health: Any = Health(server)  # type: ignore[arg-type]
    assert health.trouble() == ""
    server.names.append("mine")
    assert health.trouble() == ""
    server.ready |= {("mine", 1)}
    assert health.trouble() == ""
    server.ready -= {("mine", 1)}
    assert health.trouble() == "mine is not ready"


def test_a_server_that_is_told_to_stop_is_ready_no_more(server: Server) -> None:
    health: Any = Health(server)  # type: ignore[arg-type]
    health.is_draining = True
    assert health.trouble() == "the server is stopping"


def test_a_look_is_good_for_a_while(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health_module, "FRESH", 1000)
    health: Any = Health(server)  # type: ignore[arg-type]
    assert health.trouble() == ""
    server.alive = False
    assert health.trouble() == ""


def test_where_a_model_cannot_be_loaded_alone_the_server_ends(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A repository that can't be written: what Triton loads again is what has changed."""
    said: list[str] = []
    watchdog: Any = Watchdog(server, said.append)  # type: ignore[arg-type]
    server.ready |= {("beam_search", 3)}
    server.lost = {("beam_search", 3)}

    def read_only(path: Path) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "utime", read_only)
    watchdog._look()
    # It may have been on its way.
    assert not server.killed
    watchdog._look()
    assert server.killed
    assert said == [
        "beam_search 3 has lost its process, and can't be loaded alone ([Errno 30] Read-only file system): the server "
        "ends"
    ]


def test_a_model_that_clients_get_takes_the_server_along(server: Server) -> None:
    said: list[str] = []
    watchdog: Any = Watchdog(server, said.append)  # type: ignore[arg-type]
    server.lost = {("beam_search", 2)}
    watchdog._look()
    # It may have been on its way.
    assert not server.killed
    watchdog._look()
    assert server.killed
    assert said == ["beam_search 2 has lost its process: the server ends"]


@pytest.mark.parametrize("error", [KeyError("backend"), RuntimeError("anything"), ConnectionResetError()])
def test_the_watchdog_outlives_whatever_happens(
    server: Server, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr("florence2_release.watchdog.EVERY", 0.001)
    looks: list[int] = []
    said: list[str] = []

    def look(_: Any) -> set[tuple[str, int]]:
        looks.append(1)
        raise error

    monkeypatch.setattr(processes, "ready", look)
    watchdog = Watchdog(server, said.append)  # type: ignore[arg-type]
    watchdog.start()
    while len(looks) < 3:
        pass
    watchdog.stop()
    assert said[0] == f"the models' processes could not be looked after: {error!r}"


def test_a_port_that_is_taken_is_named(server: Server) -> None:
    health: Any = Health(server)  # type: ignore[arg-type]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ServerError, match=rf"^port {port} \(health\) is in use: stop what listens there"):
            serve_health(health, "127.0.0.1", port)
    with pytest.raises(ServerError, match=r"^cannot listen on 127\.0\.0\.1 port 70000 \(health\)"):
        serve_health(health, "127.0.0.1", 70_000)
