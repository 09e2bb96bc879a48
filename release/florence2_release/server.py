"""Starting and stopping a Triton server on a model repository.

    with TritonServer("repository") as server:
        server.wait_ready(progress=print)
        ...  # server.http_url, server.grpc_url

Run as a script, this file is the keeper: the small process between us and tritonserver that outlives both and
leaves nothing behind. So it imports the standard library only.
"""

import contextlib
import ctypes
import errno
import http.client
import importlib.util
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_SHM = Path("/dev/shm")
_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


class ServerError(RuntimeError):
    """The server can't be started, or stopped by itself; the text says why and what to do."""


# --- which tritonserver, and what it needs ------------------------------------------------------------------


@dataclass(frozen=True)
class Installation:
    """A tritonserver; `wheel` is the folder of nvidia-pytriton it lies in, None in NVIDIA's image."""

    binary: Path
    wheel: Path | None = None


def find_tritonserver() -> Installation:
    """`tritonserver` on PATH, else the one in the nvidia-pytriton wheel, else ServerError."""
    on_path = shutil.which("tritonserver")
    if on_path:
        return Installation(Path(on_path))
    spec = importlib.util.find_spec("pytriton")  # finds a top-level package without importing it
    for package in (spec.submodule_search_locations or []) if spec else []:
        wheel = Path(package) / "tritonserver"
        if (wheel / "bin" / "tritonserver").is_file():
            return Installation(wheel / "bin" / "tritonserver", wheel)
    raise ServerError(
        "no tritonserver here: pip install 'florence2-triton[local-server]', or run in NVIDIA's Triton image"
    )


def _lay_out_backend(wheel: Path, runtime: Path) -> None:
    """Links what the wheel's server needs into `runtime`: site-packages may be read-only."""
    stub = wheel / "python_backend_stubs" / _PYTHON / "triton_python_backend_stub"
    if not stub.is_file():
        raise ServerError(f"the nvidia-pytriton wheel has no python backend for Python {_PYTHON}")
    backend = runtime / "backends" / "python"
    backend.mkdir(parents=True)
    for file in (*(wheel / "backends" / "python").glob("*triton_python*.*"), stub):
        (backend / file.name).symlink_to(file)
    libraries = runtime / "lib"
    libraries.mkdir()
    # The one library, not its folder: a conda prefix holds other versions of what tritonserver links too.
    libpython = _libpython()
    if libpython:
        (libraries / libpython.name).symlink_to(libpython)


def _libpython() -> Path | None:
    name = f"libpython{_PYTHON}.so.1.0"
    folder = Path(sysconfig.get_config_var("LIBDIR") or "/usr/lib")
    places = (folder, folder / (sysconfig.get_config_var("MULTIARCH") or ""), Path(sys.base_prefix, "lib"))
    return next((place / name for place in places if (place / name).is_file()), None)


def _check_libraries(program: Path, env: dict[str, str]) -> None:
    """Asks the loader, as ldd does, so that a missing library is told before the server starts."""
    trace = {**env, "LD_TRACE_LOADED_OBJECTS": "1"}
    listing = subprocess.run([program], env=trace, capture_output=True, text=True).stdout
    missing = re.findall(r"(\S+) => not found", listing)
    python = next((name for name in missing if name.startswith("libpython")), None)
    if python:
        package = python.removesuffix(".so.1.0")
        raise ServerError(
            f"the python backend needs {python}, which this Python was built without: apt install {package}, "
            "or use a Python built with --enable-shared"
        )
    if missing:
        raise ServerError(f"{program.name} needs libraries that are not here: {', '.join(missing)}")


def _lay_out_python(runtime: Path) -> Path:
    """Makes a virtual environment whose modules are this process's, and returns its folder of programs.

    The python backend embeds an isolated Python (sys.flags.isolated is 1 in the stubs of 24.10, so neither
    PYTHONPATH nor PYTHONDONTWRITEBYTECODE counts). It takes the first `python3` on PATH for its own and reads
    the .pth files there.
    """
    environment = runtime / "python"
    programs = environment / "bin"
    programs.mkdir(parents=True)
    (programs / "python3").symlink_to(sys.executable)
    home = os.path.dirname(os.path.realpath(sys.executable))
    (environment / "pyvenv.cfg").write_text(f"home = {home}\ninclude-system-site-packages = false\n")
    site = environment / "lib" / f"python{_PYTHON}" / "site-packages"
    site.mkdir(parents=True)
    # A __pycache__ in a model's folder counts as a change of the model (triton-inference-server/server#7489).
    lines = ["import sys; sys.dont_write_bytecode = True"]
    lines += [f"import site; site.addsitedir({folder!a})" for folder in _import_path()]
    (site / "florence2.pth").write_text("\n".join(lines))
    return programs


def _import_path() -> list[str]:
    """sys.path without the standard library, which the embedded Python has of its own."""
    standard = [os.path.realpath(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib")]
    standard += [os.path.join(folder, "lib-dynload") for folder in standard]
    folders = [os.path.abspath(entry) for entry in sys.path if os.path.isdir(entry or ".")]
    return [folder for folder in folders if os.path.realpath(folder) not in standard]


def _environment(installation: Installation, runtime: Path, programs: Path) -> dict[str, str]:
    env = dict(os.environ)
    env["PATH"] = os.pathsep.join([str(programs), env.get("PATH", os.defpath)])
    env["PYTHONDONTWRITEBYTECODE"] = "1"  # for the stubs that are not isolated
    if installation.wheel:
        ours = [str(runtime / "lib"), str(installation.wheel.parent.parent / "nvidia_pytriton.libs")]
        env["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, [*ours, env.get("LD_LIBRARY_PATH")]))
    return env


# --- addresses ----------------------------------------------------------------------------------------------


def ipv4(host: str) -> str:
    try:
        return socket.gethostbyname(host)
    except OSError as error:
        raise ServerError(f"cannot listen on {host!r}: give an IPv4 address or a name that has one") from error


def _bind(address: str, port: int, what: str) -> socket.socket:
    """A socket that holds the port (a free one for 0) until it is closed."""
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        holder.bind((address, port))
    except (OSError, OverflowError) as error:
        holder.close()
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            raise ServerError(f"port {port} ({what}) is in use: stop what listens there or name another") from error
        raise ServerError(f"cannot listen on {address} port {port} ({what}): {error}") from error
    return holder


def _check_repository(repository: Path) -> None:
    if not repository.is_dir():
        raise ServerError(f"there is no model repository at {repository}: make one with `florence2 release`")
    if not any((folder / "config.pbtxt").is_file() for folder in repository.iterdir()):
        raise ServerError(
            f"no model in {repository}: install one with `florence2 release DIR --repository {repository}`"
        )


# --- the server ---------------------------------------------------------------------------------------------


class TritonServer:
    """One tritonserver process on one repository.

    host: the IPv4 address it listens on. Whoever reaches it can load models, that is, run code.
    http_port, grpc_port, metrics_port: 0 picks a free one; the attributes tell which after `start`.
    model_config_name: the profile, `<model>/configs/<name>.pbtxt`; "cpu" is each model's plain config.pbtxt.
    log: where the server's output goes; by default a file that goes with `stop` (`log_text` still has it).
    cache_size: bytes of the response cache; None for none.
    drain_seconds: how long `stop` lets requests in flight finish.
    extra_args: more options of tritonserver; they win over those set here. Paths in them must be absolute.
    """

    def __init__(
        self,
        repository: str | os.PathLike[str],
        *,
        host: str = "127.0.0.1",
        http_port: int = 0,
        grpc_port: int = 0,
        metrics_port: int = 0,
        model_config_name: str = "cpu",
        log: str | os.PathLike[str] | None = None,
        cache_size: int | None = None,
        drain_seconds: int = 30,
        extra_args: Sequence[str] = (),
    ) -> None:
        self.repository = Path(repository).absolute()
        self.host = host
        self.http_port, self.grpc_port, self.metrics_port = http_port, grpc_port, metrics_port
        self.model_config_name = model_config_name
        self.log_path = Path(log).absolute() if log else None
        self.cache_size = cache_size
        self.drain_seconds = drain_seconds
        self.extra_args = tuple(extra_args)
        self.installation: Installation | None = None
        self.pid: int | None = None
        """tritonserver's own, which is its process group's too."""
        self._keeper: subprocess.Popen[str] | None = None
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
        with contextlib.ExitStack() as ports, contextlib.ExitStack() as on_failure:
            self._choose_ports(address, ports)
            runtime = Path(tempfile.mkdtemp(prefix="florence2-triton-"))
            on_failure.callback(shutil.rmtree, runtime, ignore_errors=True)
            if self.installation.wheel:
                _lay_out_backend(self.installation.wheel, runtime)
            env = _environment(self.installation, runtime, _lay_out_python(runtime))
            if self.installation.wheel:
                _check_libraries(runtime / "backends" / "python" / "triton_python_backend_stub", env)
            ports.close()
            self._spawn(runtime, env, address)
            on_failure.pop_all()

    def _choose_ports(self, address: str, held: contextlib.ExitStack) -> None:
        for name, what in (("http_port", "HTTP"), ("grpc_port", "gRPC"), ("metrics_port", "metrics")):
            holder = held.enter_context(_bind(address, getattr(self, name), what))
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
            # Stays readable when the keeper has removed the folder.
            self._log_fd = os.open(log, os.O_RDONLY)
            self._keeper = subprocess.Popen(
                [sys.executable, "-I", "-S", os.path.abspath(__file__), json.dumps(self._job)],
                env=env,
                cwd=runtime,  # the stub's sys.path starts with its working directory
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
                start_new_session=True,  # Ctrl-C is for us; we decide when the server stops
            )
        assert self._keeper.stdout
        with self._keeper.stdout as stdout:
            line = stdout.readline()
        if not line:
            self._keeper.wait()
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
            # What a killed stub leaves in /dev/shm is found by its name.
            "backend-config": f"python,shm-region-prefix-name={shm_prefix}",
        }
        if self.model_config_name != "cpu":
            options["model-config-name"] = self.model_config_name
        if self.cache_size is not None:
            options["cache-config"] = f"local,size={self.cache_size}"
        if self.installation.wheel:
            options["backend-directory"] = runtime / "backends"
            options["cache-directory"] = self.installation.wheel / "caches"
        if not any(map(os.path.exists, ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg"))):
            # Without a GPU these two only write warnings about NVML and the driver.
            options |= {"allow-gpu-metrics": "false", "pinned-memory-pool-byte-size": 0}
        return [
            str(self.installation.binary),
            *(f"--{name}={value}" for name, value in options.items()),
            *self.extra_args,
        ]

    def is_alive(self) -> bool:
        return self._keeper is not None and self._keeper.poll() is None

    def is_ready(self) -> bool:
        """Whether every model is loaded and the server takes requests."""
        connection = http.client.HTTPConnection(self._reachable, self.http_port, timeout=5)
        try:
            connection.request("GET", "/v2/health/ready")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def wait_ready(self, timeout: float = 300.0, progress: Callable[[str], None] | None = None) -> None:
        """Returns when every model is loaded; `progress` gets a line every two seconds. ServerError with the
        reason when the server exits, as it does when a model fails to load, or `timeout` seconds are over."""
        began = told = time.monotonic()
        while not self.is_ready():
            now = time.monotonic()
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
        if self._keeper is None:
            return None
        try:
            return self._keeper.wait(timeout)
        except subprocess.TimeoutExpired:
            return None

    def stop(self) -> None:
        """Lets requests in flight finish, for `drain_seconds` at most, and returns when no process is left.
        Does nothing when none runs. Interrupted (Ctrl-C), it ends the server at once."""
        if self._keeper is None:
            return
        try:
            self._keeper.terminate()
            # tritonserver keeps the time itself; what comes on top is for models that don't finish.
            self.wait(self.drain_seconds + 15)
        finally:
            self.kill()

    def kill(self) -> None:
        """Ends every process of the server at once."""
        if self._keeper is None:
            return
        self._keeper.send_signal(signal.SIGQUIT)
        if self.wait(10) is None:
            self._keeper.kill()
            self._keeper.wait()
        if self._keeper.returncode < 0 and self.pid:  # the keeper itself was killed
            _kill_group(self.pid)
            _clean(self._job)

    def log_text(self) -> str:
        if self._log_fd is None:
            return ""
        size = os.fstat(self._log_fd).st_size
        return os.pread(self._log_fd, size, 0).decode(errors="replace")

    def log_tail(self, lines: int = 20) -> str:
        return "\n".join(self.log_text().splitlines()[-lines:])


# --- what the log says --------------------------------------------------------------------------------------

_ERROR_LINE = re.compile(r"^(?:E\d{4} \S+ \d+ \S+\] |error: |\[libprotobuf ERROR [^\]]*\] )(.*)$", re.MULTILINE)
_CAUSE = re.compile(r"^(failed to load ('|model ')|Poll failed|Error parsing)")
# The first is on every machine without a GPU; the others repeat what the model's own line says.
_ECHO = re.compile(
    r"CudaDriverHelper|^ERROR: Failed to create instance|^creating server: Internal - failed to load all"
)


def failure(log: str) -> str:
    """What a server's log says of why it failed: each failed model with its Python exception."""
    errors = [_unquote(line) for line in _ERROR_LINE.findall(log)]
    errors = [line for line in errors if not _ECHO.search(line)]
    causes = [line for line in errors if _CAUSE.match(line)] or errors or log.splitlines()[-20:]
    first, *rest = "\n".join(dict.fromkeys(causes)).splitlines() or ["its log is empty"]
    return "\n".join([first, *(f"  {line}" for line in rest if line.strip())])


def _unquote(message: str) -> str:
    """From 24.07 on the server writes its messages as JSON strings."""
    try:
        text = json.loads(message)
    except ValueError:
        return message
    return text if isinstance(text, str) else message


def loading(log: str) -> str:
    """How far a starting server has come, in words."""
    wanted = dict.fromkeys(re.findall(r"\bloading: (\S+?):\d+", log))
    loaded = set(re.findall(r"\bsuccessfully loaded '([^']+)'", log))
    waiting = [name for name in wanted if name not in loaded]
    if not wanted:
        return "starting the server"
    return f"{len(loaded)} of {len(wanted)} models loaded" + (f", waiting for {', '.join(waiting)}" if waiting else "")


# --- the keeper ---------------------------------------------------------------------------------------------
#
# A process of its own, because a death signal alone does not do: PR_SET_PDEATHSIG fires when the parent
# *thread* ends (prctl(2)), and what a killed stub leaves in shared memory is removed by nobody.

_ORPHAN_SECONDS = 5


def _keep(job: dict) -> int:
    """Runs tritonserver until it ends, SIGTERM (drain, then stop) or SIGQUIT (stop at once) comes, or the
    parent is gone; then ends its process group, reaps it, removes its shared memory and runtime folder."""
    heard = {signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT}
    signal.pthread_sigmask(signal.SIG_BLOCK, heard)
    prctl = ctypes.CDLL(None).prctl
    prctl(_PR_SET_CHILD_SUBREAPER, 1)
    keeper = os.getpid()

    def in_child() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        # Should the keeper itself be killed, the server ends in its own time. The keeper has one thread only.
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != keeper:
            os._exit(1)

    server = subprocess.Popen(job["command"], stdout=sys.stderr, preexec_fn=in_child, process_group=0)
    with contextlib.suppress(BrokenPipeError):
        print(server.pid, flush=True)
    give_up = None
    while server.poll() is None and (give_up is None or time.monotonic() < give_up):
        got = signal.sigtimedwait(heard, 0.5)
        asked = got is not None and got.si_signo != signal.SIGCHLD
        if got is not None and got.si_signo == signal.SIGQUIT:
            break
        orphan = os.getppid() != job["parent"]
        if give_up is None and (asked or orphan):
            give_up = time.monotonic() + (_ORPHAN_SECONDS if orphan else job["drain_seconds"] + 5)
            server.terminate()
    _kill_group(server.pid)
    code = server.wait()
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)
    _clean(job)
    return code


def _clean(job: dict) -> None:
    for region in _SHM.glob(f"{job['shm_prefix']}*"):
        region.unlink(missing_ok=True)
    shutil.rmtree(job["runtime"], ignore_errors=True)


def _kill_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    status = _keep(json.loads(sys.argv[1]))
    sys.exit(status if status >= 0 else 128 - status)
