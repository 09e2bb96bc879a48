"""Pixels -> image features, by ONNX Runtime in this process; used where Triton has no backend for the graph."""

from florence2.generation.runner import session
from florence2.triton import parameters, respond, tensor, version_folder


class TritonPythonModel:
    def initialize(self, args):
        threads = int(parameters(args)["threads"])
        self.graph = session(version_folder(args) / "vision_encoder.onnx", threads=threads)

    def execute(self, requests):
        return [respond(self._answer, request) for request in requests]

    def _answer(self, request):
        (features,) = self.graph.run(None, {"pixels": tensor(request, "pixels")})
        return {"image_features": features}
