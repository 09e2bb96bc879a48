"""A parsed answer -> what a metric compares: boxes, quads or polygons in pixels."""

from dataclasses import dataclass
from typing import Any

from florence2.answers import instances


@dataclass(frozen=True)
class Instance:
    label: str
    shape: Any
    """Coordinates in pixels: x1, y1, x2, y2 of a box, x, y, ... of a quad; a list of outlines of a polygon."""
    score: float


def found(value: Any, shape: str) -> list[Instance]:
    """The shapes of one kind, "bboxes", "quad_boxes" or "polygons", that the value holds, best score first; equals stay
    in the order in which they were written."""
    if isinstance(value, str):
        return []
    held = [Instance(label, points, score) for kind, points, label, score in instances(value) if kind == shape]
    return sorted(held, key=lambda instance: -instance.score)
