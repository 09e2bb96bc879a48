"""Device memory of the caches, which the graphs read and change in place."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

if TYPE_CHECKING:
    from onnxruntime import IOBinding


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


class Cache:
    """One layer's keys or values: room for so many entries, seen as [rows, heads, columns, head_dim].

    A row's entries stand beside each other, so that any number of rows from the first on is one piece of memory. On the
    CPU the operating system gives pages when they are first written.
    """

    def __init__(self, entries: int, heads: int, head_dim: int, dtype: DTypeLike, device: str) -> None:
        self._entries, self._heads, self._head_dim = entries, heads, head_dim
        self._dtype, self._device = np.dtype(dtype), device
        self.columns = 0
        self._memory = self._allocate(self._zeros())

    def reshape(self, rows: NDArray[np.int64], columns: int) -> None:
        """To other `columns`, in fresh memory; of what was there, `rows` are kept, as the first rows. This passes
        through the host's memory, so it is for when shapes change, not for every step."""
        memory = self._zeros()
        if len(rows) and self.columns:
            kept = min(columns, self.columns)
            old, new = self._seen_as(self._memory.numpy(), self.columns), self._seen_as(memory, columns)
            for row, source in enumerate(rows):
                new[row, :, :kept] = old[source, :, :kept]
        self._memory, self.columns = self._allocate(memory), columns

    def bind(self, binding: "IOBinding", rows: int, *, first: int = 0, input: str = "", output: str = "") -> None:
        """As a graph's input, output or both: `rows` from the `first` on."""
        shape = (rows, self._heads, self.columns, self._head_dim)
        if (first + rows) * self.columns > self._entries:
            raise IndexError(f"rows {first} to {first + rows} of {self.columns} columns end behind the cache")
        pointer = self._memory.data_ptr() + first * int(np.prod(shape[1:])) * self._dtype.itemsize
        if input:
            binding.bind_input(input, self._device, 0, self._dtype, shape, pointer)
        if output:
            binding.bind_output(output, self._device, 0, self._dtype, shape, pointer)

    def read(self, row: int) -> NDArray[Any]:
        """One row, [heads, columns, head_dim], on the host."""
        return self._seen_as(self._memory.numpy(), self.columns)[row]

    def _seen_as(self, memory: NDArray[Any], columns: int) -> NDArray[Any]:
        rows = self._entries // columns
        used = rows * self._heads * columns * self._head_dim
        return memory[:used].reshape(rows, self._heads, columns, self._head_dim)

    def _zeros(self) -> NDArray[Any]:
        # Zeros, because a masked entry still meets a weight of 0, and 0 times NaN is NaN.
        return np.zeros(self._entries * self._heads * self._head_dim, self._dtype)

    def _allocate(self, memory: NDArray[Any]) -> Any:
        from onnxruntime import OrtValue

        return OrtValue.ortvalue_from_numpy(memory, self._device)
