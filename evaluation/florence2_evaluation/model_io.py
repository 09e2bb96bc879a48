"""Questions -> what a model reads; what it writes -> predictions. As the served preprocess and postprocess do it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from florence2_data.parsing import BINS, LOCATION, task_of
from florence2_data.record import Problem
from numpy.typing import ArrayLike, NDArray
from tokenizers import Tokenizer

from florence2.answers import AnswerParser, Decoded, Detokenizer
from florence2.images import Resizer, decode
from florence2.locations import Size
from florence2.manifest import Sizes
from florence2.prompts import PromptEncoder, parse
from florence2_evaluation.prediction import Prediction
from florence2_evaluation.question import Question


@dataclass(frozen=True)
class Asked:
    question: Question
    size: Size
    pixels: NDArray[np.uint8]
    """[height, width, 3]"""
    input_ids: NDArray[np.int64]
    """[S]"""


class Wording:
    """One checkpoint's: its tokenizer, its image processor, its tasks."""

    def __init__(
        self, tokenizer: Tokenizer, preprocessor: Mapping[str, Any], sizes: Sizes, banned_phrases: Sequence[str]
    ) -> None:
        self.bins = sizes.location_bins
        self._resize = Resizer(preprocessor)
        self._encoder = PromptEncoder(tokenizer, sizes)
        self._detokenize = Detokenizer(tokenizer)
        self._parser = AnswerParser(banned_phrases, self.bins)

    def ask(self, question: Question) -> Asked | Problem:
        try:
            image = decode(read_picture(question.image))
            input_ids = self._encoder.encode(question.prompt)
        except ValueError as error:
            return problem(question, error)
        return Asked(question, image.size, self._resize(image), input_ids)

    def prediction(self, asked: Asked, token_ids: NDArray[np.int64], token_logprobs: ArrayLike) -> Prediction:
        """`token_ids` [L], decoder start included; `token_logprobs` [L - 1]."""
        prompt = parse(asked.question.prompt, self.bins)
        decoded = self._detokenize(token_ids.tolist())
        # The decoder start has no log-probability; a box never holds it.
        logprobs = np.concatenate([[0.0], np.asarray(token_logprobs, np.float64)])
        answer = {prompt.key: self._parser.parse(prompt.task, decoded, logprobs, asked.size)}
        return predicted(asked.question, asked.size, decoded.text, answer, token_ids, token_logprobs)


def predicted(
    question: Question,
    size: Size,
    text: str,
    answer: dict[str, Any],
    token_ids: NDArray[np.int64],
    token_logprobs: ArrayLike,
) -> Prediction:
    """What every model says of its answer, in the same words."""
    (value,) = answer.values()
    regions = None
    if isinstance(value, str) and parse(question.prompt).task is None:
        task, located = task_of(question.prompt, value), _located(text, token_ids)
        if task and located:
            logprobs = np.concatenate([[0.0], np.asarray(token_logprobs, np.float64)])
            regions = AnswerParser().parse(task, located, logprobs, size)
    return Prediction(str(question.image), size, question.prompt, question.references, text, answer, regions)


def problem(question: Question, error: Exception) -> Problem:
    return Problem(f"{question.image}, {question.prompt}", str(error))


def read_picture(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"the picture can't be read: {error.strerror}") from None


def _located(text: str, token_ids: NDArray[np.int64]) -> Decoded | None:
    """The text with the token of each of its locations, found without a tokenizer: a server sends none. None where
    there is no location, or one that was written letter by letter, <loc_1000>.

    Ids of location tokens follow one another, above the words: Florence2Processor adds them in order.
    """
    found = list(LOCATION.finditer(text))
    if not found or any(len(match.group(1)) > len(str(BINS - 1)) for match in found):
        return None
    numbers = np.array([int(match.group(1)) for match in found])
    tokens = np.zeros(len(text), np.int64)
    for zero in sorted(set(token_ids - numbers[0]), reverse=True):
        places = np.flatnonzero((token_ids >= zero) & (token_ids <= zero + numbers.max()))
        if np.array_equal(token_ids[places] - zero, numbers):
            for match, place in zip(found, places, strict=True):
                tokens[match.start() : match.end()] = place
            return Decoded(text, tokens)
    return None
