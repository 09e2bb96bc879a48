"""YOLO: data.yaml, or images/ beside labels/; boxes and polygons in parts of the picture."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from florence2.images import SUFFIXES
from florence2_data.record import Problem, Region, Sample, Text

_SPLITS = ("train", "val", "valid", "test")
_YAMLS = ("data.yaml", "data.yml", "dataset.yaml")


@dataclass(frozen=True)
class _Classes:
    names: dict[int, str]
    keypoints: bool
    """Whether points stand behind the four numbers of a box."""


def find_yolo(path: Path) -> dict[str, Path]:
    """Split name -> the file or folder to read it from; empty if this is no YOLO data set."""
    if path.is_file() and path.suffix in (".yaml", ".yml"):
        return _splits(path)
    config = next((path / name for name in _YAMLS if (path / name).is_file()), None)
    if config and (splits := _splits(config)):
        return splits
    if not ((path / "images").is_dir() and (path / "labels").is_dir()):
        return {}
    inner = [name for name in _SPLITS if (path / "images" / name).is_dir()]
    return {name: path / "images" / name for name in inner} or {path.name: path / "images"}


def read_yolo(path: Path, images: Path | None, split: str) -> Iterator[Sample | Problem]:
    """`path`: data.yaml, or a folder of pictures. Raises ValueError where class names or label files are missing."""
    if path.is_file():
        config = _config(path)
        classes = _classes(config, path)
        pictures = list(_of_config(config, path, images, split))
    else:
        classes = _classes_near(path)
        pictures = _in_folder(images or path)
    if pictures and not any(_labels_of(picture).is_file() for picture in pictures):
        raise ValueError(
            f"{path}: no picture of {split} has a label file; that of {pictures[0].name} would be "
            f"{_labels_of(pictures[0])}; put them there, or take the split out"
        )
    for picture in pictures:
        labels = _labels_of(picture)
        answer = _answer(labels, classes)
        yield answer if isinstance(answer, Problem) else Sample(picture, ("<OD>",), answer, labels.name)


def _answer(labels: Path, classes: _Classes) -> Text | Problem:
    if not labels.is_file():
        return ()
    answer: list[str | Region] = []
    for number, line in enumerate(labels.read_text("utf-8", "replace").split("\n"), 1):
        try:
            answer += _box(line, classes) if line.strip() else ()
        except ValueError as error:
            return Problem(f"{labels.name}:{number}", str(error))
    return tuple(answer)


def _box(line: str, classes: _Classes) -> Text:
    try:
        kind, *values = map(float, line.split())
    except ValueError:
        raise ValueError(f"not numbers: {line[:60]!r}; write: class cx cy w h") from None
    if not classes.names.get(int(kind) if kind.is_integer() else -1):
        raise ValueError(f"class {kind:g} has no name; add it to the names")
    return classes.names[int(kind)], Region(_corners(values[:4] if classes.keypoints else values), (1000, 1000))


def _corners(values: list[float]) -> tuple[float, ...]:
    if len(values) == 4:
        cx, cy, w, h = values
        edges = (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)
    elif len(values) >= 6 and len(values) % 2 == 0:
        xs, ys = values[0::2], values[1::2]
        edges = (min(xs), min(ys), max(xs), max(ys))
    else:
        raise ValueError(f"{len(values)} numbers behind the class; a box has 4, cx cy w h, a polygon x y pairs")
    if not all(abs(edge) < 1e6 for edge in edges):
        raise ValueError("coordinates are no numbers from 0 to 1; write parts of the picture")
    # Thousandths; 0.3 - 0.1 is 0.19999…, which is in another bin than the 0.2 that was meant.
    return tuple(round(edge * 1000, 6) for edge in edges)


def _config(path: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: no YAML ({' '.join(str(error).split())})") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: no YOLO data set; it needs names, train and val")
    return config


def _of_config(config: dict[str, Any], path: Path, images: Path | None, split: str) -> Iterator[Path]:
    if not config.get(split):
        raise ValueError(f"{path}: no YOLO data set; it needs names, train and val")
    root = images or path.parent / str(config.get("path") or "")
    entries = config[split] if isinstance(config[split], list) else [config[split]]
    for entry in entries:
        place = root / str(entry)
        if not place.exists():
            # Roboflow writes ../train/images for the train/images beside data.yaml.
            place = path.parent / str(entry).removeprefix("../")
        if place.is_dir():
            yield from _in_folder(place)
        elif place.is_file():
            for line in place.read_text("utf-8").split("\n"):
                if line.strip():
                    yield place.parent / line.strip()
        else:
            raise ValueError(f"{path}: {split} is {entry}, which is not there; correct it or `path`")


def _in_folder(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES)


def _labels_of(picture: Path) -> Path:
    # As ultralytics: the last images/ of the path becomes labels/.
    parts = list(picture.parts)
    for index in range(len(parts) - 2, -1, -1):
        if parts[index] == "images":
            parts[index] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


def _splits(config: Path) -> dict[str, Path]:
    content = _config(config)
    return {name: config for name in _SPLITS if content.get(name)}


def _classes_near(folder: Path) -> _Classes:
    for place in list(folder.parents)[:2]:
        for name in _YAMLS:
            if (place / name).is_file():
                return _classes(_config(place / name), place / name)
        for inner in (place, place / "labels"):
            if (inner / "classes.txt").is_file():
                names = (inner / "classes.txt").read_text("utf-8").rstrip().split("\n")
                return _classes({"names": names}, inner / "classes.txt")
    raise ValueError(f"{folder}: class names are missing; put data.yaml or classes.txt beside images/ and labels/")


def _classes(config: dict[str, Any], path: Path) -> _Classes:
    names = config.get("names")
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, dict) or not all(str(number).isdecimal() for number in names):
        raise ValueError(f"{path}: names is a list of class names, or a table number: name")
    named = {int(number): "" if name is None else str(name).strip() for number, name in names.items()}
    return _Classes(named, "kpt_shape" in config)
