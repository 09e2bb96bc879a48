"""The readiness that probes ask: Triton's own says nothing of a model's process, or an ensemble's steps."""

import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from florence2_release import processes
from florence2_release.ports import cannot_listen, ipv4
from florence2_release.repository import Repository
from florence2_release.server import TritonServer

FRESH = 0.5
"""Seconds for which a look at the server is good."""


class Health:
    """Of a server that this process has started."""

    def __init__(self, server: TritonServer) -> None:
        self._server = server
        self._names = set(Repository(server.repository).names())
        """Those that there were at first, and of what came later what was ready once."""
        self._lock = threading.Lock()
        self._looked, self._trouble = 0.0, ""
        self.is_draining = False

    def trouble(self) -> str:
        """Why clients should go elsewhere; nothing while every ensemble, the models that it pins and their processes
        are there."""
        if self.is_draining:
            return "the server is stopping"
        with self._lock:
            if time.monotonic() - self._looked > FRESH:
                self._trouble = self._look()
                self._looked = time.monotonic()
            return self._trouble

    def _look(self) -> str:
        if not self._server.is_alive():
            return "the server is being started"
        trouble = ""
        # Twice: what was live at first may be retired when it is asked for, and what took its place is there.
        for _ in range(2):
            try:
                return self._look_at_models()
            except Exception as error:
                if isinstance(getattr(error, "reason", None), ConnectionRefusedError):
                    return "the server is being started"
                trouble = f"the server does not answer: {error!r}"
        return trouble

    def _look_at_models(self) -> str:
        if self._server.has_crashed():
            return "the server has crashed"
        ready = processes.ready(self._server)
        loaded = {model for model, _ in ready}
        self._names |= {name for name in Repository(self._server.repository).names() if name in loaded}
        pinned = processes.pinned(self._server, self._names, ready)
        if missing := pinned - ready:
            return f"{processes.named(missing)} is not ready"
        lost = processes.incomplete(self._server, pinned)
        return f"{processes.named(lost)} has lost its process" if lost else ""


def serve_health(health: Health, host: str, port: int) -> ThreadingHTTPServer:
    """GET /ready: 200, or 503 with the reason. `port` 0 picks a free one. Raises ServerError."""
    handler = type("Handler", (_Handler,), {"trouble": staticmethod(health.trouble)})
    try:
        server = ThreadingHTTPServer((ipv4(host), port), handler)
    except (OSError, OverflowError) as error:
        raise cannot_listen(host, port, "health", error) from error
    threading.Thread(target=server.serve_forever, name="health", daemon=True).start()
    return server


def close_health(server: ThreadingHTTPServer) -> None:
    server.shutdown()
    server.server_close()


class _Handler(BaseHTTPRequestHandler):
    trouble: Callable[[], str]
    timeout = 10

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if self.path.partition("?")[0] != "/ready":
            self._answer(404, "there is /ready")
        elif trouble := self.trouble():
            self._answer(503, trouble)
        else:
            self._answer(200, "ready")

    def _answer(self, status: int, text: str) -> None:
        content = f"{text}\n".encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *arguments: object) -> None:
        """Probes come every few seconds."""
