"""An export answers questions, in this process and without a server."""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from florence2.generation.beam_search import Generation
from florence2.generation.caches import CacheSizes
from florence2.generation.engine import Engine
from florence2.generation.request import Request
from florence2.generation.runner import GraphRunner
from florence2.generation.scheduler import Scheduler
from florence2.generation.sessions import session
from florence2.generation.settings import GenerationSettings
from florence2.manifest import Manifest, read_json
from florence2_evaluation.model_io import Asked, Wording
from florence2_evaluation.models import Report, refuse, without_problems
from florence2_evaluation.prediction import Prediction
from florence2_evaluation.question import Question


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
        for one in without_problems(map(self.wording.ask, asked), report):
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


@dataclass
class _Waiting:
    asked: Asked
    answer: Generation | Exception | None = None

    def take(self, answer: Generation | Exception) -> None:
        self.answer = answer
