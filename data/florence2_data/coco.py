"""COCO: detection as `<OD>`, captions as `<CAPTION>`, and Roboflow's folders of it."""

import json
import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from florence2_data.markup import numbers
from florence2_data.record import Problem, Region, Sample, Text


def read_coco(path: Path, images: Path | None) -> Iterator[Sample | Problem]:
    """Raises ValueError for a file that is no COCO as a whole."""
    try:
        content = json.loads(path.read_bytes())
        pictures, annotations, categories = content["images"], content["annotations"], content.get("categories", [])
        whole = all(isinstance(row, dict) for row in (*pictures, *annotations, *categories))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        whole = False
    if not whole:
        raise ValueError(f"{path}: no COCO file; it needs the lists images and annotations")
    folders = [images] if images else [path.parent, path.parent / "images"]
    by_picture: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for annotation in annotations:
        by_picture[_key(annotation.get("image_id"))].append(annotation)
    captions = any("caption" in annotation for annotation in annotations)
    labels = {_key(row.get("id")): row.get("name") for row in categories}
    for picture in pictures:
        mine = by_picture.pop(_key(picture.get("id")), [])
        where = f"{path.name}:image {picture.get('id')}"
        name = picture.get("file_name")
        if not isinstance(name, str) or not name:
            yield Problem(where, "no file_name; name the picture's file")
            continue
        image = next((folder / name for folder in folders if os.path.isfile(folder / name)), folders[0] / name)
        if captions:
            yield from _captions(mine, image, path)
        else:
            yield _detection(mine, labels, picture, image, where)
    for image_id, homeless in by_picture.items():
        yield Problem(
            f"{path.name}:annotation {homeless[0].get('id')}",
            f"image_id {image_id} is in no row of images ({len(homeless)} annotations); add that row or remove them",
        )


def _captions(annotations: list[dict[str, Any]], image: Path, path: Path) -> Iterator[Sample | Problem]:
    for annotation in annotations:
        where = f"{path.name}:annotation {annotation.get('id')}"
        caption = annotation.get("caption")
        if isinstance(caption, str) and caption.strip():
            yield Sample(image, ("<CAPTION>",), (caption.strip(),), where)
        else:
            yield Problem(where, "no caption; write one or remove the annotation")


def _detection(
    annotations: list[dict[str, Any]], labels: dict[str, Any], picture: dict[str, Any], image: Path, where: str
) -> Sample | Problem:
    answer: list[str | Region] = []
    for annotation in annotations:
        if annotation.get("iscrowd"):
            continue
        try:
            answer += _box(annotation, labels)
        except ValueError as error:
            # Without one of its boxes the picture would teach that there is nothing.
            return Problem(where, f"annotation {annotation.get('id')}: {error}; the picture is left out")
    width, height = picture.get("width"), picture.get("height")
    stated = (width, height) if isinstance(width, int) and isinstance(height, int) and width and height else None
    return Sample(image, ("<OD>",), tuple(answer), where, stated)


def _box(annotation: dict[str, Any], labels: dict[str, Any]) -> Text:
    label = labels.get(_key(annotation.get("category_id")))
    if not isinstance(label, str):
        raise ValueError(f"category_id {annotation.get('category_id')!r} is in no row of categories; add it there")
    if not label.strip():
        raise ValueError(f"category_id {annotation.get('category_id')!r} has an empty name; name it")
    box = numbers(annotation.get("bbox"), "bbox")
    if len(box) != 4:
        raise ValueError(f"bbox has 4 numbers, x, y, width, height, not {len(box)}")
    x, y, width, height = box
    return label, Region((x, y, x + width, y + height), written=f"bbox {annotation['bbox']}")


def _key(number: Any) -> str:
    """An id, of whatever kind, to look rows up by."""
    return json.dumps(number)
