"""What is asked of a model: a picture and a prompt, with every answer that is right."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from florence2_data.record import Example


@dataclass(frozen=True)
class Question:
    image: Path
    prompt: str
    references: list[str]


def questions(examples: Iterable[Example], limit: int | None = None) -> Iterator[Question]:
    """Neighbours with the same picture and prompt are one question with several references, unless they hold
    locations: boxes have one right answer. At most `limit` questions."""
    current: Question | None = None
    given = 0
    for example in examples:
        if current and _another_reference(current, example):
            current.references.append(example.suffix)
            continue
        if current:
            yield current
            given += 1
        if given == limit:
            return
        current = Question(example.image, example.prefix, [example.suffix])
    if current:
        yield current


def _another_reference(question: Question, example: Example) -> bool:
    same = (question.image, question.prompt) == (example.image, example.prefix)
    return same and "<loc_" not in example.suffix and "<loc_" not in question.references[-1]
