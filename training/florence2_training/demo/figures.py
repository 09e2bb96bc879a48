"""What is measured: one function per figure, over answers and the truths they are compared with."""

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from florence2_training.demo.answers import Answer
from florence2_training.demo.pictures import Picture
from florence2_training.demo.samples import Sample
from florence2_training.demo.things import Box


def average_precision(answers: Sequence[Answer], pictures: Sequence[Picture], threshold: float = 0.5) -> float:
    """COCO's, at one threshold, the mean over the classes that occur."""
    nouns = sorted({thing.noun for picture in pictures for thing in picture.things})
    truth: list[dict[str, Any]] = [
        {"image_id": image, "category_id": nouns.index(thing.noun), "bbox": _corner_and_size(thing.box)}
        for image, picture in enumerate(pictures)
        for thing in picture.things
    ]
    found = [
        {"image_id": image, "category_id": nouns.index(label), "bbox": _corner_and_size(box), "score": score}
        for image, answer in enumerate(answers)
        for label, box, score in zip(answer.parsed["labels"], answer.parsed["bboxes"], answer.scores, strict=False)
        if label in nouns
    ]
    if not found:
        return 0.0
    for number, entry in enumerate(truth, start=1):
        entry |= {"id": number, "iscrowd": 0, "area": entry["bbox"][2] * entry["bbox"][3]}
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {
            "images": [{"id": image} for image in range(len(pictures))],
            "categories": [{"id": index} for index in range(len(nouns))],
            "annotations": truth,
        }
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(found), "bbox")
        evaluation.params.iouThrs = np.array([threshold])
        evaluation.evaluate()
        evaluation.accumulate()
    # [thresholds, recalls, classes, areas, most detections]: all areas, up to 100 detections.
    precision = evaluation.eval["precision"][0, :, :, 0, -1]
    return float(precision[precision > -1].mean())


def exact(answers: Sequence[Answer], samples: Sequence[Sample]) -> float:
    return _share(answer.parsed == sample.target for answer, sample in zip(answers, samples, strict=True))


def character_error_rate(answers: Sequence[Answer], samples: Sequence[Sample]) -> float:
    """Edits over the characters that were to be read."""
    edits = sum(edit_distance(answer.parsed, sample.target) for answer, sample in zip(answers, samples, strict=True))
    return edits / sum(len(sample.target) for sample in samples)


def found(answers: Sequence[Answer], wanted: Sequence[Sequence[tuple[str, Box]]], threshold: float = 0.5) -> float:
    """The share of the wanted boxes that some box of the same label covers; each box answers once."""
    hits = []
    for answer, boxes in zip(answers, wanted, strict=True):
        given = list(zip(answer.parsed["labels"], answer.parsed["bboxes"], strict=True))
        for label, box in boxes:
            match = next((g for g in given if g[0] == label and iou(g[1], box) >= threshold), None)
            hits.append(match is not None)
            if match:
                given.remove(match)
    return _share(hits)


def words_in_place(answers: Sequence[Answer], pictures: Sequence[Picture], threshold: float = 0.5) -> float:
    """The share of the words that are read without an error and lie where they were drawn."""
    hits = []
    for answer, picture in zip(answers, pictures, strict=True):
        given = zip(answer.parsed["labels"], answer.parsed["quad_boxes"], strict=True)
        # Every quad is upright: its first and third corner are those of a box.
        boxes = [(label, (quad[0], quad[1], quad[4], quad[5])) for label, quad in given]
        hits += [
            any(label == thing.text and iou(box, thing.box) >= threshold for label, box in boxes)
            for thing in picture.things
        ]
    return _share(hits)


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    areas = sum(max(box[2] - box[0], 0) * max(box[3] - box[1], 0) for box in (a, b))
    return shared / (areas - shared) if shared else 0.0


def edit_distance(a: str, b: str) -> int:
    costs = list(range(len(b) + 1))
    for i, left in enumerate(a, start=1):
        before, costs[0] = costs[0], i
        for j, right in enumerate(b, start=1):
            before, costs[j] = costs[j], min(costs[j] + 1, costs[j - 1] + 1, before + (left != right))
    return costs[-1]


def _corner_and_size(box: Sequence[float]) -> list[float]:
    return [float(box[0]), float(box[1]), float(box[2] - box[0]), float(box[3] - box[1])]


def _share(hits) -> float:
    hits = list(hits)
    return sum(hits) / len(hits)
