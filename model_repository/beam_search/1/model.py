"""Image features and prompt token ids -> the answer's tokens, all requests sharing every step."""

from threading import Thread

import numpy as np
import triton_python_backend_utils as pb_utils

from florence2.generation.caches import CacheSizes
from florence2.generation.engine import COUNTERS, GAUGES, Engine
from florence2.generation.request import Request
from florence2.generation.runner import GraphRunner, encoder_options
from florence2.generation.scheduler import Scheduler
from florence2.generation.settings import GenerationSettings
from florence2.manifest import ModelSettings, read_json
from florence2.triton import Metrics, Responder, at_least_one, deadline, inputs, parameters, version_folder

OVERRIDES = ("num_beams", "max_new_tokens", "no_repeat_ngram_size", "length_penalty", "early_stopping")


class TritonPythonModel:
    def initialize(self, args):
        folder, given = version_folder(args), parameters(args)
        self.sizes = ModelSettings.read(folder).sizes
        positions = self.sizes.max_position_embeddings
        self.settings = GenerationSettings.from_config(read_json(folder / "generation_config.json"), positions)
        self.timeout = float(given["timeout_seconds"])
        rows, length = at_least_one(given, "rows"), at_least_one(given, "cache_length")
        if rows < self.settings.num_beams:
            raise ValueError(f"rows is {rows} in config.pbtxt; the checkpoint's num_beams is {self.settings.num_beams}")
        block = at_least_one(given, "cache_block")
        caches = CacheSizes.of(self.sizes, rows, length, at_least_one(given, "requests"), block)
        limits = [at_least_one(given, name) for name in ("max_waiting", "encoder_batch")]
        provider, threads, graphs = given["execution_provider"], int(given["threads"]), int(given["cuda_graphs"])
        options = None
        if provider == "tensorrt":
            options = encoder_options(self.sizes, limits[1], block, given["tensorrt_cache"])

        def new_engine():
            runner = GraphRunner(folder, caches, provider, threads, graphs, options)
            return Engine(runner, Scheduler(runner.caches, *limits))

        self.new_engine = new_engine
        self.engine = self.new_engine()
        pb_utils.Logger.log_info(f"{args['model_name']} {args['model_version']}: {self.engine.scheduler.caches}")
        self.metrics = Metrics(args, COUNTERS, GAUGES)
        self.metrics.report(self.engine.figures())
        self.stopping = False
        self.thread = Thread(target=self.run, name="engine", daemon=True)
        self.thread.start()

    def execute(self, requests):
        """Never waits; the engine's thread answers."""
        for request in requests:
            responder = Responder(request)
            try:
                self.engine.submit(self.accept(request, responder))
            except Exception as error:
                responder(error)

    def accept(self, request, responder):
        given = inputs(request)
        overrides = {name: value.item() for name, value in given.items() if name in OVERRIDES}
        accepted = Request(
            given["image_features"],
            given["input_ids"],
            self.settings.override(**overrides),
            respond=lambda answer: responder(answer if isinstance(answer, Exception) else outputs(answer)),
            deadline=deadline(request, self.timeout),
            is_cancelled=responder.is_cancelled,
        )
        accepted.check(self.sizes)
        return accepted

    def run(self):
        while not self.stopping:
            try:
                self.engine.run(after_step=self.report)
            except BaseException as error:
                pb_utils.Logger.log_error(f"the engine has failed, another takes its place: {error!r}")
            if not self.stopping:
                self.replace_engine()
        # Whoever came while the last engine was made is told too.
        self.engine.close()
        self.engine.run()

    def replace_engine(self):
        """In this process: Triton (24.10) never starts one again that has ended, and goes on calling its model ready.
        If there can be no other engine, requests are told at once, and `is_ready` is false."""
        counters = self.engine.counters
        del self.engine.runner  # the next one needs the memory
        try:
            self.engine = self.new_engine()
        except Exception as error:
            pb_utils.Logger.log_error(f"there can be no other engine: {error!r}")
            raise
        self.engine.counters = counters

    def report(self):
        if self.metrics.are_due() or self.engine.is_idle:
            self.metrics.try_report(self.engine.figures())

    def is_ready(self):
        return self.thread.is_alive()

    def finalize(self):
        self.stopping = True
        self.engine.close()
        self.thread.join()
        self.metrics.close()


def outputs(generation):
    return {
        "token_ids": generation.token_ids,
        "token_logprobs": generation.token_logprobs,
        "sequence_score": np.array([generation.sequence_score], np.float32),
        "finish_reason": np.array([generation.finish_reason], np.object_),
    }
