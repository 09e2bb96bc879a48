"""The demo checkpoint on pictures it has not seen."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoProcessor, Florence2ForConditionalGeneration

from florence2_training.demo import figures
from florence2_training.demo.answers import Answer, ask
from florence2_training.demo.pictures import HELD_OUT, HELD_OUT_NEW_WORDS, Picture, draw
from florence2_training.demo.samples import Sample, answer, groups
from florence2_training.demo.things import Box
from florence2_training.demo.words import counted


@dataclass(frozen=True)
class Row:
    pictures: str
    task: str
    figure: str
    count: int
    value: float


Measure = Callable[[list[Answer], list[Picture], list[Sample]], float]


def _average_precision(answers: list[Answer], pictures: list[Picture], _: list[Sample]) -> float:
    return figures.average_precision(answers, pictures)


def _exact(answers: list[Answer], _: list[Picture], samples: list[Sample]) -> float:
    return figures.exact(answers, samples)


def _errors(answers: list[Answer], _: list[Picture], samples: list[Sample]) -> float:
    return figures.character_error_rate(answers, samples)


def _in_place(answers: list[Answer], pictures: list[Picture], _: list[Sample]) -> float:
    return figures.words_in_place(answers, pictures)


def _found(answers: list[Answer], pictures: list[Picture], samples: list[Sample]) -> float:
    return figures.found(answers, [_wanted(*pair) for pair in zip(pictures, samples, strict=True)])


_GROUNDING = "<CAPTION_TO_PHRASE_GROUNDING>"
_ONE_PHRASE = f"{_GROUNDING} one phrase"
_CAPTION = ("<CAPTION>", "exact", _exact)
_PROPOSAL = ("<REGION_PROPOSAL>", "recall at IoU 0.5", _found)
_SEEING: list[tuple[str, str, Measure]] = [
    ("<OD>", "AP50", _average_precision),
    _CAPTION,
    (_GROUNDING, "whole caption, found at IoU 0.5", _found),
    (_ONE_PHRASE, "one phrase, found at IoU 0.5", _found),
    ("<REGION_TO_CATEGORY>", "exact", _exact),
    _PROPOSAL,
]
_READING: list[tuple[str, str, Measure]] = [
    ("<OCR>", "character error rate", _errors),
    ("<OCR>", "exact", _exact),
    ("<OCR_WITH_REGION>", "read, and found at IoU 0.5", _in_place),
]
_MEASURES = [
    ("scene", HELD_OUT, "scenes", _SEEING),
    ("page", HELD_OUT, "pages", _SEEING),
    ("word", HELD_OUT, "words, half of them random letters", [*_READING, _CAPTION, _PROPOSAL]),
    ("word", HELD_OUT_NEW_WORDS, "words never drawn in training", _READING),
]


def evaluate(checkpoint: Path, count: int, seed: int, greedy: bool = False) -> list[Row]:
    """`count` pictures of each kind. Half-precision weights are computed with in single precision."""
    model = Florence2ForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(checkpoint)
    rows = []
    for kind, split, name, measures in _MEASURES:
        pictures = [draw(kind, seed, split, index) for index in range(count)]
        asked: dict[str, tuple] = {}
        for task, figure, measure in measures:
            if task not in asked:
                pairs = [(picture, _question(task, picture, index)) for index, picture in enumerate(pictures)]
                some = [(picture, sample) for picture, sample in pairs if sample is not None]
                seen, samples = [picture for picture, _ in some], [sample for _, sample in some]
                asked[task] = ask(model, processor, seen, samples, greedy), seen, samples
            answers, seen, samples = asked[task]
            rows.append(Row(name, task.split()[0], figure, len(seen), measure(answers, seen, samples)))
    return rows


def markdown(rows: list[Row]) -> str:
    lines = ["| pictures | task | figure | asked | value |", "|---|---|---|---:|---:|"]
    lines += [f"| {row.pictures} | `{row.task}` | {row.figure} | {row.count} | {row.value:.3f} |" for row in rows]
    return "\n".join(lines) + "\n"


def _wanted(picture: Picture, sample: Sample) -> list[tuple[str, Box]]:
    """The boxes an answer to `sample` names, each with its label."""
    if sample.task == "<REGION_PROPOSAL>":
        return [("", thing.box) for thing in picture.things]
    phrases = {counted(len(group), name): group for name, group in groups(picture.things).items()}
    if sample.text in phrases:
        phrases = {sample.text: phrases[sample.text]}
    return [(phrase, thing.box) for phrase, group in phrases.items() for thing in group]


def _question(task: str, picture: Picture, index: int) -> Sample | None:
    # What is to be named or found goes round the picture's things; past the last, it is the whole caption.
    chosen = index % max(len(groups(picture.things)), 1) if task == _ONE_PHRASE else index
    if task == _GROUNDING:
        chosen = len(picture.things)
    return answer(task.split()[0], picture.kind, picture.things, picture.image.size, chosen)
