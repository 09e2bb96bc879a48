"""Starting and stopping a Triton server on a model repository.

with TritonServer("repository") as server:
    server.wait_ready(progress=print)
    ...  # server.http_url, server.grpc_url
"""

import contextlib
import http.client
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from florence2.backend.occupancy import SHM_PREFIX
from florence2_release import reaper
from florence2_release.configs import check_backends
from florence2_release.crashes import LAST_WORDS, Crash, has_crashed
from florence2_release.log import failure, loading
from florence2_release.ports import bind, ipv4
from florence2_release.tritonserver import (
    Installation,
    ServerError,
    check_libraries,
    environment,
    find_tritonserver,
    lay_out_backend,
    lay_out_python,
)

__all__ = ["ServerError", "TritonServer"]


class TritonServer:
    """One tritonserver process on one repository.

    host: the IPv4 address it listens on. Whoever reaches it can load models, that is, run code.
    http_port, grpc_port, metrics_port: 0 picks a free one; the attributes tell which after `start`.
    log: where the server's output goes; by default a file that goes with `stop` (`log_text` still has it).
    cache_size: bytes of the response cache; None for none.
    max_http_size: bytes that an HTTP request may have; None for Triton's own bound.
    drain_seconds: how long `stop` lets requests in flight finish.
    """

    def __init__(
        self,
        repository: str | os.PathLike[str],
        *,
        host: str = "127.0.0.1",
        http_port: int = 0,
        grpc_port: int = 0,
        metrics_port: int = 0,
        log: str | os.PathLike[str] | None = None,
        cache_size: int | None = None,
        max_http_size: int | None = None,
        drain_seconds: int = 30,
    ) -> None:
        self.repository = Path(repository).absolute()
        self.host = host
        self.http_port, self.grpc_port, self.metrics_port = http_port, grpc_port, metrics_port
        self.log_path = Path(log).absolute() if log else None
        self.cache_size, self.max_http_size = cache_size, max_http_size
        self.drain_seconds = drain_seconds
        self.installation: Installation | None = None
        self.pid: int | None = None
        """tritonserver's own, which is its process group's too."""
        self._reaper: subprocess.Popen[str] | None = None
        self._job: dict = {}
        self._log_fd: int | None = None

    def __enter__(self) -> "TritonServer":
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def http_url(self) -> str:
        return f"http://{self._reachable}:{self.http_port}"

    @property
    def grpc_url(self) -> str:
        return f"{self._reachable}:{self.grpc_port}"

    @property
    def metrics_url(self) -> str:
        return f"http://{self._reachable}:{self.metrics_port}/metrics"

    @property
    def _reachable(self) -> str:
        return "127.0.0.1" if self.host == "0.0.0.0" else self.host

    def start(self) -> None:
        """Starts the process; `wait_ready` waits for the models. ServerError for what can be told before."""
        if self.is_alive():
            raise ServerError(f"this server runs already (process {self.pid})")
        _check_repository(self.repository)
        self.installation = find_tritonserver()
        address = ipv4(self.host)
        if self.installation.wheel:
            check_backends(self.repository)
            if self.max_http_size is not None:
                raise ServerError("nvidia-pytriton's server has no bound of HTTP requests to set; leave it out there")
        with contextlib.ExitStack() as ports, contextlib.ExitStack() as on_failure:
            self._choose_ports(address, ports)
            runtime = Path(tempfile.mkdtemp(prefix="florence2-triton-"))
            on_failure.callback(shutil.rmtree, runtime, ignore_errors=True)
            if self.installation.wheel:
                lay_out_backend(self.installation.wheel, runtime)
            env = environment(self.installation, runtime, lay_out_python(runtime))
            if self.installation.wheel:
                check_libraries(runtime / "backends" / "python" / "triton_python_backend_stub", env)
            ports.close()
            self._spawn(runtime, env, address)
            on_failure.pop_all()

    def _choose_ports(self, address: str, held: contextlib.ExitStack) -> None:
        for name, what in (("http_port", "HTTP"), ("grpc_port", "gRPC"), ("metrics_port", "metrics")):
            holder = held.enter_context(bind(address, getattr(self, name), what))
            setattr(self, name, holder.getsockname()[1])

    def _spawn(self, runtime: Path, env: dict[str, str], address: str) -> None:
        log = self.log_path or runtime / "server.log"
        shm_prefix = f"florence2_{os.getpid()}_{secrets.token_hex(4)}_"
        self._job = {
            "parent": os.getpid(),
            "drain_seconds": self.drain_seconds,
            "shm_prefix": shm_prefix,
            "runtime": str(runtime),
            "command": self._command(runtime, address, shm_prefix),
        }
        if self._log_fd is not None:
            os.close(self._log_fd)
        with open(log, "wb") as output:
            # Stays readable when the reaper has removed the folder.
            self._log_fd = os.open(log, os.O_RDONLY)
            self._reaper = subprocess.Popen(
                [sys.executable, "-I", "-S", reaper.__file__, json.dumps(self._job)],
                env={**env, SHM_PREFIX: shm_prefix},
                cwd=runtime,  # the stub's sys.path starts with its working directory
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
                start_new_session=True,  # Ctrl-C is for us; we decide when the server stops
            )
        assert self._reaper.stdout
        with self._reaper.stdout as stdout:
            line = stdout.readline()
        if not line:
            self._reaper.wait()
            raise ServerError(f"tritonserver could not be started:\n{self.log_tail()}")
        self.pid = int(line)

    def _command(self, runtime: Path, address: str, shm_prefix: str) -> list[str]:
        assert self.installation
        options = {
            "model-repository": self.repository,
            # Explicit, so that later releases can be loaded; the star loads what is there now.
            "model-control-mode": "explicit",
            "load-model": "*",
            "http-address": address,
            "http-port": self.http_port,
            "grpc-address": address,
            "grpc-port": self.grpc_port,
            "metrics-address": address,
            "metrics-port": self.metrics_port,
            "exit-timeout-secs": self.drain_seconds,
            # Strictly, one version of one model that is loading, or was refused, makes the server unready.
            "strict-readiness": "false",
            # What a killed stub leaves in /dev/shm is found by its name.
            "backend-config": f"python,shm-region-prefix-name={shm_prefix}",
        }
        if self.cache_size is not None:
            options["cache-config"] = f"local,size={self.cache_size}"
        if self.max_http_size is not None:
            options["http-max-input-size"] = self.max_http_size
        if self.installation.wheel:
            options["backend-directory"] = runtime / "backends"
            options["cache-directory"] = self.installation.wheel / "caches"
        if not any(map(os.path.exists, ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg"))):
            # Without a GPU these two only write warnings about NVML and the driver.
            options |= {"allow-gpu-metrics": "false", "pinned-memory-pool-byte-size": 0}
        return [
            str(self.installation.binary),
            *(f"--{name}={value}" for name, value in options.items()),
        ]

    def is_alive(self) -> bool:
        return self._reaper is not None and self._reaper.poll() is None

    def is_ready(self) -> bool:
        """Whether the server takes requests: not before the models are loaded that it starts with."""
        connection = http.client.HTTPConnection(self._reachable, self.http_port, timeout=5)
        try:
            connection.request("GET", "/v2/health/ready")
            if connection.getresponse().status != 200:
                return False
            # The last endpoint that it opens.
            socket.create_connection((self._reachable, self.metrics_port), timeout=5).close()
            return True
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def wait_ready(self, timeout: float = 300.0, progress: Callable[[str], None] | None = None) -> None:
        """Returns when every model is loaded; `progress` gets a line every two seconds. ServerError with the
        reason when the server exits, as it does when a model fails to load, or `timeout` seconds are over."""
        began = told = time.monotonic()
        crash = Crash(self.has_crashed)
        while not self.is_ready():
            now = time.monotonic()
            if crash.is_over():
                self.kill()
            if not self.is_alive():
                raise ServerError(f"the server stopped before it was ready: {failure(self.log_text())}")
            if now - began > timeout:
                raise ServerError(f"the server is not ready after {timeout:.0f} s: {failure(self.log_text())}")
            if progress and now - told >= 2:
                progress(f"{loading(self.log_text())} ({now - began:.0f} s)")
                told = now
            time.sleep(0.1)

    def wait(self, timeout: float | None = None) -> int | None:
        """tritonserver's exit code (128 + n for signal n, as in a shell), None if it runs on."""
        if self._reaper is None:
            return None
        try:
            return self._reaper.wait(timeout)
        except subprocess.TimeoutExpired:
            return None

    def stop(self) -> None:
        """Lets requests in flight finish, for `drain_seconds` at most, and returns when no process is left.
        Does nothing when none runs. Interrupted (Ctrl-C), it ends the server at once."""
        if self._reaper is None:
            return
        try:
            self._reaper.terminate()
            # tritonserver keeps the time itself; what comes on top is for models that don't finish.
            self.wait(self.drain_seconds + 15)
        finally:
            self.kill()

    def kill(self) -> None:
        """Ends every process of the server at once."""
        if self._reaper is None:
            return
        self._reaper.send_signal(signal.SIGQUIT)
        if self.wait(10) is None:
            self._reaper.kill()
            self._reaper.wait()
        if self._reaper.returncode < 0 and self.pid:  # the reaper itself was killed
            reaper.kill_group(self.pid)
            reaper.clean(self._job)

    def log_text(self, last: int | None = None) -> str:
        """All of it, or the `last` bytes."""
        if self._log_fd is None:
            return ""
        size = os.fstat(self._log_fd).st_size
        count = min(size, last or size)
        return os.pread(self._log_fd, count, size - count).decode(errors="replace")

    def has_crashed(self) -> bool:
        """And has not ended; its endpoints may say that all is well."""
        return self.is_alive() and has_crashed(self.log_text(last=LAST_WORDS), self.pid)

    def log_tail(self, lines: int = 20) -> str:
        return "\n".join(self.log_text().splitlines()[-lines:])


def _check_repository(repository: Path) -> None:
    if not repository.is_dir():
        raise ServerError(f"there is no model repository at {repository}: make one with `florence2 release`")
    if not any((folder / "config.pbtxt").is_file() for folder in repository.iterdir()):
        raise ServerError(
            f"no model in {repository}: install one with `florence2 release DIR --repository {repository}`"
        )
