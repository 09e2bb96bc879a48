"""Image features and prompt token ids -> the answer's tokens, all requests sharing every step."""

from functools import partial
from threading import Lock, Thread
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from florence2.backend.metric_names import COUNTERS, GAUGES, EngineFigures
from florence2.backend.metrics import Metrics
from florence2.backend.occupancy import BEAM_SEARCH, Occupancy
from florence2.backend.tensors import (
    ARRIVAL,
    Arrival,
    Responder,
    Tensors,
    amount,
    at_least,
    copies,
    device_id,
    parameters,
    version_folder,
    views,
)
from florence2.faults import end_process
from florence2.fields import check_tokens
from florence2.generation.beam_search import Generation
from florence2.generation.caches import CacheSizes
from florence2.generation.engine import Engine
from florence2.generation.request import Request, check_tensors
from florence2.generation.runner import GraphRunner
from florence2.generation.scheduler import Scheduler
from florence2.generation.sessions import encoder_options
from florence2.generation.settings import GenerationSettings
from florence2.manifest import ModelSettings, read_json

OVERRIDES = ("num_beams", "max_new_tokens", "no_repeat_ngram_size", "length_penalty", "early_stopping")


class TritonPythonModel:
    def initialize(self, args: Any) -> None:
        folder, given = version_folder(args), parameters(args)
        self.name = f"{args['model_name']} {args['model_version']}"
        self.sizes = ModelSettings.read(folder).sizes
        positions = self.sizes.max_position_embeddings
        config = read_json(folder / "generation_config.json")
        settings = GenerationSettings.from_config(config, positions)
        check_tokens(config, self.sizes.vocab_size, "generation_config.json: ")
        self.settings = settings.within(at_least(1, given, "max_beams"), at_least(0, given, "max_new_tokens"))
        self.timeout = amount(given, "timeout_seconds")
        self.engine = self._engine(folder, given, device_id(args))
        pb_utils.Logger.log_info(f"{self.name}: {self.engine.scheduler.caches}")
        self.metrics, self.figures = Metrics(args, COUNTERS, GAUGES), EngineFigures(self.engine)
        self.metrics.report(self.figures())
        self.reporting = Lock()
        self.occupancy = Occupancy(BEAM_SEARCH)
        self.tell()
        self.thread = Thread(target=self.run, name="engine", daemon=True)
        self.thread.start()

    def _engine(self, folder: Any, given: dict[str, str], device: int) -> Engine:
        rows, length = at_least(1, given, "rows"), at_least(1, given, "cache_length")
        if rows < self.settings.num_beams:
            raise ValueError(f"rows is {rows} in config.pbtxt; the checkpoint's num_beams is {self.settings.num_beams}")
        block = at_least(1, given, "cache_block")
        caches = CacheSizes.of(self.sizes, rows, length, at_least(1, given, "requests"), block)
        limits = [at_least(1, given, name) for name in ("max_waiting", "encoder_batch")]
        provider = given["execution_provider"]
        threads, graphs = at_least(0, given, "threads"), at_least(0, given, "cuda_graphs")
        options = None
        if provider == "tensorrt":
            options = encoder_options(self.sizes, limits[1], block, given["tensorrt_cache"])
        runner = GraphRunner(folder, caches, provider, threads, graphs, options, device)
        self.features_type = runner.features_type
        return Engine(runner, Scheduler(runner.caches, *limits))

    def execute(self, requests: Any) -> list[Any]:
        """Never waits; the engine's errands answer."""
        refusals = [self.submit(request) for request in requests]
        self.tell()
        return refusals

    def submit(self, request: Any) -> Any:
        """-> None where the answer comes later, or a refusal."""
        responder = Responder(request, self.failed)
        self.occupancy.came()
        try:
            self.engine.submit(self.accept(request, responder))
        except Exception as error:
            refusal = responder.refusal(error)
            if self.metrics.are_due():
                self.report_figures()
            return refusal
        return None

    def accept(self, request: Any, responder: Responder) -> Request:
        tensors = views(request)
        check_tensors(tensors["image_features"], tensors["input_ids"], self.sizes)
        overrides = {name: _plain(value) for name, value in tensors.items() if name in OVERRIDES}
        settings = self.settings.override(**overrides)
        arrival, lasting = Arrival.of(tensors), copies(tensors)
        responder.number = arrival.number

        def respond(answer: Generation | Exception) -> None:
            if not isinstance(answer, Exception):
                self.occupancy.answered()
            responder(answer if isinstance(answer, Exception) else outputs(answer))

        return Request(
            lasting["image_features"].astype(self.features_type, copy=False),
            lasting["input_ids"],
            settings,
            respond=respond,
            deadline=arrival.deadline(request, self.timeout),
            is_cancelled=responder.is_cancelled,
            # An ensemble, which hands ARRIVAL on, passes a cancel on to steps that have not begun.
            may_be_cancelled_late=ARRIVAL not in tensors,
        )

    def failed(self, error: Exception) -> None:
        self.metrics.failed(error)
        self.occupancy.failed()

    def tell(self) -> None:
        scheduler = self.engine.scheduler
        waiting, leaving = len(scheduler.waiting), self.engine.errands.count
        self.occupancy.hold(waiting + len(scheduler.running) + leaving, waiting, scheduler.max_waiting - waiting)

    def run(self) -> None:
        """Until `finalize`, or a fault that stays."""
        try:
            self.engine.run(after_step=self.report)
        except BaseException as error:
            self.report_figures()
            end_process(self.name, error, pb_utils.Logger.log_error)

    def report(self) -> None:
        self.tell()
        if self.metrics.are_due() or self.engine.is_idle:
            self.report_figures()
        if self.engine.is_idle:
            # Of the answers that were still to be sent.
            self.engine.errands.add(self.tell)

    def report_figures(self) -> None:
        """As they are now, and one after the other."""
        with self.reporting:
            self.engine.errands.add(partial(self.metrics.try_report, self.figures()))

    def is_ready(self) -> bool:
        return self.thread.is_alive()

    def finalize(self) -> None:
        self.engine.close()
        self.thread.join()
        self.metrics.close()
        self.occupancy.close()


def _plain(value: np.ndarray) -> Any:
    # The shortest number that is this one in 32 bits: 0.6 is computed as 0.6, as where it was not sent.
    return float(str(value[0])) if value.dtype == np.float32 else value.item()


def outputs(generation: Generation) -> Tensors:
    return {
        "token_ids": generation.token_ids,
        "token_logprobs": generation.token_logprobs,
        "sequence_score": np.array([generation.sequence_score], np.float32),
        "finish_reason": np.array([generation.finish_reason], np.object_),
    }
