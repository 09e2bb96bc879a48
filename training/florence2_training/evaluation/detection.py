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
from florence2_training.evaluation.reference import Instance

Pair = tuple[list[Instance], list[Instance]]
"""What was answered, best score first, and what was wanted."""


@dataclass
class Detection:
    """Boxes that count only with the label that was wanted, compared letter by letter."""

    pairs: Sequence[Pair]
    iou: float

    @cached_property
    def labels(self) -> list[str]:
        return sorted({instance.label for _, wanted in self.pairs for instance in wanted})

    @cached_property
    def matched(self) -> list[int]:
        """Per question, how many boxes are right."""
        return [
            len(match(answered, wanted, box_ious(answered, wanted), self.iou, labelled=True))
            for answered, wanted in self.pairs
        ]

    @property
    def answered(self) -> int:
        return sum(len(answered) for answered, _ in self.pairs)

    @property
    def wanted(self) -> int:
        return sum(len(wanted) for _, wanted in self.pairs)

    def precision(self) -> float | None:
        return sum(self.matched) / self.answered if self.answered else None

    def recall(self) -> float | None:
        return sum(self.matched) / self.wanted if self.wanted else None

    def f1(self) -> float | None:
        total = self.answered + self.wanted
        return 2 * sum(self.matched) / total if total else None

    def exact(self) -> float:
        """Questions whose boxes are all found, with their labels, and none besides: as TF-ID counts its pages
        (github.com/ai8hyf/TF-ID)."""
        hits = [
            len(answered) == len(wanted) == count
            for (answered, wanted), count in zip(self.pairs, self.matched, strict=True)
        ]
        return sum(hits) / len(hits)

    def unknown_labels(self) -> float | None:
        """The share of the boxes whose label occurs in no reference: AP doesn't see them."""
        labels = [instance.label for answered, _ in self.pairs for instance in answered]
        return sum(label not in self.labels for label in labels) / len(labels) if labels else None

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
        """[thresholds, recalls 0, 0.01, ... 1, labels] from COCOeval; None if no box is wanted."""
        if not self.labels:
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
            for instance in pair[1 if wanted else 0]:
                if instance.label in index:
                    box = _corner_and_size(instance.shape)
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


def box_ious(answered: Sequence[Instance], wanted: Sequence[Instance]) -> NDArray[np.float64]:
    """[answered, wanted], as COCO computes them."""
    if not answered or not wanted:
        return np.zeros((len(answered), len(wanted)))
    boxes = [
        np.array([_corner_and_size(instance.shape) for instance in side], np.float64) for side in (answered, wanted)
    ]
    return np.asarray(mask.iou(*boxes, [0] * len(wanted)))


GRID = 1000
"""Bins of a coordinate: quads are compared on the grid on which the model writes them, whatever the picture's size."""


def quad_ious(answered: Sequence[Instance], wanted: Sequence[Instance], size: Size) -> NDArray[np.float64]:
    """[answered, wanted], of the areas themselves and not of the boxes around them."""
    if not answered or not wanted:
        return np.zeros((len(answered), len(wanted)))
    scale = np.tile([GRID / size[0], GRID / size[1]], 4)
    areas = [
        mask.frPyObjects([(np.array(instance.shape) * scale).tolist() for instance in side], GRID, GRID)
        for side in (answered, wanted)
    ]
    return np.asarray(mask.iou(*areas, [0] * len(wanted)))


def _corner_and_size(box: Sequence[float]) -> list[float]:
    x1, y1, x2, y2 = box
    # COCOeval takes no notice of boxes with a negative area.
    return [x1, y1, max(x2 - x1, 0.0), max(y2 - y1, 0.0)]
