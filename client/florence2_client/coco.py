"""Instances as COCO's JSON."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from florence2_client.results import Instance


class Coco:
    """Pictures and their instances, one after the other; everything is numbered from 1."""

    def __init__(self) -> None:
        self._images: list[dict[str, Any]] = []
        self._annotations: list[dict[str, Any]] = []
        self._categories: dict[str, int] = {}

    def add(self, file_name: str, size: tuple[int, int], instances: "Iterable[Instance]") -> None:
        """`size`: width and height of the upright picture."""
        width, height = size
        number = len(self._images) + 1
        self._images.append({"id": number, "file_name": file_name, "width": width, "height": height})
        for instance in instances:
            self._annotations.append(self._annotation(number, instance))

    def to_dict(self) -> dict[str, list[dict[str, Any]]]:
        categories = [{"id": number, "name": name} for name, number in self._categories.items()]
        return {"images": self._images, "annotations": self._annotations, "categories": categories}

    def _annotation(self, image: int, instance: "Instance") -> dict[str, Any]:
        x1, y1, x2, y2 = instance.box
        outlines = instance.polygons or ((instance.quad,) if instance.quad else ())
        # A segmentation's part has three points or more (pycocotools, frPyObjects).
        parts = [list(outline) for outline in outlines if len(outline) >= 6]
        annotation = {
            "id": len(self._annotations) + 1,
            "image_id": image,
            "category_id": self._categories.setdefault(instance.label, len(self._categories) + 1),
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "area": sum(map(_area, parts)) if parts else (x2 - x1) * (y2 - y1),
            "iscrowd": 0,
            "score": instance.score,
        }
        return annotation | ({"segmentation": parts} if parts else {})


def _area(outline: list[float]) -> float:
    """Of a polygon, in pixels: the shoelace formula."""
    points = np.array(outline, np.float64).reshape(-1, 2)
    x, y = points.T
    return float(abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2)
