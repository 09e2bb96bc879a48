"""The server as a process tree: started by `florence2 serve`, its memory, its ends, faults made on purpose."""

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import IO, Any

import psutil

EVERY = 0.2
"""Seconds between two looks at the processes."""
START = 120
"""Seconds that a start may take."""
WHOLE = ["tritonserver", "reaper", "serve"]
"""Roles without which there is no server, by what goes first."""
GOING = 10
"""Seconds in which the rest of a server goes."""
CALM = 30
"""Seconds without hostile inputs after tritonserver is back: while it ends again and again, nobody is answered."""
HELPERS = ("addr2line",)
"""What a crash calls to tell where it was."""
RESTARTS = 20
"""After so many ends of the whole server a run is over."""
MOST_MB = 12_000
"""Of all processes together, at which the server is ended for the machine's sake."""
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


@dataclass(frozen=True)
class End:
    """A process that is gone and was not to go."""

    role: str
    when: float
    detail: str


class Served:
    """`florence2 serve` of a repository, on ports that stay the same when it is started anew."""

    def __init__(self, repository: Path, log: Path) -> None:
        self.repository, self.log_path = repository, log
        self.http_port, self.grpc_port, self.metrics_port = free_ports(3)
        self._process: subprocess.Popen[bytes] | None = None
        self.tree: dict[int, tuple[str, psutil.Process]] = {}
        """By process id, as last looked at: role and process."""
        self._server_log: IO[str] | None = None

    @property
    def ports(self) -> tuple[int, int]:
        return self.http_port, self.grpc_port

    @property
    def grpc_url(self) -> str:
        return f"127.0.0.1:{self.grpc_port}"

    def start(self) -> None:
        ports = (self.http_port, self.grpc_port, self.metrics_port)
        options = [f"--{name}-port={port}" for name, port in zip(("http", "grpc", "metrics"), ports, strict=True)]
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "florence2_cli", "serve", "--repository", str(self.repository), *options],
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        give_up = time.monotonic() + START
        while not self.is_ready():
            if self._process.poll() is not None or time.monotonic() > give_up:
                raise RuntimeError(f"the server does not start:\n{self.log_path.read_text()[-2000:]}")
            time.sleep(0.1)
        self.look()

    def is_ready(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.http_port, timeout=5)
        try:
            connection.request("GET", "/v2/models/florence2/ready")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def has_ended(self) -> bool:
        return self._process is not None and self._process.poll() is not None

    def stop(self) -> None:
        """Every process of it, whatever state it is in."""
        if self._process is None:
            return
        self.look()
        for _, process in self.tree.values():
            with contextlib.suppress(psutil.Error):
                process.resume()
        self._process.terminate()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for _, process in self.tree.values():
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.tree = {}

    def look(self) -> dict[int, tuple[str, psutil.Process]]:
        """The processes that are alive; those that were there before and are not any more."""
        assert self._process is not None
        found: dict[int, tuple[str, psutil.Process]] = {}
        with contextlib.suppress(psutil.Error):
            parent = psutil.Process(self._process.pid)
            for process in (parent, *parent.children(recursive=True)):
                with contextlib.suppress(psutil.Error):
                    alive = process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
                    if alive and process.name() not in HELPERS:
                        role = "serve" if process.pid == self._process.pid else _role(process)
                        found[process.pid] = (role, process)
        gone = {pid: one for pid, one in self.tree.items() if pid not in found or found[pid][1] != one[1]}
        self.tree = found
        self._open_log()
        return gone

    def _open_log(self) -> None:
        """tritonserver's, while it is there: it may be removed with the server."""
        for role, process in self.tree.values():
            if role == "tritonserver" and (
                self._server_log is None or self._server_log.name != f"/proc/{process.pid}/fd/2"
            ):
                with contextlib.suppress(OSError):
                    path = Path(f"/proc/{process.pid}/fd/2")
                    if path.is_file():
                        self._server_log = path.open(errors="replace")

    def server_log(self, lines: int = 8) -> str:
        """The end of what tritonserver has said, but for its tables."""
        if self._server_log is None:
            return ""
        number = self._server_log.fileno()
        text = os.pread(number, 20_000, max(0, os.fstat(number).st_size - 20_000)).decode(errors="replace")
        return "\n".join([line[:300] for line in text.splitlines() if line and line[0] not in "|+"][-lines:])


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        found = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in found:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in found]


def _role(process: psutil.Process) -> str:
    """A python model's name, or what the program is called."""
    words = process.cmdline()
    for word in words[1:]:
        path = Path(word)
        if path.name == "model.py":
            return path.parents[1].name
        if word.startswith("-") or ("/" in word and path.suffix != ".py"):
            continue
        return path.stem if path.suffix == ".py" else word.removeprefix("florence2_")
    return Path(words[0]).name if words else "?"


class Watch(threading.Thread):
    """Looks at the processes until `close`; starts a server that has ended anew, which sets `up` again."""

    def __init__(self, served: Served, up: Any, on_end: Callable[[End], None]) -> None:
        super().__init__(name="watch", daemon=True)
        self.served, self._up, self._on_end = served, up, on_end
        self.peaks: dict[str, float] = defaultdict(float)
        """MB by role, VmHWM."""
        self.most = 0.0
        """MB of all together, at once."""
        self.restarts = 0
        self.backs: list[float] = []
        """Seconds from each end of tritonserver that was none of our doing until it was ready again."""
        self.gave_up = ""
        """Why the server is not started any more."""
        self.expected = ""
        """A role whose end is our doing, and with it that of others."""
        self.hung = threading.Event()
        """To be set by who finds that the server answers nobody."""
        self._closed = threading.Event()
        self._going_until = self._calm_until = 0.0
        self._ended: float | None = None

    def run(self) -> None:
        while not self._closed.wait(EVERY) and not self.gave_up:
            self._measure()
            gone = self.served.look()
            if gone and not self.expected and not self._closed.is_set():
                self._tell([role for role, _ in gone.values()])
            if self.hung.is_set():
                self._on_end(End("all that answers", time.monotonic(), self.served.server_log()))
                self.hung.clear()
                self._up.clear()
                self.served.stop()
                self._restart()
            elif self.served.has_ended() and not self._closed.is_set():
                self._restart()
            self._wait_for_calm()
        if self.gave_up:
            self.served.stop()

    def _wait_for_calm(self) -> None:
        now = time.monotonic()
        if self._ended and self.served.is_ready():
            self.backs.append(now - self._ended)
            self._ended, self._calm_until = None, now + CALM
        elif self._calm_until and now > self._calm_until and not self._ended:
            self._calm_until = 0.0
            self._up.set()

    def _tell(self, roles: list[str]) -> None:
        """Whatever runs under tritonserver goes with it, and then what runs it."""
        now = time.monotonic()
        if now < self._going_until:
            return
        whole = [role for role in WHOLE if role in roles]
        if whole:
            roles, self._going_until = whole[:1], now + GOING
            if roles == ["tritonserver"]:
                self._ended = now
                self._up.clear()
        for role in roles:
            self._on_end(End(role, now, self.served.server_log()))

    def _restart(self) -> None:
        self._up.clear()
        self.restarts += 1
        if self.restarts > RESTARTS:
            self.gave_up = f"the server has ended {self.restarts} times"
            return
        try:
            self.served.start()
        except RuntimeError as error:
            self.gave_up = str(error)
            return
        self._up.set()

    def _measure(self) -> None:
        whole = 0.0
        for role, process in list(self.served.tree.values()):
            with contextlib.suppress(psutil.Error, OSError, StopIteration, ValueError):
                whole += process.memory_info().rss / 1e6
                lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
                peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
                self.peaks[role] = max(self.peaks[role], peak * 1024 / 1e6)
        self.most = max(self.most, whole)
        if whole > MOST_MB:
            self.gave_up = f"the server's processes took {whole:.0f} MB together"
            self._up.clear()

    def close(self) -> None:
        self._closed.set()
        self.join()


@dataclass(frozen=True)
class Fault:
    what: str
    """kill, stop, or a kind of inputs that Triton crashes of."""
    role: str
    back: float | None
    """Seconds until a question was answered again; None: not within the time allowed."""


def roles(served: Served) -> list[str]:
    """Of the processes that may be hit: not what started them."""
    return sorted({role for role, _ in served.tree.values()} - {"serve", "reaper"})


def hit(watch: Watch, what: str, role: str, rng: Random) -> None:
    """One process of that role: killed, or stopped for a second. LookupError: there is none."""
    processes = [process for name, process in watch.served.tree.values() if name == role]
    if not processes:
        raise LookupError(role)
    with contextlib.suppress(psutil.Error):
        process = rng.choice(processes)
        process.send_signal(SIGNALS[what])
        if what == "stop":
            time.sleep(1)
            process.resume()


def make_fault(
    watch: Watch, what: str, role: str, make: Callable[[], object], answers: Callable[[], bool], allowed: float
) -> Fault:
    """Does what may end a process of that role, and waits until `answers`."""
    # Triton (24.10) takes a process that is stopped for a second for dead, if it holds a lock.
    watch.expected, restarts = role, watch.restarts
    try:
        began = time.monotonic()
        make()
        while not answers():
            if time.monotonic() - began > allowed:
                return Fault(what, role, None)
            time.sleep(0.1)
        back = time.monotonic() - began
        time.sleep(2 * EVERY)
        # Started anew by us, it has not come back.
        return Fault(what, role, back if watch.restarts == restarts else None)
    except LookupError:
        return Fault(what, role, None)
    finally:
        watch.expected = ""
