"""What starts again what has died: models' processes, and the server itself.

Triton never starts a python model's process again. It never answers what was inside, and what comes afterwards fails
one a second, each in its turn. So where a release that clients get has lost one the whole server ends, for clients to
be told and to ask again; `keep_running` starts it again. A candidate, or a release that is kept to go back to, is
loaded again beside the others.
"""

import math
import os
import threading
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from florence2_release import processes
from florence2_release.crashes import Crash
from florence2_release.processes import Version
from florence2_release.repository import Repository
from florence2_release.server import ServerError, TritonServer

EVERY = 1.0
"""Seconds between looks; a process is gone when it is missing at two of them."""
LOADING = 3600
"""Seconds that a model may take to load."""
FIRST_PAUSE, LONGEST_PAUSE, STEADY = 0.5, 60.0, 30.0
"""Seconds before a server that has ended is started again, at first and at most; and for how long it must have run for
the first to hold again."""


class Watchdog:
    """Looks after a server that this process has started, from a thread."""

    def __init__(self, server: TritonServer, say: Callable[[str], None]) -> None:
        self.server, self.say = server, say
        self._missing: set[Version] = set()
        self._crash = Crash(server.has_crashed)
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
        if self._crash.is_over():
            self.say("the server has crashed, and did not end of it: it is ended")
            self.server.kill()
            return
        ready = processes.ready(self.server)
        missing = processes.incomplete(self.server, ready)
        lost, self._missing = missing & self._missing, missing
        if not lost:
            return
        names = Repository(self.server.repository).names()
        if live := lost & processes.pinned(self.server, names, ready):
            self.say(f"{processes.named(live)} has lost its process: the server ends")
            self.server.kill()
            return
        for version in lost:
            self._missing.discard(version)
            self._load_again(*version)

    def _load_again(self, model: str, version: int) -> None:
        try:
            # What has changed is loaded again; the rest of the model's versions are left alone.
            os.utime(self.server.repository / model / str(version) / "model.py")
        except OSError as error:
            self.say(f"{model} {version} has lost its process, and can't be loaded alone ({error}): the server ends")
            self.server.kill()
            return
        self.say(f"{model} {version} had lost its process; it is started again")
        url = f"{self.server.http_url}/v2/repository/models/{model}/load"
        with urllib.request.urlopen(urllib.request.Request(url, data=b"{}", method="POST"), timeout=LOADING):
            pass


def keep_running(server: TritonServer, prepare: Callable[[], None], say: Callable[[str], None]) -> NoReturn:
    """Starts the server again whenever it ends, each time after `prepare`."""
    pause = FIRST_PAUSE
    while True:
        began = time.monotonic()
        code = server.wait()
        if time.monotonic() - began > STEADY:
            pause = FIRST_PAUSE
        say(
            f"the server stopped by itself with code {code}; it is started again in {pause:g} s; its log ends:\n"
            f"{server.log_tail()}"
        )
        while True:
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
            try:
                prepare()
                server.start()
                server.wait_ready(timeout=math.inf)
            except (ServerError, ValueError, OSError) as error:
                server.kill()
                say(f"{error}; again in {pause:g} s")
            else:
                break
        say("ready again")
