"""The answers to one task, beside what they should have been."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Any

from florence2_data.parsing import has_shapes, name_of, parse_answer, task_of

from florence2.prompts import parse
from florence2.tasks import TASKS, AnswerKind, Task
from florence2_evaluation import captions
from florence2_evaluation.detection import Detection, Pair
from florence2_evaluation.prediction import Prediction
from florence2_evaluation.reference import Instance, found


class Kind(Enum):
    """Which metrics apply."""

    DETECTION = "detection"
    PROPOSAL = "proposal"
    LOCATIONS = "locations"
    """Boxes without labels that answer a prompt of somebody's own."""
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
_OWN_KINDS = {"<OD>": Kind.DETECTION, "<REGION_PROPOSAL>": Kind.LOCATIONS}
"""By the task that answers to prompts of somebody's own are read as."""
_OWN_NAMES = {Kind.DETECTION: "boxes", Kind.LOCATIONS: "locations", Kind.TEXT: "text"}
_SHAPES = {Kind.READING_IN_PLACE: "quad_boxes", Kind.SEGMENTATION: "polygons"}
"""What is compared where it isn't boxes; an answer with other shapes has found nothing."""


@dataclass(frozen=True)
class Case:
    """One answer; what is wanted of it are its references as the same parser reads them."""

    prediction: Prediction
    answer: Any
    wanted: list[Any]
    shape: str

    @property
    def answered(self) -> list[Instance]:
        return found(self.answer, self.shape)

    @property
    def expected(self) -> list[Instance]:
        """Of the first reference: boxes have no other."""
        return found(self.wanted[0], self.shape)

    @property
    def pair(self) -> Pair:
        return Pair(self.answered, self.expected, self.prediction.size)


@dataclass
class Group:
    name: str
    kind: Kind
    cases: list[Case]
    iou: float

    @cached_property
    def detection(self) -> Detection:
        """Shared by the metrics that match boxes by label."""
        return Detection([case.pair for case in self.cases], self.iou)

    @cached_property
    def words(self) -> captions.Words:
        """Shared by the metrics of captions."""
        return captions.tokenized([(case.answer, case.wanted) for case in self.cases])


def groups(predictions: Iterable[Prediction], iou: float) -> list[Group]:
    """By task. Other prompts go by the tag they begin with, `<DocVQA>`, or else are "boxes", "locations" and "text", by
    what their references hold. Raises ValueError for a prediction without references."""
    if not 0 < iou <= 1:
        raise ValueError(f"IoU must be more than 0 and at most 1, not {iou}")
    listed = list(predictions)
    for prediction in listed:
        if not prediction.references:
            raise ValueError(f"{prediction.image}, {prediction.prompt}: no reference to compare the answer with")
    # An empty reference says nothing of its kind; others to the same prompt do.
    own = {_prompt_group(p.prompt): task for p in listed if (task := _own_task(p))}
    by_name: dict[str, list[Case]] = defaultdict(list)
    kinds: dict[str, Kind] = {}
    for prediction in listed:
        task = _task(prediction, own)
        name, kind = _place(prediction, task)
        # One task may be answered in boxes here and in polygons there.
        name = name if kinds.setdefault(name, kind) is kind else f"{name} {kind.value}"
        kinds.setdefault(name, kind)
        by_name[name].append(_case(prediction, task, kind))
    return [Group(name, kinds[name], cases, iou) for name, cases in by_name.items()]


def _prompt_group(prompt: str) -> str:
    name = name_of(prompt)
    return prompt if name == "text" else name


def _own_task(prediction: Prediction) -> Task | None:
    """The task that the references to a prompt of somebody's own are read as, if they hold boxes."""
    if parse(prediction.prompt).task:
        return None
    return next(filter(None, (task_of(prediction.prompt, text) for text in prediction.references)), None)


def _task(prediction: Prediction, own: dict[str, Task]) -> Task | None:
    if task := parse(prediction.prompt).task or _own_task(prediction):
        return task
    return None if any(prediction.references) else own.get(_prompt_group(prediction.prompt))


def _place(prediction: Prediction, task: Task | None) -> tuple[str, Kind]:
    name = name_of(prediction.prompt)
    if name not in TASKS:
        kind = _OWN_KINDS[task.token] if task else Kind.TEXT
        return _OWN_NAMES[kind] if name == "text" else name, kind
    assert task
    if not has_shapes(task):
        return name, _TASK_KINDS[name]
    if task.answer is AnswerKind.DESCRIPTION_WITH_BBOXES_OR_POLYGONS:
        polygons = "<poly>" in prediction.references[0]
        return name, Kind.SEGMENTATION if polygons else Kind.DETECTION
    return name, _ANSWER_KINDS[task.answer]


def _case(prediction: Prediction, task: Task | None, kind: Kind) -> Case:
    (answer,) = prediction.answer.values()
    if task and not parse(prediction.prompt).task:
        answer = prediction.regions or parse_answer(task, prediction.text, prediction.size)
    if kind is Kind.LOCATIONS:
        # What the answer calls its boxes is not asked.
        answer = answer | {"labels": [""] * len(answer["labels"])}
    wanted = [parse_answer(task, text, prediction.size) for text in prediction.references]
    return Case(prediction, answer, wanted, _SHAPES.get(kind, "bboxes"))
