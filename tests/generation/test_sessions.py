"""How many threads ONNX Runtime gets: no more than a container's CPU quota."""

import os
from pathlib import Path

import pytest

from florence2.generation.sessions import available_cores


@pytest.mark.parametrize(("quota", "cores"), [("100000 100000", 1), ("150000 100000", 2), ("50000 100000", 1)])
def test_a_quota_counts_as_whole_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, cores: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    (tmp_path / "cpu.max").write_text(quota)
    assert available_cores(tmp_path / "cpu.max") == cores


@pytest.mark.parametrize("content", ["max 100000", "", None])
def test_without_a_quota_it_is_the_affinity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    if content is not None:
        (tmp_path / "cpu.max").write_text(content)
    assert available_cores(tmp_path / "cpu.max") == 8
