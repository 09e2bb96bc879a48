"""What a prompt asks for, and what becomes of an answer's text: its location tokens, and the boxes that the serving
parser finds in it."""

import re
from typing import Any

import numpy as np

from florence2.answers import AnswerParser, Decoded, instances
from florence2.errors import InvalidRequest
from florence2.locations import Size
from florence2.prompts import parse
from florence2.tasks import TASKS, AnswerKind, Task

BINS = 1000
LOCATION = re.compile(r"<loc_(\d+)>")
RUN = re.compile(r"(?:<loc_\d+>)+")
_PARSER = AnswerParser()
_TAG = re.compile(r"\s*(<\w+>)")


def task_of(prefix: str, suffix: str) -> Task | None:
    """The task whose grammar the answer has; None for text.

    Under a prompt that is no task an answer of nothing but locations is read as that to <REGION_PROPOSAL>, one with
    others among its words as that to <OD>; two locations alone are a point and stay text. Raises InvalidRequest for a
    prompt that can't be asked.
    """
    task = parse(prefix).task
    if task or all(len(LOCATION.findall(run)) == 2 for run in RUN.findall(suffix)):
        return task
    return TASKS["<OD>" if RUN.sub("", suffix).strip() else "<REGION_PROPOSAL>"]


def name_of(prompt: str) -> str:
    """What prompts are counted and scored by: the task's token, the tag that somebody's own begins with, `<DocVQA>` of
    `<DocVQA>what is the total?`, or "text"."""
    token = next((token for token in TASKS if token in prompt), None)
    tag = _TAG.match(prompt)
    return token or (tag.group(1) if tag and not tag.group(1).startswith("<loc_") else "text")


def has_shapes(task: Task | None) -> bool:
    return task is not None and task.answer is not AnswerKind.PURE_TEXT


def parse_answer(task: Task | None, suffix: str, size: Size) -> Any:
    """The answer as it is served, boxes in pixels at the centres of their bins; all scores 1."""
    decoded = Decoded(suffix, np.zeros(len(suffix), np.int64))
    return _PARSER.parse(task, decoded, np.zeros(1, np.float32), size)


def shapes(value: Any) -> list[tuple[str, list[Any], str]]:
    """Kind ("bboxes", "quad_boxes", "polygons"), coordinates and label of each shape of a parsed answer."""
    return [row[:3] for row in instances(value)] if isinstance(value, dict) else []


def coordinates(kind: str, shape: list[Any]) -> int:
    return sum(map(len, shape)) if kind == "polygons" else len(shape)


def prompt_boxes(prefix: str, size: Size) -> dict[str, list[Any]]:
    """The prompt's regions, as an answer that can be drawn."""
    bare = "".join(RUN.findall(prefix))
    return parse_answer(TASKS["<REGION_PROPOSAL>"], bare, size)


def prompt_error(prefix: str) -> str:
    try:
        parse(prefix)
    except InvalidRequest as error:
        return str(error)
    return ""
