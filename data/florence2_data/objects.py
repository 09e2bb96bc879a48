"""ms-swift's `objects`: what `<bbox>` and `<ref-object>` stand for, in the v2 and the v3 way of writing it."""

import json
from collections.abc import Sequence
from typing import Any

from florence2.locations import Size
from florence2_data.markup import numbers
from florence2_data.record import Region

_BBOX_TYPES: dict[str, tuple[float, Size | None]] = {
    "real": (1, None),
    "norm_1000": (1, (1000, 1000)),
    "norm1000": (1, (1000, 1000)),
    # Parts of 1 as thousandths: 0.3 / (1 / 1000) is 299.99…, 0.3 * 1000 is 300.
    "norm_1": (1000, (1000, 1000)),
    "norm1": (1000, (1000, 1000)),
}
"""Name -> what a coordinate is multiplied by, and the space it is then in."""


class Objects:
    """A row's boxes and labels, each kind handed out in order."""

    def __init__(self, boxes: Sequence[Sequence[Region]] = (), refs: Sequence[str] = ()) -> None:
        self.boxes, self.refs = boxes, refs
        self.boxes_used = self.refs_used = 0

    def next_boxes(self) -> Sequence[Region]:
        self.boxes_used += 1
        return self.boxes[self.boxes_used - 1] if self.boxes_used <= len(self.boxes) else ()

    def next_ref(self) -> str:
        self.refs_used += 1
        return self.refs[self.refs_used - 1] if self.refs_used <= len(self.refs) else ""

    def check_used(self) -> None:
        """Raises ValueError unless placeholders and objects match; one kind may stay unused where the other is used."""
        for placeholder, used, given in (
            ("<bbox>", self.boxes_used, len(self.boxes)),
            ("<ref-object>", self.refs_used, len(self.refs)),
        ):
            idle = used == 0 and (self.boxes_used or self.refs_used)
            if used != given and not idle:
                raise ValueError(f"{used} {placeholder} for {given} in `objects`; give each placeholder its object")


def read_objects(value: Any) -> Objects:
    """v2: a list of {caption, bbox, bbox_type, image}, often as a JSON string; v3: {ref, bbox, bbox_type, image_id}."""
    if isinstance(value, str):
        if not value.strip():
            return Objects()
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(f"`objects` is a string that holds no JSON ({error})") from None
    if not value:
        return Objects()
    if isinstance(value, dict):
        return _from_dict(value)
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        return _from_list(value)
    raise ValueError("`objects` is a list of {caption, bbox, bbox_type, image}, or {ref, bbox, bbox_type}")


def _from_list(items: list[dict[str, Any]]) -> Objects:
    boxes = []
    for item in items:
        _refuse_second_picture(item.get("image", 0))
        if "bbox" not in item:
            raise ValueError("an object of `objects` has no bbox; give it bbox [x1, y1, x2, y2]")
        boxes.append(_regions(item["bbox"], item.get("bbox_type", "real")))
    return Objects(boxes, _labels([item["caption"] for item in items if "caption" in item]))


def _from_dict(value: dict[str, Any]) -> Objects:
    bbox, ref, image_id = (_list(value, key) for key in ("bbox", "ref", "image_id"))
    for index in image_id:
        _refuse_second_picture(index)
    bbox_type = value.get("bbox_type") or "real"
    return Objects([_regions(box, bbox_type) for box in bbox], _labels(ref))


def _list(value: dict[str, Any], key: str) -> list[Any]:
    found = value.get(key)
    if found is not None and not isinstance(found, list):
        raise ValueError(f"`{key}` of `objects` is a list, not {str(found)[:40]}")
    return found or []


def _regions(bbox: Any, bbox_type: Any) -> list[Region]:
    if not isinstance(bbox_type, str) or bbox_type not in _BBOX_TYPES:
        raise ValueError(f"unknown bbox_type {bbox_type!r}; known are {', '.join(_BBOX_TYPES)}")
    factor, space = _BBOX_TYPES[bbox_type]
    several = isinstance(bbox, list) and bool(bbox) and all(isinstance(box, list) for box in bbox)
    regions = []
    for box in bbox if several else [bbox]:
        points = numbers(box, "a bbox")
        if len(points) not in (2, 4):
            raise ValueError(f"a bbox has 4 numbers, x1, y1, x2, y2, or a point's 2, not {len(points)}")
        regions.append(Region(tuple(point * factor for point in points), space))
    return regions


def _labels(refs: list[Any]) -> list[str]:
    if not all(isinstance(ref, str) for ref in refs):
        raise ValueError("a label in `objects` (caption, ref) is text")
    return refs


def _refuse_second_picture(index: Any) -> None:
    if index != 0:
        raise ValueError(f"a bbox is of picture {index!r}, but Florence-2 takes one picture, 0, a sample")
