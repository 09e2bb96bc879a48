"""Texts as a data set holds them -> what a metric compares: texts, or boxes, quads and polygons in pixels."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from florence2.answers import AnswerParser, Decoded, instances
from florence2.locations import Size
from florence2.prompts import parse
from florence2.tasks import TASKS, Task

LABELLED_BOX = re.compile(r"[^<>]" + r"<loc_\d+>" * 4)
DETECTION = TASKS["<OD>"]
_PARSER = AnswerParser()
_TAG = re.compile(r"\s*(<\w+>)")


@dataclass(frozen=True)
class Instance:
    label: str
    shape: Any
    """Coordinates in pixels: x1, y1, x2, y2 of a box, x, y, ... of a quad; a list of outlines of a polygon."""
    score: float


def read(text: str, task: Task | None, size: Size) -> Any:
    """The value of an answer that says `text`; its scores are 1."""
    decoded = Decoded(text, np.arange(len(text)))
    return _PARSER.parse(task, decoded, np.zeros(len(text)), size)


def found(value: Any) -> list[Instance]:
    """What the value holds that is no text, best score first; equals stay in the order in which they were written."""
    if isinstance(value, str):
        return []
    held = [Instance(label, shape, score) for _, shape, label, score in instances(value)]
    return sorted(held, key=lambda instance: -instance.score)


def task_of(prompt: str) -> Task | None:
    return parse(prompt).task


def tag_of(prompt: str) -> str | None:
    """What a prompt of somebody's own begins with: `<DocVQA>` of `<DocVQA>what is the total?`."""
    match = _TAG.match(prompt)
    return match.group(1) if match and not match.group(1).startswith("<loc_") else None


def has_boxes(references: Sequence[str]) -> bool:
    return any(LABELLED_BOX.search(reference) for reference in references)
