"""Pixels -> image features, by ONNX Runtime in this process; used where Triton has no backend for the graph."""

import hashlib
from collections import OrderedDict
from concurrent.futures import Future
from threading import Lock

from florence2.generation.engine import TIMES
from florence2.generation.sessions import session
from florence2.triton import Metrics, Worker, at_least_one, parameters, version_folder


class TritonPythonModel:
    def initialize(self, args):
        given = parameters(args)
        self.graph = session(
            version_folder(args) / "vision_encoder.onnx", given["execution_provider"], int(given["threads"])
        )
        self.kept = int(given["recent_pictures"])
        self.recent, self.lock = OrderedDict(), Lock()
        self.worker = Worker(self.answer, given, at_least_one(given, "at_once"), Metrics(args, TIMES, {}))

    def execute(self, requests):
        for request in requests:
            self.worker.submit(request)

    def answer(self, inputs):
        # Triton looks into its response cache when a request arrives: without this, several tasks on one picture that
        # arrive while the first of them is computed would each be computed.
        pixels = inputs["pixels"]
        key = pixels.shape, hashlib.sha256(pixels).digest()
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

    def compute(self, pixels, key, features):
        try:
            features.set_result(self.graph.run(None, {"pixels": pixels[None]})[0][0])
        except Exception as error:
            with self.lock:
                self.recent.pop(key, None)
            features.set_exception(error)

    def finalize(self):
        self.worker.stop()
