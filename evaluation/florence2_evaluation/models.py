"""What answers questions: a checkpoint in PyTorch, its export, or a server. All three give the same predictions."""

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar

from florence2_data.record import Problem

from florence2_evaluation.prediction import Prediction
from florence2_evaluation.question import Question

Report = Callable[[Problem], None]


def refuse(problem: Problem) -> None:
    raise ValueError(str(problem))


class Model(Protocol):
    def predict(self, asked: Iterable[Question], report: Report = refuse) -> Iterator[Prediction]:
        """In the order of the questions. One that can't be asked, for its picture or its prompt, has no prediction and
        goes to `report`. Raises RuntimeError for a model that fails."""


_T = TypeVar("_T")


def without_problems(found: Iterable[_T | Problem], report: Report) -> Iterator[_T]:
    for one in found:
        if isinstance(one, Problem):
            report(one)
        else:
            yield one
