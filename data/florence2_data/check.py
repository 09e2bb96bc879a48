"""A data set looked through before it costs a training run: every sample, every picture."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from florence2.answer_limits import AnswerLimits, repeats
from florence2.locations import quantize
from florence2.tasks import AnswerKind, Task
from florence2_data.findings import Report
from florence2_data.formats import SizeOf, Split, regions, resolve
from florence2_data.parsing import (
    BINS,
    LOCATION,
    RUN,
    coordinates,
    has_shapes,
    name_of,
    parse_answer,
    prompt_error,
    shapes,
    task_of,
)
from florence2_data.picture_check import PictureCheck
from florence2_data.record import Example, Problem, Sample
from florence2_data.rounding import Rounding

_SIZE = (BINS, BINS)
_BOX_KINDS = (AnswerKind.DESCRIPTION_WITH_BBOXES, AnswerKind.PHRASE_GROUNDING, AnswerKind.BBOXES)
_LABELLED = (AnswerKind.DESCRIPTION_WITH_BBOXES, AnswerKind.PHRASE_GROUNDING, AnswerKind.OCR)


@dataclass(frozen=True)
class Shown:
    """A sample picked for the page."""

    split: str
    example: Example


def check(
    splits: Sequence[Split],
    limits: AnswerLimits | None = None,
    images: bool = True,
    samples: int = 0,
    seed: int = 0,
    every_message: bool = False,
) -> tuple[Report, list[Shown]]:
    """Reads all splits once. Memory holds counts, a digest per picture and `samples` samples drawn evenly (reservoir).

    `images`: whether pictures are decoded and compared; `limits`: None leaves token counts out; `every_message`: all
    are kept, not the first of each kind.
    """
    report = Report(pictures_checked=images, every_message=every_message)
    if limits:
        report.lengths, report.limit = Counter(), limits.limit
    shown = _Reservoir(samples, random.Random(seed))
    with PictureCheck(report, images) as pictures:
        for name, split in _named(splits):
            report.splits[name], report.tasks[name] = 0, Counter()
            sizes, rounding = SizeOf(), Rounding()
            for sample in split.read():
                found = sample if isinstance(sample, Problem) else resolve(sample, sizes)
                if isinstance(found, Problem):
                    report.add("unusable", f"{name}: {found}")
                    continue
                assert isinstance(sample, Sample)
                report.splits[name] += 1
                shown.offer(Shown(name, found))
                pictures.add(found.image, name)
                found = replace(found, where=f"{name}: {found.where}")
                _check_regions(report, sample, sizes, found)
                _check_text(report, sample, found, limits, name)
                _count_bins(rounding, sample, sizes)
            if warning := rounding.warning():
                report.add("rounding", f"{name}: {warning}")
    return report, shown.kept


class _Reservoir:
    def __init__(self, room: int, dice: random.Random) -> None:
        self.room, self.dice, self.offered = room, dice, 0
        self.kept: list[Shown] = []

    def offer(self, sample: Shown) -> None:
        self.offered += 1
        if len(self.kept) < self.room:
            self.kept.append(sample)
        elif (place := self.dice.randrange(self.offered)) < self.room:
            self.kept[place] = sample


def _named(splits: Sequence[Split]) -> list[tuple[str, Split]]:
    """Names that tell the splits apart: those of several data sets carry their file or folder."""
    names = Counter(split.name for split in splits)
    return [(split.name if names[split.name] == 1 else f"{split.name} of {split.path}", split) for split in splits]


def _check_regions(report: Report, sample: Sample, sizes: SizeOf, found: Example) -> None:
    for region in regions(sample):
        size = region.space or sizes(sample.image)
        points, written = region.points, region.written or _numbers(region.points)
        # Up to a bin outside is the annotation tool's rounding: the clamp moves no box by more than a token can say.
        if any(not -size[i % 2] / BINS <= point <= size[i % 2] * (1 + 1 / BINS) for i, point in enumerate(points)):
            report.add("outside", f"{found.where}: {written} in {size[0]} x {size[1]}")
        if len(points) == 4:
            x1, y1, x2, y2 = points
            bins = quantize(points, size)
            if x1 >= x2 or y1 >= y2:
                report.add("degenerate", f"{found.where}: {written}")
            elif bins[0] == bins[2] or bins[1] == bins[3]:
                report.add("same bin", f"{found.where}: {written}")


def _check_written(report: Report, sample: Sample, task: Task | None, where: str) -> None:
    """Boxes that stand as tokens in the data set: of those only the bins are known."""
    boxes = task is not None and task.answer in _BOX_KINDS
    for part in (*sample.prompt, *(sample.answer if boxes else ())):
        for run in RUN.findall(part) if isinstance(part, str) else ():
            bins = [int(number) for number in LOCATION.findall(run)]
            for start in range(0, len(bins) - 3, 4):
                x1, y1, x2, y2 = bins[start : start + 4]
                if x1 > x2 or y1 > y2:
                    report.add("degenerate", f"{where}: bins {_numbers((x1, y1, x2, y2))}")
                elif x1 == x2 or y1 == y2:
                    report.add("same bin", f"{where}: bins {_numbers((x1, y1, x2, y2))}")


def _check_text(report: Report, sample: Sample, found: Example, limits: AnswerLimits | None, split: str) -> None:
    for number in LOCATION.findall(found.prefix + found.suffix):
        if int(number) >= BINS or str(int(number)) != number:
            report.add("no token", f"{found.where}: <loc_{number}>")
            break
    if error := prompt_error(found.prefix):
        report.add("prompt", f"{found.where}: {error}")
        report.tasks[split]["(refused)"] += 1
        return
    task = task_of(found.prefix, found.suffix)
    report.tasks[split][name_of(found.prefix)] += 1
    if not found.suffix.strip():
        report.add("empty", f"{found.where}: {_short(found.prefix)}")
    _check_written(report, sample, task, found.where)
    if task and has_shapes(task):
        _check_shapes(report, task, found)
    if limits:
        _check_length(report, found, limits)


def _check_shapes(report: Report, task: Task, found: Example) -> None:
    parsed = shapes(parse_answer(task, found.suffix, _SIZE))
    for _, _, label in parsed:
        report.add_label(label or "(no label)")
        if not label.isascii():
            report.add("letters", f"{found.where}: {label}")
    written = [LOCATION.findall(run) for run in RUN.findall(found.suffix)]
    locations = sum(map(len, written))
    if sum(coordinates(kind, shape) for kind, shape, _ in parsed) < locations:
        boxes = f"{len(parsed)} shapes from {locations} locations"
        report.add("answer", f"{found.where}: {boxes}: {_short(found.suffix)}")
    *before, behind = RUN.split(found.suffix)
    if task.answer in _LABELLED:
        read = {label for _, _, label in parsed}
        for label in map(str.strip, before):
            if not label or label not in read:
                report.add("label", f"{found.where}: {_short(label) if label else 'an empty label'}")
    if behind.strip() and task.answer in _LABELLED:
        report.add("loose text", f"{found.where}: {_short(behind)}")


def _check_length(report: Report, found: Example, limits: AnswerLimits) -> None:
    assert report.lengths is not None
    tokens = limits.tokens(found.suffix)
    report.lengths[len(tokens)] += 1
    if len(tokens) > limits.limit:
        report.add("length", f"{found.where}: {len(tokens)} tokens of at most {limits.limit}")
    if repeats(tokens, limits.ngram):
        report.add("repeated", f"{found.where}: {_short(found.suffix)}")


def _count_bins(rounding: Rounding, sample: Sample, sizes: SizeOf) -> None:
    text = "".join(part for part in (*sample.prompt, *sample.answer) if isinstance(part, str))
    if rounding.wants_more and "<loc_" in text:
        try:
            rounding.add(text, sizes(sample.image))
        except ValueError:
            # A broken picture is a finding of its own.
            return


def _numbers(values: Sequence[float]) -> str:
    return "[" + ", ".join(f"{value:g}" for value in values) + "]"


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")
