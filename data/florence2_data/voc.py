"""Pascal VOC: one XML file a picture, boxes 1-based with both ends in them."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from florence2.images import SUFFIXES
from florence2_data.markup import numbers
from florence2_data.record import Problem, Region, Sample

_EDGES = (("xmin", -1), ("ymin", -1), ("xmax", 0), ("ymax", 0))
"""Pixels are counted from 1: the box's edges are left of the first pixel and right of the last (detectron2's
`load_voc_instances`)."""
_PRESENCE = re.compile(r"\s+(?:1|-1|0)$")
"""Behind a name in the list of one class: whether the picture has it."""


def find_voc(path: Path) -> dict[str, Path]:
    """Split name -> an ImageSets list, or a folder of XML files; empty if this is no VOC data set."""
    folder = path / "Annotations" if (path / "Annotations").is_dir() else path
    if not folder.is_dir() or next(folder.glob("*.xml"), None) is None:
        return {}
    lists = {name: path / "ImageSets" / "Main" / f"{name}.txt" for name in ("train", "val", "test")}
    return {name: file for name, file in lists.items() if file.is_file()} or {path.name: path}


def read_voc(path: Path, images: Path | None) -> Iterator[Sample | Problem]:
    """Boxes of a file whose pixels are counted from 0, as an xmin or ymin of 0 shows, are taken as they are."""
    root = path.parents[2] if path.is_file() else path
    folder = root / "Annotations" if (root / "Annotations").is_dir() else root
    if path.is_file():
        lines = map(str.strip, path.read_text("utf-8").split("\n"))
        files = [_listed(folder, line) for line in lines if line]
    else:
        files = sorted(folder.glob("*.xml"))
    for file in files:
        try:
            yield _sample(file, [images] if images else [root / "JPEGImages", folder])
        except ValueError as error:
            yield Problem(file.name, str(error))


def _listed(folder: Path, line: str) -> Path:
    whole = folder / f"{line}.xml"
    return whole if whole.is_file() else folder / f"{_PRESENCE.sub('', line)}.xml"


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
    things = [_thing(thing) for thing in root.iter("object")]
    from_one = all(min(edges[:2]) >= 1 for _, edges in things)
    answer = tuple(part for label, edges in things for part in (label, _region(edges, from_one)))
    sides = [root.findtext(f"size/{side}") or "" for side in ("width", "height")]
    stated = (int(sides[0]), int(sides[1])) if all(side.isdecimal() and int(side) for side in sides) else None
    return Sample(_picture(root.findtext("filename"), file, folders), ("<OD>",), answer, file.name, stated)


def _thing(thing: ElementTree.Element) -> tuple[str, list[float]]:
    """Its label and the numbers of its box."""
    label, box = (thing.findtext("name") or "").strip(), thing.find("bndbox")
    if not label:
        raise ValueError("an object has no name; name it")
    if box is None:
        raise ValueError("an object has no bndbox; add xmin, ymin, xmax, ymax")
    return label, [_number(box, name) for name, _ in _EDGES]


def _region(edges: list[float], from_one: bool) -> Region:
    shifts = [shift * from_one for _, shift in _EDGES]
    written = ", ".join(f"{name} {edge:g}" for (name, _), edge in zip(_EDGES, edges, strict=True))
    return Region(tuple(edge + shift for edge, shift in zip(edges, shifts, strict=True)), written=written)


def _number(box: ElementTree.Element, name: str) -> float:
    try:
        return numbers([float(box.findtext(name) or "")], name)[0]
    except ValueError:
        raise ValueError(f"bndbox has no number {name}") from None


def _picture(name: str | None, file: Path, folders: list[Path]) -> Path:
    names = [name.strip()] if name and name.strip() else []
    names += [file.stem + suffix for lower in SUFFIXES for suffix in (lower, lower.upper())]
    places = [folder / each for folder in folders for each in names]
    return next((place for place in places if os.path.isfile(place)), places[0])
