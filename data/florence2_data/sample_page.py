"""A page of samples as the model sees them: boxes drawn where their tokens are decoded to."""

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from florence2.drawing import draw
from florence2.errors import InvalidRequest
from florence2.images import decode
from florence2_data.check import Shown
from florence2_data.findings import Report
from florence2_data.parsing import parse_answer, prompt_boxes, task_of
from florence2_data.record import Example

_TEMPLATE = "page.html.jinja"
_WIDEST = 480
"""Pixels of a thumbnail's longer side."""


@dataclass(frozen=True)
class Card:
    split: str
    where: str
    prefix: str
    suffix: str
    picture: str
    """Base64 of a PNG; "" where `problem` says why."""
    problem: str = ""


def write_page(output: Path, report: Report, shown: Sequence[Shown]) -> None:
    """One self-contained HTML file."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template(_TEMPLATE).render(cards=_cards(shown), report=report)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page, "utf-8")


def overlay(found: Example) -> Image.Image:
    """The thumbnail with the answer's and the prompt's regions. Raises InvalidRequest or OSError."""
    picture = decode(found.image.read_bytes())
    picture.thumbnail((_WIDEST, _WIDEST))
    # A bin is a share of the picture, at any size of it.
    answer = parse_answer(task_of(found.prefix, found.suffix), found.suffix, picture.size)
    prompt = prompt_boxes(found.prefix, picture.size)
    return draw(picture, {"answer": _without_scores(answer), "prompt": _without_scores(prompt)})


def _without_scores(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: [None] * len(column) if key.endswith("scores") else column for key, column in value.items()}


def _cards(shown: Sequence[Shown]) -> Iterator[Card]:
    for sample in shown:
        found = sample.example
        picture, problem = "", ""
        try:
            file = io.BytesIO()
            overlay(found).save(file, "PNG")
            picture = base64.b64encode(file.getvalue()).decode()
        except (InvalidRequest, OSError) as error:
            problem = str(error)
        yield Card(sample.split, found.where, found.prefix, found.suffix, picture, problem)
