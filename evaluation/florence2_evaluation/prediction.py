"""An answer beside what it should have been: what every metric is computed from, and a line of a predictions file."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from florence2.locations import Size


@dataclass(frozen=True)
class Prediction:
    image: str
    size: Size
    """(width, height) of the upright picture, in pixels."""
    prompt: str
    references: list[str]
    """Answers that are right, as the model would write them: `table<loc_52>…`. More than one for captions and VQA."""
    text: str
    """What the model wrote, special tokens kept."""
    answer: dict[str, Any]
    """`{task: value}` with scores, as `florence2.answers` parses it and as the server sends it."""
    regions: dict[str, Any] | None = None
    """What a text with locations says that answers a prompt of somebody's own, read as `data.parsing.task_of` says.
    None, too, where one of them is no token of the model, <loc_1000>: boxes of that text count with the score 1."""


def write_predictions(path: Path, predictions: Iterable[Prediction]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for prediction in predictions:
            file.write(json.dumps(vars(prediction), ensure_ascii=False) + "\n")


def read_predictions(path: Path) -> Iterator[Prediction]:
    """Raises ValueError that names the line."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                fields = json.loads(line)
                yield Prediction(**{**fields, "size": (int(fields["size"][0]), int(fields["size"][1]))})
            except (ValueError, TypeError, KeyError, IndexError) as error:
                raise ValueError(
                    f"{path}:{number}: not a prediction ({error}); write it with `florence2 eval`"
                ) from error
