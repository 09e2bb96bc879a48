"""The answer's tokens -> text and structured answer, in pixels of the picture that was sent.

It hands on what beam_search gave: the ensemble's outputs all come from here. Triton leaves out a step none of whose
outputs a request asks for, even where a later step needs them (core, `EnsembleContext::EnsembleContext`;
triton-inference-server/server#7482), and a response cache keeps what the first of equal requests named.
"""

import json
from typing import Any

import numpy as np

from florence2.answers import AnswerParser, Detokenizer
from florence2.backend.tensors import Tensors, copies, request_id, response, version_folder, views
from florence2.errors import InvalidRequest
from florence2.manifest import ModelSettings
from florence2.prompts import parse, read_prompt
from florence2.tokenizer_file import read_tokenizer

HANDED_ON = ("token_ids", "token_logprobs", "sequence_score", "finish_reason")
FINISH_REASONS = (b"stop", b"length")
LARGEST_SIDE = 2**31
"""Pixels; far from where a float's whole numbers end."""


class TritonPythonModel:
    def initialize(self, args: Any) -> None:
        folder = version_folder(args)
        settings = ModelSettings.read(folder)
        self.sizes = settings.sizes
        self.detokenize = Detokenizer(read_tokenizer(folder / "tokenizer.json"))
        self.parser = AnswerParser(settings.banned_grounding_phrases, self.sizes.location_bins)

    def execute(self, requests: Any) -> list[Any]:
        return [self.respond(request) for request in requests]

    def respond(self, request: Any) -> Any:
        answer: Tensors | Exception
        try:
            answer = self.answer(views(request))
        except Exception as error:
            answer = error
        return response(answer, f"request {request_id(request)!r}")

    def answer(self, tensors: Tensors) -> Tensors:
        self.check(tensors)
        prompt = parse(read_prompt(tensors["prompt"][0], self.sizes.max_position_embeddings), self.sizes.location_bins)
        decoded = self.detokenize(tensors["token_ids"].tolist())
        # The decoder start has no log-probability; a box never holds it.
        logprobs = np.concatenate([[0.0], tensors["token_logprobs"]])
        width, height = tensors["image_size"].tolist()
        try:
            answer = {prompt.key: self.parser.parse(prompt.task, decoded, logprobs, (width, height))}
        except OverflowError:
            # Letters can spell <loc_999...> with hundreds of digits.
            raise InvalidRequest("token_ids spell a location that no number can hold") from None
        return {
            "answer": np.array([json.dumps(answer, ensure_ascii=False)], np.object_),
            "text": np.array([decoded.text], np.object_),
            **copies({name: tensors[name] for name in HANDED_ON}),
        }

    def check(self, tensors: Tensors) -> None:
        """Raises InvalidRequest for tensors that no preprocess and beam_search of this model make."""
        most, count = self.sizes.max_position_embeddings, len(tensors["token_ids"])
        if not 1 <= count <= most:
            raise InvalidRequest(f"token_ids must be 1 to {most} tokens, not {count}")
        if not ((tensors["token_ids"] >= 0) & (tensors["token_ids"] < self.sizes.vocab_size)).all():
            raise InvalidRequest(f"token_ids must be from 0 to {self.sizes.vocab_size - 1}")
        if len(tensors["token_logprobs"]) != count - 1:
            raise InvalidRequest(f"token_logprobs must be {count - 1} beside {count} token_ids")
        if not (tensors["token_logprobs"] <= 0).all():
            raise InvalidRequest("token_logprobs must be 0 or less")
        if np.isnan(tensors["sequence_score"]).any():
            raise InvalidRequest("sequence_score must be a number")
        if tensors["finish_reason"][0] not in FINISH_REASONS:
            raise InvalidRequest("finish_reason must be stop or length")
        if not ((tensors["image_size"] > 0) & (tensors["image_size"] < LARGEST_SIDE)).all():
            raise InvalidRequest(f"image_size must be a picture's, not {tensors['image_size'].tolist()}")
