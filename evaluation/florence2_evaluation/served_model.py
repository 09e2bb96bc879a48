"""A running server answers questions."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from florence2_client import Florence2Client, ServerRefused
from florence2_data.record import Problem

from florence2.images import decode
from florence2_evaluation.model_io import predicted, problem, read_picture
from florence2_evaluation.models import Report, refuse, without_problems
from florence2_evaluation.prediction import Prediction
from florence2_evaluation.question import Question


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
        return without_problems(self._answers(asked), report)

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
