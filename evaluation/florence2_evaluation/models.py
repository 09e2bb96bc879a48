"""What answers questions: a checkpoint in PyTorch, its export, or a server. All three give the same predictions."""

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import numpy as np
import torch
from florence2_client import Florence2Client, ServerRefused
from florence2_datasets.record import Problem
from florence2_export.checkpoint import Checkpoint
from florence2_export.export import sizes_of
from florence2_training.features import normalised
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers.modeling_outputs import BaseModelOutput

from florence2.generation.beam_search import Generation
from florence2.generation.caches import CacheSizes
from florence2.generation.engine import Engine
from florence2.generation.request import Request
from florence2.generation.runner import GraphRunner
from florence2.generation.scheduler import Scheduler
from florence2.generation.sessions import session
from florence2.generation.settings import GenerationSettings
from florence2.images import decode
from florence2.manifest import Manifest, read_json
from florence2_evaluation.model_io import Asked, Wording, predicted, problem, read_picture
from florence2_evaluation.prediction import Prediction
from florence2_evaluation.question import Question

Report = Callable[[Problem], None]


def refuse(problem: Problem) -> None:
    raise ValueError(str(problem))


class Model(Protocol):
    def predict(self, asked: Iterable[Question], report: Report = refuse) -> Iterator[Prediction]:
        """In the order of the questions. One that can't be asked, for its picture or its prompt, has no prediction and
        goes to `report`. Raises RuntimeError for a model that fails."""


class TorchModel:
    """transformers' `generate` on a loaded checkpoint, whose model may be wrapped by peft, in half precision, or being
    trained: it is put into evaluation while it answers. `num_beams` and `max_new_tokens` left out are the checkpoint's.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        batch_size: int = 8,
        num_beams: int | None = None,
        max_new_tokens: int | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        self.checkpoint, self.batch_size, self.device = checkpoint, batch_size, torch.device(device)
        self.model = cast(Any, checkpoint.model).to(self.device)
        sizes = sizes_of(checkpoint)
        self.settings = GenerationSettings.from_config(checkpoint.generation, sizes.max_position_embeddings)
        self.settings = self.settings.override(num_beams=num_beams, max_new_tokens=max_new_tokens)
        self.wording = Wording(
            checkpoint.tokenizer, checkpoint.preprocessor, sizes, checkpoint.banned_grounding_phrases
        )

    def predict(self, asked: Iterable[Question], report: Report = refuse) -> Iterator[Prediction]:
        worded = _without_problems(map(self.wording.ask, asked), report)
        while batch := list(islice(worded, self.batch_size)):
            with _evaluating(self.model), torch.no_grad():
                answers = self._answer(batch)
            for one, (token_ids, logprobs) in zip(batch, answers, strict=True):
                yield self.wording.prediction(one, token_ids, logprobs)

    def _answer(self, batch: list[Asked]) -> list[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        hidden, mask = self._encode(batch)
        sequences = self.model.generate(
            encoder_outputs=BaseModelOutput(hidden), attention_mask=mask, generation_config=self._generation_config()
        )
        answers = []
        for row, sequence in enumerate(sequences):
            own = slice(row, row + 1)
            sequence = sequence[: _length(sequence, self.settings.eos_token_id)]
            answers.append((sequence.cpu().numpy(), self._logprobs(sequence, hidden[own], mask[own])))
        return answers

    def _encode(self, batch: list[Asked]) -> tuple[torch.Tensor, torch.Tensor]:
        """-> the encoder's last hidden state [B, N + S, D] and its mask [B, N + S], 0 behind shorter prompts."""
        lengths = torch.tensor([len(asked.input_ids) for asked in batch])
        present = torch.arange(int(lengths.max())) < lengths[:, None]
        input_ids = torch.zeros(present.shape, dtype=torch.int64)
        input_ids[present] = torch.from_numpy(np.concatenate([asked.input_ids for asked in batch]))
        features = self._features(np.stack([asked.pixels for asked in batch]))
        embedded = self.model.get_input_embeddings()(input_ids.to(self.device))
        mask = torch.cat([torch.ones(features.shape[:2], dtype=torch.int64), present.to(torch.int64)], dim=1)
        mask = mask.to(self.device)
        inputs = torch.cat([features.to(embedded.dtype), embedded], dim=1)
        hidden = self.model.get_encoder()(inputs_embeds=inputs, attention_mask=mask).last_hidden_state
        return hidden, mask

    def _features(self, pixels: NDArray[np.uint8]) -> torch.Tensor:
        """u8 [B, height, width, 3] -> [B, N, D]."""
        values = normalised(torch.from_numpy(pixels).to(self.device), self.checkpoint.preprocessor)
        return self.model.get_image_features(values.to(self.model.dtype)).pooler_output

    def _generation_config(self) -> Any:
        config = copy.deepcopy(self.model.generation_config)
        config.update(
            num_beams=self.settings.num_beams,
            max_length=self.settings.max_length,
            max_new_tokens=None,
            do_sample=False,
            return_dict_in_generate=False,
        )
        if self.settings.num_beams == 1:
            # They mean nothing then, and generate would warn of it.
            config.update(early_stopping=False, length_penalty=1.0)
        return config

    def _logprobs(self, sequence: torch.Tensor, hidden: torch.Tensor, mask: torch.Tensor) -> NDArray[np.float32]:
        """[L - 1], as `florence2.generation` gives them but of forced tokens, which are no locations.

        The whole answer is read once more: what `generate` can keep, all scores of all beams at all steps, takes
        gigabytes for a page of text."""
        logits = self.model(
            encoder_outputs=BaseModelOutput(hidden), attention_mask=mask, decoder_input_ids=sequence[None, :-1]
        ).logits[0]
        return logits.float().log_softmax(dim=-1).gather(1, sequence[1:, None])[:, 0].cpu().numpy()


class OnnxModel:
    """An export folder, decoded as it is served but in this process, up to `in_flight` questions at once."""

    def __init__(
        self,
        export: Path,
        num_beams: int | None = None,
        max_new_tokens: int | None = None,
        in_flight: int = 8,
    ) -> None:
        manifest = Manifest.read(export)
        sizes, self.in_flight = manifest.sizes, in_flight
        settings = GenerationSettings.from_config(
            read_json(export / "generation_config.json"), sizes.max_position_embeddings
        )
        self.settings = settings.override(num_beams=num_beams, max_new_tokens=max_new_tokens)
        self.wording = Wording(
            Tokenizer.from_file(str(export / "tokenizer.json")),
            read_json(export / "preprocessor_config.json"),
            sizes,
            manifest.banned_grounding_phrases,
        )
        caches = CacheSizes.of(sizes, in_flight * self.settings.num_beams, self.settings.max_length)
        self._vision = session(export / "vision_encoder.onnx")
        self._engine = Engine(GraphRunner(export, caches), Scheduler(caches, in_flight, in_flight))

    def predict(self, asked: Iterable[Question], report: Report = refuse) -> Iterator[Prediction]:
        waiting: deque[_Waiting] = deque()
        for one in _without_problems(map(self.wording.ask, asked), report):
            waiting.append(self._submit(one))
            # One long answer holds those behind it back; their pictures take memory.
            while sum(each.answer is None for each in waiting) >= self.in_flight or (
                len(waiting) >= 4 * self.in_flight and waiting[0].answer is None
            ):
                self._engine.step()
            while waiting and waiting[0].answer is not None:
                yield self._prediction(waiting.popleft())
        self._engine.finish()
        for each in waiting:
            yield self._prediction(each)

    def _submit(self, asked: Asked) -> "_Waiting":
        waiting = _Waiting(asked)
        features = self._vision.run(None, {"pixels": asked.pixels[None]})[0][0]
        self._engine.submit(Request(features, asked.input_ids, self.settings, waiting.take))
        return waiting

    def _prediction(self, waiting: "_Waiting") -> Prediction:
        answer, question = waiting.answer, waiting.asked.question
        if not isinstance(answer, Generation):
            raise RuntimeError(f"{question.image}, {question.prompt}: {answer}")
        return self.wording.prediction(waiting.asked, answer.token_ids, answer.token_logprobs)


class ServedModel:
    """A running server, asked over gRPC by `in_flight` threads."""

    def __init__(
        self,
        url: str,
        model: str = "florence2",
        num_beams: int | None = None,
        max_new_tokens: int | None = None,
        in_flight: int = 8,
        timeout: float = 300,
    ) -> None:
        self.in_flight = in_flight
        self._overrides: dict[str, Any] = {"num_beams": num_beams, "max_new_tokens": max_new_tokens}
        self._connect = lambda: Florence2Client(url, model=model, timeout=timeout)

    def predict(self, asked: Iterable[Question], report: Report = refuse) -> Iterator[Prediction]:
        return _without_problems(self._answers(asked), report)

    def _answers(self, asked: Iterable[Question]) -> Iterator[Prediction | Problem]:
        waiting: deque[Future[Prediction | Problem]] = deque()
        with self._connect() as client, ThreadPoolExecutor(self.in_flight) as threads:
            try:
                for question in asked:
                    waiting.append(threads.submit(self._ask, client, question))
                    while len(waiting) >= 2 * self.in_flight or (waiting and waiting[0].done()):
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                threads.shutdown(cancel_futures=True)

    def _ask(self, client: Florence2Client, question: Question) -> Prediction | Problem:
        try:
            data = read_picture(question.image)
            size = decode(data).size
            answer = client.run(question.prompt, data, **self._overrides)
        except ValueError as error:
            return problem(question, error)
        except ServerRefused as error:
            if error.status == "INVALID_ARGUMENT":
                return problem(question, error)
            raise ServerRefused(f"{question.image}, {question.prompt}: {error}", error.status) from None
        return predicted(question, size, answer.text, answer.answer, answer.token_ids, answer.token_logprobs)


@dataclass
class _Waiting:
    asked: Asked
    answer: Generation | Exception | None = None

    def take(self, answer: Generation | Exception) -> None:
        self.answer = answer


_T = TypeVar("_T")


def _without_problems(found: Iterable[_T | Problem], report: Report) -> Iterator[_T]:
    for one in found:
        if isinstance(one, Problem):
            report(one)
        else:
            yield one


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Parts that were not training before, such as a frozen vision tower, are not put into training after it."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _length(sequence: torch.Tensor, eos_token_id: int) -> int:
    """Up to the end token; behind it a batch is padded. The decoder start may be the same token."""
    ends = (sequence[1:] == eos_token_id).nonzero()
    return int(ends[0]) + 2 if len(ends) else len(sequence)
