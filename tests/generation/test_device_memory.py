"""How much memory is left for the caches, and small arrays side by side."""

from pathlib import Path

import numpy as np
import pytest

from florence2.generation.device_memory import ALIGNMENT, Device, Packed, available_bytes

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


def test_what_is_packed_is_where_it_is_bound() -> None:
    arrays = {"ids": (np.int64, (3, 5)), "none": (np.int64, (0, 2)), "scores": (np.float32, (7,))}
    packed = Packed(arrays, Device("cpu"))
    for name, (dtype, shape) in arrays.items():
        part = packed.parts[name]
        assert (part.dtype, part.shape) == (dtype, shape)
        bound_type, bound_shape, address = packed.bound(name)
        assert (bound_type, bound_shape) == (dtype, shape)
        # numpy has no place for what is empty.
        assert part.size == 0 or address == part.ctypes.data
    starts = [packed.bound(name)[2] for name in arrays]
    assert [start - starts[0] for start in starts] == [0, ALIGNMENT, ALIGNMENT]
    packed.parts["ids"][...] = 7
    packed.to_device()
    packed.parts["scores"][...] = 0.5
    packed.to_host()
    assert (packed.parts["ids"] == 7).all()
    assert (packed.parts["scores"] == 0.5).all()
