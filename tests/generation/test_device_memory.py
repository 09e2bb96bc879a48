"""How much memory is left for the caches."""

from pathlib import Path

import pytest

from florence2.generation.device_memory import available_bytes

MEMINFO = "MemTotal:       16000 kB\nMemFree:         1000 kB\nMemAvailable:    8000 kB\n"


@pytest.mark.parametrize(
    ("limit", "available"),
    [
        ("5000000", 5_000_000 - 3_000_000 + 700_000),
        ("max", 8000 * 1024),
        # The container may have more than the machine has left.
        ("50000000", 8000 * 1024),
        (None, 8000 * 1024),
    ],
)
def test_what_is_left_of_the_container_or_the_machine(tmp_path: Path, limit: str | None, available: int) -> None:
    """Of the container's 3 MB 0.7 are files that were read, and make room when they have to."""
    (tmp_path / "meminfo").write_text(MEMINFO)
    if limit is not None:
        (tmp_path / "memory.max").write_text(limit + "\n")
        (tmp_path / "memory.current").write_text("3000000\n")
        stat = "anon 2000000\nfile 900000\ninactive_file 600000\nactive_file 100000\nshmem 200000\n"
        (tmp_path / "memory.stat").write_text(stat)
    assert available_bytes(tmp_path / "meminfo", tmp_path) == available
