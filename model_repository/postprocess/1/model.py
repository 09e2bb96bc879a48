"""The answer's tokens -> text and structured answer, in pixels of the picture that was sent."""

import json

import numpy as np
from tokenizers import Tokenizer

from florence2.answers import AnswerParser, Detokenizer
from florence2.manifest import ModelSettings
from florence2.prompts import parse
from florence2.triton import respond, version_folder


class TritonPythonModel:
    def initialize(self, args):
        folder = version_folder(args)
        settings = ModelSettings.read(folder)
        self.bins = settings.sizes.location_bins
        self.detokenize = Detokenizer(Tokenizer.from_file(str(folder / "tokenizer.json")))
        self.parser = AnswerParser(settings.banned_grounding_phrases, self.bins)

    def execute(self, requests):
        return [respond(self.answer, request) for request in requests]

    def answer(self, inputs):
        prompt = parse(inputs["prompt"][0].decode(), self.bins)
        width, height = inputs["image_size"].tolist()
        decoded = self.detokenize(inputs["token_ids"].tolist())
        # The decoder start has no log-probability; a box never holds it.
        logprobs = np.concatenate([[0.0], inputs["token_logprobs"]])
        answer = {prompt.key: self.parser.parse(prompt.task, decoded, logprobs, (width, height))}
        return {
            "answer": np.array([json.dumps(answer, ensure_ascii=False)], np.object_),
            "text": np.array([decoded.text], np.object_),
        }
