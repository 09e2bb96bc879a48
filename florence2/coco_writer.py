"""What was found in pictures as COCO's JSON."""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np


class Found(Protocol):
    """Coordinates are pixels of the upright picture."""

    @property
    def label(self) -> str: ...
    @property
    def score(self) -> float | None: ...
    @property
    def box(self) -> tuple[float, float, float, float]:
        """x1, y1, x2, y2."""

    @property
    def quad(self) -> tuple[float, ...] | None: ...
    @property
    def polygons(self) -> tuple[tuple[float, ...], ...] | None: ...


class Coco:
    """Pictures and what was found in them, one after the other; everything is numbered from 1."""

    def __init__(self) -> None:
        self._rows = CocoRows()
        self._images: dict[str, dict[str, Any]] = {}
        self._annotations: list[dict[str, Any]] = []

    def add(self, file_name: str, size: tuple[int, int], instances: Iterable[Found]) -> None:
        """`size`: width and height of the upright picture. One that was added before gets more of them."""
        image, annotations = self._rows.add(file_name, size, instances, self._images.get(file_name))
        self._images[file_name] = image
        self._annotations += annotations

    def to_dict(self) -> dict[str, list[dict[str, Any]]]:
        images = list(self._images.values())
        return {"images": images, "annotations": self._annotations, "categories": self._rows.categories}


class CocoRows:
    """What the lists of a COCO file hold, of one picture after the other; only the categories are kept."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._images = self._annotations = 0

    @property
    def categories(self) -> list[dict[str, Any]]:
        return [{"id": number, "name": name} for name, number in self._numbers.items()]

    def add(
        self, file_name: str, size: tuple[int, int], found: Iterable[Found], image: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The picture's row of images, which may be there already, and its annotations."""
        if image is None:
            width, height = size
            self._images += 1
            image = {"id": self._images, "file_name": file_name, "width": width, "height": height}
        return image, [self._annotation(one, image["id"]) for one in found]

    def _annotation(self, found: Found, image: int) -> dict[str, Any]:
        x1, y1, x2, y2 = found.box
        outlines = found.polygons or ((found.quad,) if found.quad else ())
        # A segmentation's part has three points or more (pycocotools, frPyObjects).
        parts = [list(outline) for outline in outlines if len(outline) >= 6]
        self._annotations += 1
        annotation = {
            "id": self._annotations,
            "image_id": image,
            "category_id": self._numbers.setdefault(found.label, len(self._numbers) + 1),
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "area": sum(map(_area, parts)) if parts else (x2 - x1) * (y2 - y1),
            "iscrowd": 0,
        }
        if found.score is not None:
            annotation["score"] = found.score
        return annotation | ({"segmentation": parts} if parts else {})


def _area(outline: Sequence[float]) -> float:
    """Of a polygon, in pixels: the shoelace formula."""
    points = np.array(outline, np.float64).reshape(-1, 2)
    x, y = points.T
    return float(abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2)
