"""Image bytes and prompt -> pixels at the model's size and prompt token ids."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Condition
from typing import Any

import numpy as np

from florence2.backend.admission import Admission
from florence2.backend.metric_names import WORKER_COUNTERS
from florence2.backend.metrics import Metrics
from florence2.backend.occupancy import PREPROCESS, Occupancy
from florence2.backend.tensors import ARRIVAL, Arrival, Tensors, amount, at_least, parameters, version_folder
from florence2.backend.worker import Worker
from florence2.generation.sessions import available_cores
from florence2.images import Limits, Resizer, check_bytes, decode, quiet_pil
from florence2.manifest import ModelSettings, read_json
from florence2.prompts import PromptEncoder, read_prompt
from florence2.tokenizer_file import read_tokenizer


class TritonPythonModel:
    def initialize(self, args: Any) -> None:
        quiet_pil()
        folder, given = version_folder(args), parameters(args)
        self.limits = Limits(amount(given, "max_megapixels"), amount(given, "max_megabytes"))
        self.resizer = Resizer(read_json(folder / "preprocessor_config.json"))
        self.sizes = ModelSettings.read(folder).sizes
        self.prompts = PromptEncoder(read_tokenizer(folder / "tokenizer.json"), self.sizes)
        self.budget = Budget(int(min(amount(given, "megapixels_at_once"), 1e9) * 1e6))
        self.numbers, self.last_error = itertools.count(1), 0
        self.is_cached = given["response_cache"] == "true"
        self.occupancy = occupancy = Occupancy(PREPROCESS)
        self.admission = Admission(occupancy)
        at_once = at_least(0, given, "at_once") or available_cores()
        self.worker = Worker(self.answer, given, Metrics(args, WORKER_COUNTERS, {}), occupancy, at_once, self.check)

    def execute(self, requests: Any) -> list[Any]:
        return [self.worker.submit(request) for request in requests]

    def check(self, tensors: Tensors, deadline: float) -> None:
        check_bytes(tensors["image"][0], self.limits)
        read_prompt(tensors["prompt"][0], self.sizes.max_position_embeddings)
        self.admission.check(deadline)

    def answer(self, tensors: Tensors, arrival: Arrival) -> Tensors:
        prompt = read_prompt(tensors["prompt"][0], self.sizes.max_position_embeddings)
        input_ids = self.prompts.encode(prompt)
        image = decode(tensors["image"][0], self.limits, self.budget.take)
        return {
            "pixels": self.resizer(image),
            "input_ids": input_ids,
            "image_size": np.array(image.size),
            ARRIVAL: self.handed_on(arrival),
        }

    def handed_on(self, arrival: Arrival) -> np.ndarray:
        if not self.is_cached:
            return np.array([arrival.nanoseconds, next(self.numbers)])
        failed = (row.failed for row in self.occupancy.read() if row.model != PREPROCESS)
        # Never an earlier one again, though the process that told it has ended.
        self.last_error = max(self.last_error, *failed, 0)
        return np.array([0, self.last_error])

    def finalize(self) -> None:
        self.worker.stop()


class Budget:
    """Pixels that are decoded at the same time."""

    def __init__(self, most: int) -> None:
        self._most, self._used, self._changed = most, 0, Condition()

    @contextmanager
    def take(self, pixels: int) -> Iterator[None]:
        """Waits until there is room. A picture larger than all of it is decoded alone."""
        with self._changed:
            self._changed.wait_for(lambda: not self._used or self._used + pixels <= self._most)
            self._used += pixels
        try:
            yield
        finally:
            with self._changed:
                self._used -= pixels
                self._changed.notify_all()
