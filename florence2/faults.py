"""Faults that stay: the process ends, and whoever watches it starts another.

An error of CUDA is the context's, which no new session of the same process gets rid of; a server that goes on refusing
at once what others would answer draws all traffic to itself.
"""

import os
import re
import time
from collections.abc import Callable
from threading import Lock

IN_A_ROW = 3
STATUS = 70
"""EX_SOFTWARE of sysexits.h."""
TOLD = 0.2
"""Seconds in which the last answers reach the server."""
_DEVICE = re.compile(r"\b(cuda|cublas|cudnn)", re.IGNORECASE)


def is_of_the_device(error: BaseException) -> bool:
    """Whether it names CUDA or one of its libraries."""
    return bool(_DEVICE.search(str(error)))


class Faults:
    """Of the runs of one graph, from any thread."""

    def __init__(self) -> None:
        self._in_a_row, self._lock = 0, Lock()

    def worked(self) -> None:
        with self._lock:
            self._in_a_row = 0

    def failed(self, error: BaseException) -> bool:
        """Whether it stays."""
        with self._lock:
            self._in_a_row += 1
            return self._in_a_row >= IN_A_ROW or is_of_the_device(error)


def end_process(what: str, error: BaseException, log: Callable[[str], None]) -> None:
    """When everybody was told."""
    log(f"{what} fails and goes on to; its process ends: {error!r}")
    time.sleep(TOLD)
    os._exit(STATUS)
