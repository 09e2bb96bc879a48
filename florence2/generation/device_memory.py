"""Device memory of the caches, which the graphs read and change in place."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, IOBinding, OrtValue


ALIGNMENT = 256
"""Bytes: as memory that CUDA gives."""


def available_bytes(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """What the machine has left, or the container if that is less. Files that are only kept in memory count as left."""
    free = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:"))
    available = int(free.split()[1]) * 1024
    try:
        limit, used = (int((cgroup / name).read_text()) for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        return min(available, limit - used + int(stat["active_file"]) + int(stat["inactive_file"]))
    except (OSError, ValueError):  # no cgroup v2 here, or no limit ("max")
        return available


class Device(NamedTuple):
    """As ONNX Runtime names it."""

    kind: str
    """"cpu" or "cuda"."""
    id: int = 0


class Cache:
    """One layer's keys or values: room for so many entries, seen as [rows, heads, columns, head_dim].

    A row's entries stand beside each other, so that any number of rows from the first on is one piece of memory. It is
    the same memory from beginning to end, on the device: bindings and CUDA graphs know its address. On the CPU the
    operating system gives pages when they are first written.
    """

    def __init__(
        self, entries: int, heads: int, head_dim: int, dtype: DTypeLike, device: Device, relayout: "InferenceSession"
    ) -> None:
        """`relayout`: the session of relayout.onnx, on the same device."""
        from onnxruntime import OrtValue

        self._entries, self._heads, self._head_dim = entries, heads, head_dim
        self._dtype, self._device = np.dtype(dtype), device
        self._relayout = relayout
        self.columns = 0
        # Zeros, because a masked entry still meets a weight of 0, and 0 times NaN is NaN. Whatever is left of other
        # requests later is finite.
        self._memory = OrtValue.ortvalue_from_numpy(np.zeros(entries * heads * head_dim, self._dtype), *device)

    def reshape(self, rows: NDArray[np.int64], columns: int) -> None:
        """To other `columns`; of what was there, `rows` are kept, as the first rows. Columns that are new hold
        anything."""
        if len(rows) and self.columns:
            kept = np.minimum(np.arange(columns), self.columns - 1)
            count = int(rows.max()) + 1
            # By way of a copy: rows lie elsewhere afterwards, over each other's old places.
            copied = self._run(count, self.columns, self._memory.data_ptr(), rows, kept, None)
            address = self._memory.data_ptr()
            self._run(len(rows), columns, copied.data_ptr(), np.arange(len(rows)), np.arange(columns), address)
        self.columns = columns

    def clear(self, row: int) -> None:
        """It holds zeros."""
        from onnxruntime import OrtValue

        zeros = OrtValue.ortvalue_from_numpy(
            np.zeros((1, self._heads, self.columns, self._head_dim), self._dtype), *self._device
        )
        address = self._address(row)
        self._run(1, self.columns, zeros.data_ptr(), np.zeros(1, np.int64), np.arange(self.columns), address)

    def _run(
        self,
        count: int,
        columns: int,
        pointer: int,
        rows: NDArray[np.int64],
        kept: NDArray[np.int64],
        target: int | None,
    ) -> "OrtValue":
        """`rows` and the `kept` columns of what lies at `pointer`, written to `target`, else to memory of its own."""
        from onnxruntime import RunOptions

        binding = self._relayout.io_binding()
        shape = (count, self._heads, columns, self._head_dim)
        binding.bind_input("cache", *self._device, self._dtype, shape, pointer)
        binding.bind_cpu_input("rows", rows)
        binding.bind_cpu_input("columns", kept)
        if target is None:
            binding.bind_output("relaid", *self._device)
        else:
            shape = (len(rows), self._heads, len(kept), self._head_dim)
            binding.bind_output("relaid", *self._device, self._dtype, shape, target)
        options = RunOptions()
        if self._device.kind != "cpu":
            # Copies of many sizes would each leave a piece of memory of that size behind.
            options.add_run_config_entry("memory.enable_memory_arena_shrinkage", f"gpu:{self._device.id}")
        self._relayout.run_with_iobinding(binding, options)
        return binding.get_outputs()[0]

    def bind(self, binding: "IOBinding", rows: int, *, first: int = 0, input: str = "", output: str = "") -> None:
        """As a graph's input, output or both: `rows` from the `first` on."""
        shape = (rows, self._heads, self.columns, self._head_dim)
        if (first + rows) * self.columns > self._entries:
            raise IndexError(f"rows {first} to {first + rows} of {self.columns} columns end behind the cache")
        pointer = self._address(first)
        if input:
            binding.bind_input(input, *self._device, self._dtype, shape, pointer)
        if output:
            binding.bind_output(output, *self._device, self._dtype, shape, pointer)

    def _address(self, row: int) -> int:
        return self._memory.data_ptr() + row * self._heads * self.columns * self._head_dim * self._dtype.itemsize

    def read(self, row: int) -> NDArray[Any]:
        """One row, [heads, columns, head_dim], on the host."""
        rows = self._entries // self.columns
        used = rows * self._heads * self.columns * self._head_dim
        return self._memory.numpy()[:used].reshape(rows, self._heads, self.columns, self._head_dim)[row]


class Packed:
    """Small arrays in one piece of memory, on the host and on the device, so that one copy takes them all across. On
    the CPU both are the same."""

    def __init__(self, arrays: Mapping[str, tuple[DTypeLike, tuple[int, ...]]], device: Device) -> None:
        """By name the type and the shape."""
        from onnxruntime import OrtValue

        sizes = [np.dtype(dtype).itemsize * math.prod(shape) for dtype, shape in arrays.values()]
        starts = np.cumsum([0, *(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)]).tolist()
        self._host = np.zeros(max(starts[-1], ALIGNMENT), np.uint8)
        self._device, self._value = device, OrtValue.ortvalue_from_numpy(self._host, *device)
        self._starts = dict(zip(arrays, starts, strict=False))
        self.parts: dict[str, NDArray[Any]] = {
            name: self._host[start : start + size].view(dtype).reshape(shape)
            for (name, (dtype, shape)), start, size in zip(arrays.items(), starts, sizes, strict=False)
        }
        """On the host."""

    def bound(self, name: str) -> tuple[Any, tuple[int, ...], int]:
        """Type, shape and address on the device, as IO binding takes them."""
        part = self.parts[name]
        return part.dtype, part.shape, self._value.data_ptr() + self._starts[name]

    def to_device(self) -> None:
        if self._device.kind != "cpu":
            self._value.update_inplace(self._host)

    def to_host(self) -> None:
        if self._device.kind != "cpu":
            self._host[:] = self._value.numpy()
