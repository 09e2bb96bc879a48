"""Pixels -> image features, by ONNX Runtime in this process; used where Triton has no backend for the graph."""

import hashlib
from collections import OrderedDict
from concurrent.futures import Future
from threading import Lock, Thread
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from florence2.backend.metric_names import WORKER_COUNTERS
from florence2.backend.metrics import Metrics
from florence2.backend.occupancy import VISION_ENCODER, Occupancy
from florence2.backend.tensors import Arrival, Tensors, at_least, device_id, parameters, version_folder
from florence2.backend.worker import Worker
from florence2.errors import InvalidRequest, Unavailable
from florence2.faults import Faults, end_process
from florence2.generation.sessions import session


class TritonPythonModel:
    def initialize(self, args: Any) -> None:
        given = parameters(args)
        graph = version_folder(args) / "vision_encoder.onnx"
        self.name = f"{args['model_name']} {args['model_version']}"
        provider, threads = given["execution_provider"], at_least(0, given, "threads")
        self.graph = session(graph, provider, threads, device_id=device_id(args))
        self.shape = tuple(self.graph.get_inputs()[0].shape[1:])
        self.faults = Faults()
        self.kept = at_least(0, given, "recent_pictures")
        self.recent: OrderedDict[Any, Future[np.ndarray]] = OrderedDict()
        self.lock = Lock()
        metrics, occupancy = Metrics(args, WORKER_COUNTERS, {}), Occupancy(VISION_ENCODER)
        self.worker = Worker(self.answer, given, metrics, occupancy, at_least(1, given, "at_once"), self.check)

    def execute(self, requests: Any) -> list[Any]:
        return [self.worker.submit(request) for request in requests]

    def check(self, tensors: Tensors, deadline: float) -> None:
        if tensors["pixels"].shape != self.shape:
            raise InvalidRequest(f"pixels must be {self.shape}, not {tensors['pixels'].shape}")

    def answer(self, tensors: Tensors, arrival: Arrival) -> Tensors:
        # Triton looks into its response cache when a request arrives: without this, several tasks on one picture that
        # arrive while the first of them is computed would each be computed.
        pixels = tensors["pixels"]
        key = hashlib.sha256(pixels.data).digest()
        with self.lock:
            features = self.recent.get(key)
            if found := features is not None:
                self.recent.move_to_end(key)
            else:
                features = self.recent[key] = Future()
                if len(self.recent) > self.kept:
                    self.recent.popitem(last=False)
        if not found:
            self.compute(pixels, key, features)
        return {"image_features": features.result()}

    def compute(self, pixels: np.ndarray, key: bytes, features: "Future[np.ndarray]") -> None:
        try:
            found = self.graph.run(None, {"pixels": pixels[None]})[0][0]
            if not np.isfinite(found).all():
                raise RuntimeError("the vision encoder gave features that are no numbers")
            features.set_result(found)
            self.faults.worked()
        except Exception as error:
            with self.lock:
                self.recent.pop(key, None)
            features.set_exception(error)
            if self.faults.failed(error):
                # Beside this thread, which has to tell who asked.
                Thread(target=self.end, args=(error,), daemon=True).start()

    def end(self, error: Exception) -> None:
        self.worker.refuse(Unavailable("the vision encoder has failed and is started again; try again"))
        end_process(self.name, error, pb_utils.Logger.log_error)

    def finalize(self) -> None:
        self.worker.stop()
