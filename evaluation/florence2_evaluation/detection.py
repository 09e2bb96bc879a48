"""Boxes and quads against those that were wanted."""

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from florence2.locations import Size
from florence2_evaluation.reference import Instance

MOST_LABELS = 1000
"""COCOeval takes a round for each label and question: more are descriptions, not classes, and have no AP."""


@dataclass(frozen=True)
class Pair:
    answered: list[Instance]
    """Best score first."""
    wanted: list[Instance]
    size: Size
    """(width, height) of the picture."""


@dataclass
class Detection:
    """Boxes that count only with the label that was wanted, compared letter by letter."""

    pairs: Sequence[Pair]
    iou: float

    @cached_property
    def labels(self) -> list[str]:
        return sorted({instance.label for pair in self.pairs for instance in pair.wanted})

    @cached_property
    def matched(self) -> list[int]:
        """Per question, how many boxes are right."""
        return [len(match(pair.answered, pair.wanted, box_ious(pair), self.iou, labelled=True)) for pair in self.pairs]

    @property
    def answered(self) -> int:
        return sum(len(pair.answered) for pair in self.pairs)

    @property
    def wanted(self) -> int:
        return sum(len(pair.wanted) for pair in self.pairs)

    def precision(self) -> float | None:
        """0 where boxes are wanted and none is answered: a training run compares it."""
        if not self.answered:
            return 0.0 if self.wanted else None
        return sum(self.matched) / self.answered

    def recall(self) -> float | None:
        return sum(self.matched) / self.wanted if self.wanted else None

    def f1(self) -> float | None:
        total = self.answered + self.wanted
        return 2 * sum(self.matched) / total if total else None

    def exact(self) -> float:
        """Questions whose boxes are all found, with their labels, and none besides: what TF-ID counts of its pages
        (github.com/ai8hyf/TF-ID), whose own figure people have judged, without an IoU."""
        hits = [
            len(pair.answered) == len(pair.wanted) == count
            for pair, count in zip(self.pairs, self.matched, strict=True)
        ]
        return sum(hits) / len(hits)

    def unknown_labels(self) -> float | None:
        """The share of the boxes whose label occurs in no reference: AP doesn't see them."""
        labels, known = [instance.label for pair in self.pairs for instance in pair.answered], set(self.labels)
        return sum(label not in known for label in labels) / len(labels) if labels else None

    def average_precision(self, threshold: float | None = None) -> float | None:
        """COCO's: the mean over the labels that are wanted somewhere, at one IoU or over 0.5, 0.55, ... 0.95."""
        precision = self.precisions
        if precision is None:
            return None
        if threshold is not None:
            precision = precision[np.isclose(THRESHOLDS, threshold)]
        return float(precision.mean())

    def average_precision_of_labels(self, threshold: float) -> dict[str, float]:
        """The same for each label that is wanted somewhere."""
        precision = self.precisions
        if precision is None:
            return {}
        means = precision[np.isclose(THRESHOLDS, threshold)].mean(axis=(0, 1))
        return dict(zip(self.labels, means.tolist(), strict=True))

    @cached_property
    def precisions(self) -> NDArray[np.float64] | None:
        """[thresholds, recalls 0, 0.01, ... 1, labels] from COCOeval; None if no box is wanted, or too many labels."""
        if not 0 < len(self.labels) <= MOST_LABELS:
            return None
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation = COCOeval(self._coco(wanted=True), self._coco(wanted=False), "bbox")
            # Small, medium and large boxes aren't told apart.
            evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
            evaluation.params.maxDets = [100]
            evaluation.evaluate()
            evaluation.accumulate()
        return evaluation.eval["precision"][:, :, :, 0, 0]

    def _coco(self, wanted: bool) -> Any:
        """Every question is an image: one picture may be asked for several things."""
        index = {label: number for number, label in enumerate(self.labels, start=1)}
        annotations: list[dict[str, Any]] = []
        for image, pair in enumerate(self.pairs):
            for instance in pair.wanted if wanted else pair.answered:
                if instance.label in index:
                    box = _corner_and_size(instance.shape, pair.size)
                    number = len(annotations) + 1
                    annotations.append(
                        {"id": number, "image_id": image, "category_id": index[instance.label], "bbox": box}
                        | {"area": box[2] * box[3], "iscrowd": 0, "score": instance.score}
                    )
        coco = COCO()
        coco.dataset = {
            "images": [{"id": image} for image in range(len(self.pairs))],
            "categories": [{"id": number, "name": label} for label, number in index.items()],
            "annotations": annotations,
        }
        coco.createIndex()
        return coco


THRESHOLDS = np.linspace(0.5, 0.95, 10)


def match(
    answered: Sequence[Instance],
    wanted: Sequence[Instance],
    ious: NDArray[np.float64],
    threshold: float,
    labelled: bool,
) -> list[tuple[int, int]]:
    """One to one, the best scores choosing first what overlaps most and, if `labelled`, has the same label -> indices.

    `answered` is sorted by score; `ious` [answered, wanted]."""
    free, pairs = set(range(len(wanted))), []
    for index, instance in enumerate(answered):
        fits = [other for other in sorted(free) if ious[index, other] >= threshold]
        if labelled:
            fits = [other for other in fits if wanted[other].label == instance.label]
        if fits:
            best = max(fits, key=lambda other: ious[index, other])
            free.remove(best)
            pairs.append((index, best))
    return pairs


def box_ious(pair: Pair) -> NDArray[np.float64]:
    """[answered, wanted], as COCO computes them."""
    if not pair.answered or not pair.wanted:
        return np.zeros((len(pair.answered), len(pair.wanted)))
    boxes = [
        np.array([_corner_and_size(instance.shape, pair.size) for instance in side], np.float64)
        for side in (pair.answered, pair.wanted)
    ]
    return np.asarray(mask.iou(*boxes, [0] * len(pair.wanted)))


GRID = 1000
"""Bins of a coordinate: quads are compared on the grid on which the model writes them, whatever the picture's size."""


def quad_ious(pair: Pair) -> NDArray[np.float64]:
    """[answered, wanted], of the areas themselves and not of the boxes around them."""
    if not pair.answered or not pair.wanted:
        return np.zeros((len(pair.answered), len(pair.wanted)))
    scale = np.tile([GRID / pair.size[0], GRID / pair.size[1]], 4)
    areas = [
        mask.frPyObjects([(np.array(instance.shape) * scale).tolist() for instance in side], GRID, GRID)
        for side in (pair.answered, pair.wanted)
    ]
    return np.asarray(mask.iou(*areas, [0] * len(pair.wanted)))


def _corner_and_size(box: Sequence[float], size: Size) -> list[float]:
    x1, y1, x2, y2 = box
    (x, width), (y, height) = _span(x1, x2, size[0] / GRID), _span(y1, y2, size[1] / GRID)
    return [x, y, width, height]


def _span(low: float, high: float, bin: float) -> tuple[float, float]:
    """Start and length. Edges that share a bin span that bin: without an area nothing could find the box."""
    if high < low:
        # COCOeval takes no notice of boxes with a negative area.
        return low, 0.0
    return ((low + high - bin) / 2, bin) if high - low < bin else (low, high - low)
