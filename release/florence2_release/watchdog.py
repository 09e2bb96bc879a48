"""Brings back python models whose process has ended: Triton never does.

It never answers the requests that were inside, either. So where there were any the whole server ends, for clients to be
told and to ask again, and is started again by who has started it.
"""

import os
import threading
import urllib.request
from collections.abc import Callable
from contextlib import suppress

from florence2.backend.occupancy import left_behind
from florence2_release import processes
from florence2_release.processes import Version
from florence2_release.server import TritonServer

EVERY = 1.0
"""Seconds between looks; a process is gone when it is missing at two of them."""
LOADING = 3600
"""Seconds that a model may take to load."""


class Watchdog:
    """Looks after a server that this process has started, from a thread."""

    def __init__(self, server: TritonServer, say: Callable[[str], None]) -> None:
        self.server, self.say = server, say
        self._missing: set[Version] = set()
        self.returning: Version | None = None
        """What is being loaded again: until that is done, the server sends requests to the process that has ended."""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(timeout=2)

    def _run(self) -> None:
        told = ""
        while not self._ended.wait(EVERY):
            try:
                self._look()
                told = ""
            except Exception as error:
                # The server is busy, on its way out, or being started again: whatever it was, there is a next look.
                line = f"the models' processes could not be looked after: {error!r}"
                if line != told and self.server.is_alive() and not self._ended.is_set():
                    with suppress(OSError):
                        self.say(line)
                told = line

    def _look(self) -> None:
        missing = processes.incomplete(self.server, processes.ready(self.server))
        lost, self._missing = missing & self._missing, missing
        if lost and (held := left_behind(self.server.shm_prefix)):
            names = ", ".join(f"{model} {version}" for model, version in sorted(lost))
            self.say(
                f"{names} had lost its process, and {held} requests with it, which nobody would answer: the server ends"
            )
            self.server.kill()
            return
        for version in lost:
            self._missing.discard(version)
            self._bring_back(*version)

    def _bring_back(self, model: str, version: int) -> None:
        try:
            # What has changed is loaded again; the rest of the model's versions are left alone.
            os.utime(self.server.repository / model / str(version) / "model.py")
        except OSError as error:
            self.say(f"{model} {version} had lost its process, and can't be loaded alone ({error}): the server ends")
            self.server.kill()
            return
        self.say(f"{model} {version} had lost its process; it is started again")
        url = f"{self.server.http_url}/v2/repository/models/{model}/load"
        self.returning = (model, version)
        try:
            with urllib.request.urlopen(urllib.request.Request(url, data=b"{}", method="POST"), timeout=LOADING):
                pass
        finally:
            self.returning = None
