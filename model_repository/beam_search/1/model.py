"""Image features and prompt token ids -> the answer's tokens."""

import numpy as np

from florence2.generation.generate import generate
from florence2.generation.runner import GraphRunner
from florence2.generation.settings import GenerationSettings
from florence2.manifest import Manifest, read_json
from florence2.triton import parameters, respond, scalar, tensor, version_folder

OVERRIDES = ("num_beams", "max_new_tokens", "no_repeat_ngram_size", "length_penalty", "early_stopping")


class TritonPythonModel:
    def initialize(self, args):
        folder = version_folder(args)
        positions = Manifest.read(folder).sizes.max_position_embeddings
        self.settings = GenerationSettings.from_config(read_json(folder / "generation_config.json"), positions)
        self.runner = GraphRunner(folder, threads=int(parameters(args)["threads"]))

    def execute(self, requests):
        return [respond(self._answer, request) for request in requests]

    def _answer(self, request):
        settings = self.settings.override(**{name: scalar(request, name) for name in OVERRIDES})
        features, prompt_ids = tensor(request, "image_features")[0], tensor(request, "input_ids")[0]
        generation = generate(self.runner, features, prompt_ids, settings)
        return {
            "token_ids": generation.token_ids[None],
            "token_logprobs": generation.token_logprobs[None],
            "sequence_score": np.array([[generation.sequence_score]], np.float32),
            "finish_reason": np.array([[generation.finish_reason]], np.object_),
        }
