"""Single answers beside what was wanted, the worst first."""

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from florence2.drawing import draw
from florence2.images import decode
from florence2_evaluation import segmentation, text_metrics
from florence2_evaluation.detection import box_ious, match, quad_ious
from florence2_evaluation.group import Case, Group, Kind

THUMBNAIL = 360
"""Pixels of the longer side."""
WORST, BEST = 12, 4
"""How many of a task are shown."""


@dataclass(frozen=True)
class Exhibit:
    image: str
    prompt: str
    quality: float
    """From 0, all wrong, to 1."""
    answer: str
    references: list[str]
    answer_picture: str | None
    """A data URL; None where there is nothing to draw, or no picture any more."""
    reference_picture: str | None
    picture: str | None


def exhibits(group: Group) -> list[Exhibit]:
    """The worst answers and the best, the worst first."""
    order = sorted(((quality(case, group), index) for index, case in enumerate(group.cases)))
    chosen = order if len(order) <= WORST + BEST else order[:WORST] + order[-BEST:]
    return [_exhibit(group.cases[index], value) for value, index in chosen]


def quality(case: Case, group: Group) -> float:
    """How right one answer is, for the order: 1 where nothing was wanted and nothing said."""
    return _QUALITY.get(group.kind, _text_quality)(case, group.iou)


def _text_quality(case: Case, _: float) -> float:
    return 1 - text_metrics.normalized_distance([(case.answer, case.wanted)])


def _box_quality(case: Case, iou: float) -> float:
    pair = case.pair
    matched = match(pair.answered, pair.wanted, box_ious(pair), iou, labelled=True)
    return _share(2 * len(matched), len(pair.answered) + len(pair.wanted))


def _quad_quality(case: Case, iou: float) -> float:
    pair = case.pair
    matched = match(pair.answered, pair.wanted, quad_ious(pair), iou, labelled=False)
    right = sum(pair.answered[index].label == pair.wanted[other].label for index, other in matched)
    return _share(2 * right, len(pair.answered) + len(pair.wanted))


def _mask_quality(case: Case, _: float) -> float:
    answered, expected = (segmentation.area(side, case.prediction.size) for side in (case.answered, case.expected))
    return segmentation.mean_iou([segmentation.overlap(answered, expected)])


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 1.0


_QUALITY: dict[Kind, Callable[[Case, float], float]] = {
    Kind.DETECTION: _box_quality,
    Kind.PROPOSAL: _box_quality,
    Kind.LOCATIONS: _box_quality,
    Kind.GROUNDING: _box_quality,
    Kind.SEGMENTATION: _mask_quality,
    Kind.READING_IN_PLACE: _quad_quality,
}
"""Texts are the others."""


def _exhibit(case: Case, value: float) -> Exhibit:
    prediction = case.prediction
    image = _open(Path(prediction.image))
    is_text = isinstance(case.answer, str)
    pictures: list[str | None] = [None, None]
    if image and not is_text:
        pictures = [_thumbnail(draw(image, {"": shown})) for shown in (case.answer, case.wanted[0])]
    return Exhibit(
        image=prediction.image,
        prompt=prediction.prompt,
        quality=value,
        answer=case.answer if is_text else _plain(prediction.text),
        references=prediction.references,
        answer_picture=pictures[0],
        reference_picture=pictures[1],
        picture=_thumbnail(image) if image and is_text else None,
    )


def _open(path: Path) -> Image.Image | None:
    try:
        return decode(path.read_bytes())
    except (OSError, ValueError):
        # The predictions may have come from another machine.
        return None


def _thumbnail(image: Image.Image) -> str:
    small: Any = image.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _plain(text: str) -> str:
    return text.replace("<s>", "").replace("</s>", "").strip()
