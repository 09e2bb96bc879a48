"""The table of formats that are read as they are, and how one is recognised."""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from florence2.locations import Size
from florence2_training.data.chats import read_conversations, read_messages, read_prefix, read_queries
from florence2_training.data.coco import read_coco
from florence2_training.data.pictures import missing, upright_size
from florence2_training.data.record import Example, Problem, Region, Sample, example
from florence2_training.data.rows import rows
from florence2_training.data.voc import find_voc, read_voc
from florence2_training.data.yolo import find_yolo, read_yolo

Read = Iterator[Sample | Problem]


@dataclass(frozen=True)
class Format:
    name: str
    looks_like: str
    find: Callable[[Path], dict[str, Path]]
    """Split name -> what `read` gets, for a file or folder of this format; empty for any other."""
    read: Callable[[Path, Path | None, str], Read]
    """Of a path that `find` gave, the folder that relative picture paths start from, and the split's name."""


@dataclass(frozen=True)
class Split:
    name: str
    format: str
    path: Path
    images: Path | None
    """Folder that relative picture paths start from; None: where the format has them, else the file's folder."""

    def read(self) -> Read:
        """Streams; what can't be used comes as a Problem. Raises ValueError if nothing of it can be read."""
        return FORMATS[self.format].read(self.path, self.images, self.name)


def open_data(path: Path, format: str | None = None, images: Path | None = None) -> list[Split]:
    """The splits of a file or folder. Raises ValueError with what to do."""
    path = path.absolute()
    if format is not None and format not in FORMATS:
        raise ValueError(f"unknown format {format}; known are {', '.join(FORMATS)}")
    if not path.exists():
        raise ValueError(f"{path} is missing; name a file or folder of samples")
    if images is not None and not images.is_dir():
        raise ValueError(f"{images} is no folder; --images names the folder that picture paths start from")
    images = images and images.absolute()
    for candidate in [FORMATS[format]] if format else FORMATS.values():
        if found := candidate.find(path):
            return [Split(name, candidate.name, place, images) for name, place in found.items()]
    if format and path.is_file():
        return [Split(_stem(path), format, path, images)]
    known = "".join(f"\n  {each.name}: {each.looks_like}" for each in FORMATS.values())
    as_what = f"no data set of the format {format}" if format else "no data set of a known format"
    raise ValueError(f"{path} is {as_what}; it can be{known}")


def examples(split: Split) -> Iterator[Example | Problem]:
    """The split in the words of the model; a missing picture is a Problem."""
    size_of = SizeOf()
    for sample in split.read():
        yield sample if isinstance(sample, Problem) else resolve(sample, size_of)


class SizeOf:
    """`upright_size`, which remembers the last picture: its other samples are next to each other."""

    def __init__(self) -> None:
        self.last: tuple[Path, Size] | None = None

    def __call__(self, path: Path) -> Size:
        if self.last is None or self.last[0] != path:
            self.last = path, upright_size(path)
        return self.last[1]


def resolve(sample: Sample, size_of: Callable[[Path], Size]) -> Example | Problem:
    """Opens the picture's header only where pixels have to become bins."""
    if not sample.needs_size():
        if not os.path.isfile(sample.image):
            return Problem(sample.where, missing(sample.image))
        # The size has no part in what is not in pixels.
        return _speakable(example(sample, (1000, 1000)))
    try:
        size = size_of(sample.image)
    except ValueError as error:
        return Problem(sample.where, str(error))
    if sample.stated_size and sample.stated_size != size:
        return Problem(
            sample.where,
            f"boxes are of a picture of {_by(sample.stated_size)}, {sample.image} has {_by(size)} (upright, as EXIF "
            "says); annotate this picture or bring back that one",
        )
    return _speakable(example(sample, size))


def _speakable(found: Example) -> Example | Problem:
    """JSON can hold halves of characters, which no tokenizer takes."""
    try:
        (found.prefix + found.suffix).encode()
    except UnicodeEncodeError:
        return Problem(found.where, r"half a surrogate pair (\ud800 to \udfff) is no character; take it out")
    return found


def regions(sample: Sample) -> list[Region]:
    return [part for part in (*sample.prompt, *sample.answer) if isinstance(part, Region)]


def _by(size: Size) -> str:
    return f"{size[0]} x {size[1]}"


def _stem(path: Path) -> str:
    return path.parent.name if path.name in _NAMED_BY_FOLDER else path.stem


_NAMED_BY_FOLDER = ("annotations.jsonl", "_annotations.coco.json")
_FOLDERS = ("train", "valid", "val", "test")


def _with(*keys: str) -> Callable[[Path], bool]:
    """Whether the first row that can be read has `keys`."""

    def check(path: Path) -> bool:
        if path.suffix == ".json" and _is_coco(path):
            return False
        first = next((row for row in islice(rows(path), 100) if not isinstance(row, Problem)), None)
        return first is not None and all(key in first[1] for key in keys)

    return check


def _is_coco(path: Path) -> bool:
    """By what it begins with: the file may be of any length."""
    if path.suffix != ".json":
        return False
    with path.open("rb") as file:
        head = file.read(1 << 16).decode("utf-8-sig", "ignore").strip()
    if not head.startswith("{"):
        return False
    try:
        row = json.loads(head.splitlines()[0])
    except ValueError:
        # One object over many lines, or a line longer than this.
        return any(f'"{key}"' in head for key in ("images", "annotations", "categories", "info"))
    return "images" in row and "annotations" in row


def _in_files(check: Callable[[Path], bool]) -> Callable[[Path], dict[str, Path]]:
    """Looks at the file itself; in a folder at its .jsonl and .json files, or at those of its train/, valid/, test/."""

    def find(path: Path) -> dict[str, Path]:
        if path.is_file():
            return {_stem(path): path} if path.suffix in (".jsonl", ".json") and check(path) else {}
        named = {
            folder: file for folder in _FOLDERS for name in _NAMED_BY_FOLDER if (file := path / folder / name).is_file()
        }
        inside = [file for ending in ("*.jsonl", "*.json") for file in sorted(path.glob(ending))]
        files = named or {_stem(file): file for file in inside}
        return {name: file for name, file in files.items() if check(file)}

    return find


def _or_in_folders(find: Callable[[Path], dict[str, Path]]) -> Callable[[Path], dict[str, Path]]:
    """A data set, or a folder train/, valid/, test/ of them."""

    def in_folders(path: Path) -> dict[str, Path]:
        if found := find(path):
            return found
        return {name: place for name in _FOLDERS for place in find(path / name).values()}

    return in_folders


def _without_name(read: Callable[[Path, Path | None], Read]) -> Callable[[Path, Path | None, str], Read]:
    return lambda path, images, _: read(path, images)


FORMATS: dict[str, Format] = {
    each.name: each
    for each in (
        Format(
            "prefix",
            'JSON lines {"image", "prefix", "suffix"}, or a folder of train/annotations.jsonl, … (maestro, TF-ID)',
            _in_files(_with("image", "prefix", "suffix")),
            _without_name(read_prefix),
        ),
        Format(
            "query",
            'JSON lines or array {"query", "response", "images"}, with history and objects (ms-swift v2)',
            _in_files(_with("query", "response")),
            _without_name(read_queries),
        ),
        Format(
            "messages",
            'JSON lines or array {"messages": [{"role", "content"}], "images"}, objects (ms-swift v3, LLaMA-Factory)',
            _in_files(_with("messages")),
            _without_name(read_messages),
        ),
        Format(
            "conversations",
            'JSON lines or array {"conversations": [{"from", "value"}]} (Qwen-VL, sharegpt)',
            _in_files(_with("conversations")),
            _without_name(read_conversations),
        ),
        Format(
            "coco",
            "a .json file with images and annotations, or a folder of train/_annotations.coco.json, … (Roboflow)",
            _in_files(_is_coco),
            _without_name(read_coco),
        ),
        Format("yolo", "data.yaml, or a folder with images/, labels/ and classes.txt", find_yolo, read_yolo),
        Format(
            "voc",
            "a folder with Annotations/*.xml and JPEGImages/, or with .xml files beside the pictures",
            _or_in_folders(find_voc),
            _without_name(read_voc),
        ),
    )
}
"""All formats by name, in the order in which they are tried."""
