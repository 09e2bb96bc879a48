"""A step's way to the device and back, with numpy in the place of ONNX Runtime's memory."""

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from florence2.generation.decoder_steps import Step
from florence2.generation.device_memory import Device, Packed


class OrtValue:
    """Memory of a device: what is copied there and back is counted."""

    copies: list[str]

    def __init__(self, memory: np.ndarray, device: tuple[str, int]) -> None:
        self.memory, self.device = memory.copy(), device

    @classmethod
    def ortvalue_from_numpy(cls, array: np.ndarray, kind: str = "cpu", number: int = 0) -> "OrtValue":
        return cls(array, (kind, number))

    def data_ptr(self) -> int:
        return self.memory.ctypes.data

    def update_inplace(self, array: np.ndarray) -> None:
        self.copies.append("to")
        self.memory[...] = array

    def numpy(self) -> np.ndarray:
        self.copies.append("from")
        return self.memory.copy()


class RunOptions:
    def add_run_config_entry(self, key: str, value: str) -> None:
        assert (key, value) == ("gpu_graph_id", "-1")


def test_a_step_on_a_gpu_is_one_copy_there_and_one_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", SimpleNamespace(OrtValue=OrtValue, RunOptions=RunOptions))
    monkeypatch.setattr(OrtValue, "copies", [], raising=False)
    device = Device("cuda", 3)
    feeds = {
        "input_ids": np.arange(4),
        "moved_from": np.zeros((0, 2), np.int64),
        "beam_rows": np.arange(6).reshape(2, 3),
    }
    inputs = Packed({name: (value.dtype, value.shape) for name, value in feeds.items()}, device)
    outputs = Packed({"candidate_ids": (np.int64, (4, 2)), "candidate_logprobs": (np.float32, (4, 2))}, device)
    assert inputs._value.device == outputs._value.device == ("cuda", 3)  # type: ignore[attr-defined]

    def part(packed: Packed, name: str) -> np.ndarray:
        """Of the device's memory, where it is bound."""
        dtype, shape, address = packed.bound(name)
        value: Any = packed._value
        start = address - value.data_ptr()
        return value.memory[start : start + np.prod(shape, dtype=int) * dtype.itemsize].view(dtype).reshape(shape)

    def run(binding: str, options: RunOptions) -> None:
        """Twice the ids; from the device's memory alone."""
        assert binding == "bound"
        for name, value in feeds.items():
            np.testing.assert_array_equal(part(inputs, name), value)
        part(outputs, "candidate_ids")[...] = 2 * part(inputs, "input_ids")[:, None]
        part(outputs, "candidate_logprobs")[...] = -0.5

    step = Step("bound", inputs, outputs)  # type: ignore[arg-type]
    for added in (0, 10):
        feeds["input_ids"] = np.arange(4) + added
        ids, logprobs = step.run(SimpleNamespace(run_with_iobinding=run), feeds)  # type: ignore[arg-type]
        assert ids.tolist() == [[2 * (row + added)] * 2 for row in range(4)]
        assert (logprobs == -0.5).all()
    assert OrtValue.copies == ["to", "from"] * 2
