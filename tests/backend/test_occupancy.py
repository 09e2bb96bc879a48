"""What the processes of one server tell each other."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from florence2.backend import occupancy
from florence2.backend.occupancy import BEAM_SEARCH, PREPROCESS, SHM_PREFIX, Occupancy

OTHER = """
import sys, time
from florence2.backend.occupancy import Occupancy, VISION_ENCODER
own = Occupancy(VISION_ENCODER)
own.hold(3, waiting=2, free=1)
print("here", flush=True)
time.sleep(100)
"""


@pytest.fixture(autouse=True)
def file(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    prefix = f"florence2_test_{os.getpid()}_"
    monkeypatch.setenv(SHM_PREFIX, prefix)
    monkeypatch.setattr(occupancy, "LOOKED_AT", 0)
    path = Path("/dev/shm") / f"{prefix}occupancy"
    yield path
    path.unlink(missing_ok=True)


def held(one: Occupancy) -> list[int]:
    return sorted(row.held for row in one.read())


def test_what_one_tells_the_others_read(file: Path) -> None:
    front, engine = Occupancy(PREPROCESS), Occupancy(BEAM_SEARCH)
    before = time.monotonic_ns()
    engine.hold(5, waiting=2, free=7)
    engine.came()
    engine.answered()
    engine.answered()
    (row,) = (row for row in front.read() if row.model == BEAM_SEARCH)
    assert (row.held, row.waiting, row.free, row.answered) == (5, 2, 7, 2)
    assert before <= row.came <= time.monotonic_ns()
    engine.close()
    assert [row.model for row in front.read()] == [PREPROCESS]
    # Nobody else reads or writes it.
    assert file.stat().st_mode & 0o777 == 0o600


def test_who_has_ended_counts_for_nothing_and_leaves_a_row() -> None:
    front = Occupancy(PREPROCESS)
    front.hold(1)
    with subprocess.Popen([sys.executable, "-c", OTHER], stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout
            assert other.stdout.readline() == "here\n"
            assert held(front) == [1, 3]
        finally:
            other.send_signal(signal.SIGKILL)
    assert held(front) == [1]
    # Its row is the next one's.
    second = Occupancy(PREPROCESS)
    assert np.flatnonzero(front._rows["process"]).tolist() == [0, 1]
    assert held(front) == held(second) == [0, 1]


def test_a_later_process_of_the_same_number_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    front, other = Occupancy(PREPROCESS), Occupancy(BEAM_SEARCH)
    other._own["started"] -= 1
    assert [row.model for row in front.read()] == [PREPROCESS]


def test_a_zombie_holds_nothing() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    while occupancy._start_of(process.pid) != -1:
        time.sleep(0.01)
    assert process.wait() == 0


def test_more_processes_than_there_are_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(occupancy, "_ROWS", 8)
    all_of_them = [Occupancy(PREPROCESS) for _ in range(8)]
    with pytest.raises(OSError, match="more than 8 models' processes on one server"):
        Occupancy(PREPROCESS)
    all_of_them[5].close()
    Occupancy(PREPROCESS)
