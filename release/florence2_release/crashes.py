"""A tritonserver that has caught a signal that it should die of, and does not.

Its handler prints where it was, for which it needs memory: where the heap is what broke, it waits for itself for ever.
The process is there, and its endpoints say that all is well.
"""

import re
import time
from collections.abc import Callable
from pathlib import Path

LAST_WORDS = 2**16
"""Bytes of the log in which it says so."""
PATIENCE = 10.0
"""Seconds for it to say where it was, and to end."""
_CAUGHT = re.compile(r"^Signal \((4|6|7|8|11)\) received", re.MULTILINE)


def has_crashed(log: str, process: int | None, proc: Path = Path("/proc")) -> bool:
    """`log`: the end of what `process` has said. What a client sent may stand there too, so that a thread has to be in
    a handler of the signal, which is blocked there."""
    return any(_is_blocked(int(number), process, proc) for number in set(_CAUGHT.findall(log)))


def _is_blocked(signal: int, process: int | None, proc: Path) -> bool:
    for status in proc.glob(f"{process}/task/*/status"):
        try:
            blocked = re.search(r"^SigBlk:\s*(\w+)", status.read_text(), re.MULTILINE)
        except OSError:
            continue
        if blocked and int(blocked[1], 16) >> (signal - 1) & 1:
            return True
    return False


class Crash:
    """Whether a server has been crashed for PATIENCE seconds."""

    def __init__(self, has_crashed: Callable[[], bool]) -> None:
        self._has_crashed = has_crashed
        self._since: float | None = None

    def is_over(self) -> bool:
        """Asked again and again: it ends no more by itself. After that it begins anew."""
        if not self._has_crashed():
            self._since = None
            return False
        now = time.monotonic()
        if self._since is None:
            self._since = now
        if now - self._since < PATIENCE:
            return False
        self._since = None
        return True
