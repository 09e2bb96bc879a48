"""The decoder graph, bound once per combination of shapes that a step has; on a GPU those that come again are captured
as CUDA graphs."""

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from florence2.generation.device_memory import Cache, Device, Packed
from florence2.generation.sessions import session

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, IOBinding

logger = logging.getLogger(__name__)

Ids = NDArray[np.int64]

STEPS = 256
"""Bindings that are kept, one per combination of shapes that a step had."""


class DecoderSteps:
    """One session, and a Step for each combination of shapes."""

    def __init__(self, graph: Path, device: Device, threads: int, cuda_graphs: int) -> None:
        """`cuda_graphs`: how many are captured at most. Raises ValueError if they are STEPS or more."""
        if cuda_graphs >= STEPS:
            raise ValueError(f"cuda_graphs is {cuda_graphs}; at most {STEPS - 1} are kept")
        self._device = device
        self._without_graphs = partial(session, graph, device.kind, threads, device_id=device.id)
        self.session, self.graphs_left = self._open(graph, threads, cuda_graphs)
        self.steps: dict[tuple, Step] = {}

    def _open(self, graph: Path, threads: int, cuda_graphs: int) -> tuple["InferenceSession", int]:
        """And how many CUDA graphs it can capture."""
        if self._device.kind == "cuda" and cuda_graphs:
            try:
                return self._without_graphs(options={"enable_cuda_graph": "1"}), cuda_graphs
            except Exception as error:
                # They are for speed alone: whoever serves should know, and go on.
                logger.warning("no CUDA graphs: %s", error)
        return self._without_graphs(), 0

    def run(
        self,
        feeds: Mapping[str, Ids],
        past: Mapping[str, Cache],
        cross: Mapping[str, Cache],
        columns: tuple[int, int],
        may_capture: bool,
    ) -> tuple[Ids, NDArray[np.float32]]:
        """Changes `past` in place, of `columns[0]` columns; reads `cross`, of `columns[1]` -> candidate ids and
        log-probabilities [R, C], until the next step."""
        step = self._step(feeds, past, cross, columns)
        if may_capture and not self._capture(step, feeds):
            step = self._step(feeds, past, cross, columns)
        return step.run(self.session, feeds)

    def _step(
        self,
        feeds: Mapping[str, Ids],
        past: Mapping[str, Cache],
        cross: Mapping[str, Cache],
        columns: tuple[int, int],
    ) -> "Step":
        """The decoder bound for these shapes."""
        key = (*columns, *(value.shape for value in feeds.values()))
        if key not in self.steps:
            if len(self.steps) == STEPS:
                # The oldest without a graph; graphs stay, as their number is bounded and their making is slow.
                self.steps.pop(next(key for key, step in self.steps.items() if step.graph < 0))
            self.steps[key] = self._bind(feeds, past, cross)
        return self.steps[key]

    def _bind(self, feeds: Mapping[str, Ids], past: Mapping[str, Cache], cross: Mapping[str, Cache]) -> "Step":
        binding = self.session.io_binding()
        rows, slots = len(feeds["input_ids"]), len(feeds["beam_rows"])
        for name, cache in past.items():
            cache.bind(binding, rows, input=name, output=name.replace("past_key_values", "present"))
        for name, cache in cross.items():
            cache.bind(binding, slots, input=name)
        inputs = Packed({name: (value.dtype, value.shape) for name, value in feeds.items()}, self._device)
        shape = (rows, self.session.get_outputs()[0].shape[1])
        outputs = Packed({"candidate_ids": (np.int64, shape), "candidate_logprobs": (np.float32, shape)}, self._device)
        for name in inputs.parts:
            binding.bind_input(name, *self._device, *inputs.bound(name))
        for name in outputs.parts:
            binding.bind_output(name, *self._device, *outputs.bound(name))
        return Step(binding, inputs, outputs)

    def _capture(self, step: "Step", feeds: Mapping[str, Ids]) -> bool:
        """A CUDA graph of shapes that come again and again. False if that failed, and there are no graphs, and no bound
        steps, from now on.

        ONNX Runtime takes the step twice while it captures one, and the entries that a step moves can only be moved
        once. So it is captured with nothing to move but an entry to its own place; what else that writes, the step
        itself writes again, but for rows that are no beam's any more."""
        step.times += 1
        if not (self.graphs_left and step.graph < 0 and step.times > 2):
            return True
        step.graph = self.graphs_left
        self.graphs_left -= 1
        still = np.zeros_like(feeds["moved_from"])
        try:
            step.run(self.session, {**feeds, "moved_from": still, "moved_to": still})
        except Exception as error:
            # They are for speed alone: whoever serves should know, and go on. The session's stream may be stuck.
            logger.warning("no more CUDA graphs: %s", error)
            self.graphs_left = 0
            self.steps.clear()
            self.session = self._without_graphs()
            return False
        return True


class Step:
    """The decoder bound for one combination of shapes: inputs that are written in place, caches, candidates."""

    def __init__(self, binding: "IOBinding", inputs: Packed, outputs: Packed) -> None:
        self.times = 0
        self.graph = -1
        """The number of its CUDA graph; ONNX Runtime takes -1 for none."""
        self._binding, self._inputs, self._outputs = binding, inputs, outputs

    def run(self, decoder: "InferenceSession", feeds: Mapping[str, Ids]) -> tuple[Ids, NDArray[np.float32]]:
        from onnxruntime import RunOptions

        for name, value in feeds.items():
            self._inputs.parts[name][...] = value
        self._inputs.to_device()
        options = RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(self.graph))
        decoder.run_with_iobinding(self._binding, options)
        self._outputs.to_host()
        return self._outputs.parts["candidate_ids"], self._outputs.parts["candidate_logprobs"]
