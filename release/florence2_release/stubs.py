"""Brings back python models whose process has ended.

Triton (24.10) never starts it again, and goes on calling the model ready.
"""

import json
import os
import threading
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from florence2_release.server import TritonServer

Stub = tuple[str, int]
"""A model and its version."""
EVERY = 1.0
"""Seconds between looks; a stub is gone when it is missing at two of them."""


class StubWatch:
    """Looks after the stubs of a server that this process has started, from a thread."""

    def __init__(self, server: TritonServer, say: Callable[[str], None]) -> None:
        self.server, self.say = server, say
        self._missing: set[Stub] = set()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="stubs", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(timeout=2)

    def _run(self) -> None:
        while not self._ended.wait(EVERY):
            try:
                self._look()
            except (OSError, ValueError) as error:
                # The server is busy, or on its way out.
                if self.server.is_alive() and not self._ended.is_set():
                    self.say(f"the models' processes could not be looked after: {error}")

    def _look(self) -> None:
        running = Counter(_stubs(self.server.pid, self.server.repository))
        url = self.server.http_url
        missing = {stub for stub in _ready(url) if running[stub] < _instances(url, stub)}
        lost, self._missing = missing & self._missing, missing
        for model, version in lost:
            self._missing.discard((model, version))
            self.say(f"{model} {version} had lost its process; it is started again")
            # What has changed is loaded again; the rest of the model's versions are left alone.
            os.utime(self.server.repository / model / str(version) / "model.py")
            _post(f"{url}/v2/repository/models/{model}/load")


def _instances(http_url: str, stub: Stub) -> int:
    """Processes that the version has when it is whole: none of what is no python model."""
    with urllib.request.urlopen(f"{http_url}/v2/models/{stub[0]}/versions/{stub[1]}/config", timeout=60) as response:
        config = json.load(response)
    return sum(group["count"] for group in config["instance_group"]) if config.get("backend") == "python" else 0


def _ready(http_url: str) -> Iterator[Stub]:
    for entry in json.loads(_post(f"{http_url}/v2/repository/index")):
        if entry.get("state") == "READY":
            yield entry["name"], int(entry["version"])


def _post(url: str) -> bytes:
    with urllib.request.urlopen(urllib.request.Request(url, data=b"{}", method="POST"), timeout=3600) as response:
        return response.read()


def _stubs(server: int | None, repository: Path) -> Iterator[Stub]:
    """Of the server's children; their command line names the model.py."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            arguments = (process / "cmdline").read_bytes().split(b"\0")
        except (OSError, ValueError, IndexError):
            # It has ended in between.
            continue
        if parent == server and len(arguments) > 1:
            model = Path(os.fsdecode(arguments[1]))
            if model.name == "model.py" and model.parents[2] == repository:
                yield model.parents[1].name, int(model.parent.name)
