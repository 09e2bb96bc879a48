"""Pascal VOC: one XML file a picture, boxes 1-based with both ends in them."""

import os
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from florence2_training.data.markup import numbers
from florence2_training.data.pictures import SUFFIXES
from florence2_training.data.record import Problem, Region, Sample

_EDGES = (("xmin", -1), ("ymin", -1), ("xmax", 0), ("ymax", 0))
"""Pixels are counted from 1: the box's edges are left of the first pixel and right of the last (detectron2's
`load_voc_instances`)."""


def find_voc(path: Path) -> dict[str, Path]:
    """Split name -> an ImageSets list, or a folder of XML files; empty if this is no VOC data set."""
    folder = path / "Annotations" if (path / "Annotations").is_dir() else path
    if not folder.is_dir() or next(folder.glob("*.xml"), None) is None:
        return {}
    lists = {name: path / "ImageSets" / "Main" / f"{name}.txt" for name in ("train", "val", "test")}
    return {name: file for name, file in lists.items() if file.is_file()} or {path.name: path}


def read_voc(path: Path, images: Path | None) -> Iterator[Sample | Problem]:
    root = path.parents[2] if path.is_file() else path
    folder = root / "Annotations" if (root / "Annotations").is_dir() else root
    if path.is_file():
        stems = [line.split()[0] for line in path.read_text("utf-8").splitlines() if line.strip()]
        files = [folder / f"{stem}.xml" for stem in stems]
    else:
        files = sorted(folder.glob("*.xml"))
    for file in files:
        try:
            yield _sample(file, [images] if images else [root / "JPEGImages", folder])
        except ValueError as error:
            yield Problem(file.name, str(error))


class _NoDoctype(ElementTree.TreeBuilder):
    def doctype(self, *_: object) -> None:
        # Entities are declared there, and could grow without end.
        raise ValueError("it has a DOCTYPE; take that out")


def _sample(file: Path, folders: list[Path]) -> Sample:
    if not file.is_file():
        raise ValueError("the annotation is missing; put it there or take it off the list")
    try:
        root = ElementTree.fromstring(file.read_bytes(), ElementTree.XMLParser(target=_NoDoctype()))
    except ElementTree.ParseError as error:
        raise ValueError(f"no XML ({error}); repair it") from None
    answer: list[str | Region] = []
    for thing in root.iter("object"):
        label, box = (thing.findtext("name") or "").strip(), thing.find("bndbox")
        if box is None:
            raise ValueError("an object has no bndbox; add xmin, ymin, xmax, ymax")
        answer += [label, Region(tuple(_number(box, name) + shift for name, shift in _EDGES))]
    sides = [root.findtext(f"size/{side}") or "" for side in ("width", "height")]
    stated = (int(sides[0]), int(sides[1])) if all(side.isdecimal() and int(side) for side in sides) else None
    return Sample(_picture(root.findtext("filename"), file, folders), ("<OD>",), tuple(answer), file.name, stated)


def _number(box: ElementTree.Element, name: str) -> float:
    try:
        return numbers([float(box.findtext(name) or "")], name)[0]
    except ValueError:
        raise ValueError(f"bndbox has no number {name}") from None


def _picture(name: str | None, file: Path, folders: list[Path]) -> Path:
    names = [name.strip()] if name and name.strip() else []
    names += [file.stem + suffix for suffix in SUFFIXES]
    places = [folder / each for folder in folders for each in names]
    return next((place for place in places if os.path.isfile(place)), places[0])
