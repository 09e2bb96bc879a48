"""The answers to one task, beside what they should have been."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Any

from florence2.tasks import AnswerKind
from florence2_training.evaluation import captions
from florence2_training.evaluation.detection import Detection
from florence2_training.evaluation.prediction import Prediction
from florence2_training.evaluation.reference import DETECTION, Instance, found, has_boxes, read, tag_of, task_of


class Kind(Enum):
    """Which metrics apply."""

    DETECTION = "detection"
    PROPOSAL = "proposal"
    GROUNDING = "grounding"
    SEGMENTATION = "segmentation"
    CAPTION = "caption"
    READING = "reading"
    READING_IN_PLACE = "reading in place"
    CATEGORY = "category"
    TEXT = "text"


_TASK_KINDS = {
    "<OCR>": Kind.READING,
    "<REGION_TO_OCR>": Kind.READING,
    "<REGION_TO_CATEGORY>": Kind.CATEGORY,
    "<CAPTION>": Kind.CAPTION,
    "<DETAILED_CAPTION>": Kind.CAPTION,
    "<MORE_DETAILED_CAPTION>": Kind.CAPTION,
    "<REGION_TO_DESCRIPTION>": Kind.CAPTION,
}
"""Those whose answers are texts; of the others the kind of answer says it."""
_ANSWER_KINDS = {
    AnswerKind.OCR: Kind.READING_IN_PLACE,
    AnswerKind.DESCRIPTION_WITH_BBOXES: Kind.DETECTION,
    AnswerKind.BBOXES: Kind.PROPOSAL,
    AnswerKind.PHRASE_GROUNDING: Kind.GROUNDING,
    AnswerKind.POLYGONS: Kind.SEGMENTATION,
}


@dataclass(frozen=True)
class Case:
    """One answer; what is wanted of it are its references as the same parser reads them."""

    prediction: Prediction
    answer: Any
    wanted: list[Any]

    @property
    def answered(self) -> list[Instance]:
        return found(self.answer)

    @property
    def expected(self) -> list[Instance]:
        """Of the first reference: boxes have no other."""
        return found(self.wanted[0])


@dataclass
class Group:
    name: str
    kind: Kind
    cases: list[Case]
    iou: float

    @cached_property
    def detection(self) -> Detection:
        """Shared by the metrics that match boxes by label."""
        return Detection([(case.answered, case.expected) for case in self.cases], self.iou)

    @cached_property
    def words(self) -> captions.Words:
        """Shared by the metrics of captions."""
        return captions.tokenized([(case.answer, case.wanted) for case in self.cases])


def groups(predictions: Iterable[Prediction], iou: float) -> list[Group]:
    """By task. Other prompts go by the tag they begin with, `<DocVQA>`, or else are "boxes" and "text", by what their
    references hold. Raises ValueError for a prediction without references."""
    if not 0 < iou <= 1:
        raise ValueError(f"IoU must be more than 0 and at most 1, not {iou}")
    listed = list(predictions)
    for prediction in listed:
        if not prediction.references:
            raise ValueError(f"{prediction.image}, {prediction.prompt}: no reference to compare the answer with")
    boxed = {_prompt_group(p.prompt) for p in listed if not task_of(p.prompt) and has_boxes(p.references)}
    by_name: dict[str, list[Case]] = defaultdict(list)
    kinds: dict[str, Kind] = {}
    for prediction in listed:
        name, kind = _place(prediction, boxed)
        # One task may be answered in boxes here and in polygons there.
        name = name if kinds.setdefault(name, kind) is kind else f"{name} {kind.value}"
        kinds.setdefault(name, kind)
        by_name[name].append(_case(prediction, kind))
    return [Group(name, kinds[name], cases, iou) for name, cases in by_name.items()]


def _prompt_group(prompt: str) -> str:
    return tag_of(prompt) or prompt


def _place(prediction: Prediction, boxed: set[str]) -> tuple[str, Kind]:
    task = task_of(prediction.prompt)
    if task is None:
        is_boxed = _prompt_group(prediction.prompt) in boxed
        kind = Kind.DETECTION if is_boxed else Kind.TEXT
        return tag_of(prediction.prompt) or ("boxes" if is_boxed else "text"), kind
    if task.answer is AnswerKind.PURE_TEXT:
        return task.token, _TASK_KINDS[task.token]
    if task.answer is AnswerKind.DESCRIPTION_WITH_BBOXES_OR_POLYGONS:
        polygons = "<poly>" in prediction.references[0]
        return task.token, Kind.SEGMENTATION if polygons else Kind.DETECTION
    return task.token, _ANSWER_KINDS[task.answer]


def _case(prediction: Prediction, kind: Kind) -> Case:
    task = task_of(prediction.prompt)
    (answer,) = prediction.answer.values()
    if task is None and kind is Kind.DETECTION:
        task = DETECTION
        answer = prediction.regions or read(prediction.text, task, prediction.size)
    return Case(prediction, answer, [read(text, task, prediction.size) for text in prediction.references])
