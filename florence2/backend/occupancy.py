"""How full each model of a server is, in memory that their processes share.

Triton keeps a queue per model and tells nobody: without this, what the last step has no room for is refused only after
the steps before it have been paid. Every process writes a row of its own and reads all; a row whose process has ended
counts for nothing.
"""

import fcntl
import mmap
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

SHM_PREFIX = "FLORENCE2_SHM_PREFIX"
"""The variable of the environment that says how files in /dev/shm begin that go with the server."""
PREPROCESS, VISION_ENCODER, BEAM_SEARCH = 1, 2, 3
_ROWS = 256


class Row(NamedTuple):
    """What one process tells; times are CLOCK_MONOTONIC's, in nanoseconds."""

    process: int
    started: int
    model: int
    held: int
    waiting: int
    free: int
    answered: int
    came: int
    failed: int


_ROW = np.dtype([(name, np.int64) for name in Row._fields])
LOOKED_AT = 0.5
"""Seconds between two looks at who is alive."""


class Occupancy:
    """One process's row, and what all of them say."""

    def __init__(self, model: int) -> None:
        """`model`: PREPROCESS, VISION_ENCODER or BEAM_SEARCH. Raises OSError."""
        with _opened() as file:
            memory = mmap.mmap(file, _ROWS * _ROW.itemsize)
            self._rows = np.frombuffer(memory, _ROW)
            alive = self._alive()
            places = np.flatnonzero(~alive)
            if not len(places):
                raise OSError(f"more than {_ROWS} models' processes on one server")
            self._rows[places[0]] = np.zeros((), _ROW)
            self._own = self._rows[places[0]]
            self._own["started"], self._own["model"] = _start_of(os.getpid()), model
            # What its predecessor could not answer may be in a response cache as its process left it.
            self._own["failed"] = time.monotonic_ns()
            self._own["process"] = os.getpid()
        self._living, self._look_next = self._alive(), 0.0

    def hold(self, requests: int, waiting: int = 0, free: int = 0) -> None:
        """How many requests are here; of them so many wait, and so many more may come."""
        self._own["held"], self._own["waiting"], self._own["free"] = requests, waiting, free

    def came(self) -> None:
        """Another request."""
        self._own["came"] = time.monotonic_ns()

    def answered(self) -> None:
        """Another request."""
        self._own["answered"] += 1

    def failed(self) -> None:
        """A request was answered with an error, or is about to be."""
        self._own["failed"] = time.monotonic_ns()

    def close(self) -> None:
        self._own["process"] = 0

    def read(self) -> list[Row]:
        """The rows of all that live."""
        now = time.monotonic()
        if now >= self._look_next:
            self._look_next = now + LOOKED_AT
            self._living = self._alive()
        # Numbers of Python's own: this is read for each request, and NumPy's operations on a handful take longer.
        return [Row(*row) for row in self._rows[self._living].tolist()]

    def _alive(self) -> np.ndarray:
        processes, started = self._rows["process"], self._rows["started"]
        alive = np.zeros(_ROWS, np.bool_)
        for place in np.flatnonzero(processes):
            alive[place] = _start_of(int(processes[place])) == started[place]
        return alive


@contextmanager
def _opened() -> Iterator[int]:
    """The file that the processes of this one's server share, while nobody else takes a row."""
    server = os.getppid()
    prefix = os.environ.get(SHM_PREFIX) or f"florence2_{server}_{_start_of(server)}_"
    path = Path("/dev/shm") / f"{prefix}occupancy"
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        os.ftruncate(file, _ROWS * _ROW.itemsize)
        yield file
        # Closing it does not do: mmap keeps a descriptor of its own, and the lock is of both.
        fcntl.flock(file, fcntl.LOCK_UN)
    finally:
        os.close(file)


def _start_of(process: int) -> int:
    """When it began, in clock ticks since the machine did (proc(5)): tells a process from a later one of the same
    number. -1 if there is none."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return -1
    # A zombie holds nothing any more.
    return -1 if fields[0] == "Z" else int(fields[19])
