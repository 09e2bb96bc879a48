"""The demo checkpoint on pictures it has not seen."""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from florence2_data.record import Example
from florence2_evaluation.models import Model
from florence2_evaluation.question import questions
from florence2_evaluation.score import score
from tqdm import tqdm

from florence2_demo.generators import HELD_OUT, HELD_OUT_NEW_WORDS, Picture, draw
from florence2_demo.samples import Sample, answer, groups

_GROUNDING = "<CAPTION_TO_PHRASE_GROUNDING>"
_ONE_PHRASE = f"{_GROUNDING} one phrase"
_CAPTION = ("<CAPTION>", "exact", "exact")
_PROPOSAL = ("<REGION_PROPOSAL>", "recall at IoU 0.5", "recall@0.5")
_SEEING = [
    ("<OD>", "AP50", "AP50"),
    _CAPTION,
    (_GROUNDING, "whole caption, found at IoU 0.5", "found@0.5"),
    (_ONE_PHRASE, "one phrase, found at IoU 0.5", "found@0.5"),
    ("<REGION_TO_CATEGORY>", "exact", "exact"),
    _PROPOSAL,
]
_READING = [
    ("<OCR>", "character error rate", "CER"),
    ("<OCR>", "exact", "exact"),
    ("<OCR_WITH_REGION>", "read, and found at IoU 0.5", "read_in_place@0.5"),
]
_MEASURES = [
    ("scene", HELD_OUT, "scenes", _SEEING),
    ("page", HELD_OUT, "pages", _SEEING),
    ("word", HELD_OUT, "words, half of them random letters", [*_READING, _CAPTION, _PROPOSAL]),
    ("word", HELD_OUT_NEW_WORDS, "words never drawn in training", _READING),
]
"""Pictures, and of each task the figure's name here and that of `florence2 eval`."""


@dataclass(frozen=True)
class Row:
    pictures: str
    task: str
    figure: str
    count: int
    value: float


def evaluate(model: Model, count: int, seed: int) -> list[Row]:
    """`count` pictures of each kind."""
    rows = []
    for kind, split, name, measures in _MEASURES:
        pictures = [draw(kind, seed, split, index) for index in range(count)]
        with TemporaryDirectory() as folder:
            for task in dict.fromkeys(task for task, _, _ in measures):
                asked = _examples(task, pictures, Path(folder))
                answers = model.predict(questions(tqdm(asked, f"{name} {task}", disable=None)))
                scores = {found.metric: found for found in score(answers)}
                for own, figure, metric in measures:
                    if own == task:
                        found = scores[metric]
                        rows.append(Row(name, task.split()[0], figure, found.count, found.value))
    return rows


def markdown(rows: list[Row]) -> str:
    lines = ["| pictures | task | figure | asked | value |", "|---|---|---|---:|---:|"]
    lines += [f"| {row.pictures} | `{row.task}` | {row.figure} | {row.count} | {row.value:.3f} |" for row in rows]
    return "\n".join(lines) + "\n"


def _examples(task: str, pictures: list[Picture], folder: Path) -> list[Example]:
    examples = []
    for index, picture in enumerate(pictures):
        sample = _question(task, picture, index)
        if sample is not None:
            file = folder / f"{index}.png"
            if not file.exists():
                picture.image.save(file)
            examples.append(Example(file, sample.prompt, sample.target, str(file)))
    return examples


def _question(task: str, picture: Picture, index: int) -> Sample | None:
    # What is to be named or found goes round the picture's things; past the last, it is the whole caption.
    chosen = index % max(len(groups(picture.things)), 1) if task == _ONE_PHRASE else index
    if task == _GROUNDING:
        chosen = len(picture.things)
    return answer(task.split()[0], picture.kind, picture.things, picture.image.size, chosen)
