"""Masks against those that were wanted."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools import mask

from florence2.locations import Size
from florence2_evaluation.reference import Instance

Mask = dict[str, Any]
"""Run-length encoded, of a picture's size."""
Overlap = tuple[float, float]
"""Pixels of the intersection and of the union."""


def area(instances: Sequence[Instance], size: Size) -> Mask:
    """All polygons as one mask, [height, width]."""
    width, height = size
    # Of fewer than three points pycocotools makes a box, or nothing.
    outlines = [outline for instance in instances for outline in instance.shape if len(outline) >= 6]
    if not outlines:
        return mask.encode(np.zeros((height, width), np.uint8, order="F"))
    return mask.merge(mask.frPyObjects(outlines, height, width))


def overlap(answered: Mask, wanted: Mask) -> Overlap:
    both = float(mask.area(mask.merge([answered, wanted], intersect=True)))
    return both, float(mask.area(answered)) + float(mask.area(wanted)) - both


def mean_iou(overlaps: Sequence[Overlap]) -> float:
    """Two empty masks are alike, as in generalised referring segmentation (arXiv:2306.00968)."""
    return float(np.mean([both / union if union else 1.0 for both, union in overlaps]))


def cumulative_iou(overlaps: Sequence[Overlap]) -> float | None:
    """All intersections over all unions: large things count more."""
    union = sum(union for _, union in overlaps)
    return sum(both for both, _ in overlaps) / union if union else None
