"""The table of formats that are read as they are, and how one is recognised."""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from florence2.locations import Size
from florence2_data.chats import read_conversations, read_messages, read_prefix, read_queries
from florence2_data.coco import read_coco
from florence2_data.picture_files import missing, upright_size
from florence2_data.record import Example, Problem, Region, Sample, example
from florence2_data.rows import rows
from florence2_data.voc import find_voc, read_voc
from florence2_data.yolo import find_yolo, read_yolo

Read = Iterator[Sample | Problem]
Heads = dict[Path, frozenset[str]]
"""Each .jsonl and .json file, with the keys of the first row that can be read; of a COCO file COCO_HEAD."""
COCO_HEAD = frozenset({"one object with images and annotations"})


@dataclass(frozen=True)
class Format:
    name: str
    looks_like: str
    find: Callable[[Path, Heads], dict[str, Path]]
    """Split name -> what `read` gets, for a file or folder of this format and the heads of its files; empty for any
    other."""
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
    heads = _heads(path)
    for candidate in [FORMATS[format]] if format else FORMATS.values():
        if found := candidate.find(path, heads):
            if format is None:
                _refuse_others(candidate, found, heads)
            return [Split(name, candidate.name, place, images) for name, place in found.items()]
    if format and path.is_file():
        return [Split(_stem(path), format, path, images)]
    known = "".join(f"\n  {each.name}: {each.looks_like}" for each in FORMATS.values())
    as_what = f"no data set of the format {format}" if format else "no data set of a known format"
    raise ValueError(f"{path} is {as_what}; it can be{known}")


def open_split(path: Path, format: str | None, images: Path | None, name: str | None, option: str = "--split") -> Split:
    """The split called `name`, or the only one. Raises ValueError, naming `option`, where that is not one of them, and
    what `open_data` raises."""
    splits = {split.name: split for split in open_data(path, format, images)}
    if name is None and len(splits) == 1:
        return next(iter(splits.values()))
    if name not in splits:
        raise ValueError(f"{path} has the splits {', '.join(splits)}; say which with {option}")
    return splits[name]


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


def _heads(path: Path) -> Heads:
    """Of the file itself; of a folder's files, or of those in its train/, valid/, test/."""
    if path.is_file():
        return {path: _head(path)} if path.suffix in (".jsonl", ".json") else {}
    named = [file for folder in _FOLDERS for name in _NAMED_BY_FOLDER if (file := path / folder / name).is_file()]
    inside = [file for ending in ("*.jsonl", "*.json") for file in sorted(path.glob(ending))]
    return {file: _head(file) for file in named or inside}


def _head(path: Path) -> frozenset[str]:
    if path.suffix == ".json" and _is_coco(path):
        return COCO_HEAD
    first = next((row for row in islice(rows(path), 100) if not isinstance(row, Problem)), None)
    return frozenset(first[1]) if first else frozenset()


def _refuse_others(recognised: Format, found: dict[str, Path], heads: Heads) -> None:
    """Raises ValueError for files that would be passed over, though they look like samples too."""
    passed = [
        file.name
        for file in heads.keys() - found.values()
        if file.suffix == ".jsonl" or any(each.find(file, {file: heads[file]}) for each in FORMATS.values())
    ]
    # Beside a folder of labels or of XML files, lines are somebody's notes.
    if passed and heads.keys() & found.values():
        read = ", ".join(sorted(path.name for path in found.values()))
        raise ValueError(
            f"{read} is of the format {recognised.name}, {', '.join(sorted(passed))} beside it is not; name one file, "
            f"or the format {recognised.name} to read its files alone"
        )


def _is_coco(path: Path) -> bool:
    """By what it begins with: the file may be of any length."""
    with path.open("rb") as file:
        head = file.read(1 << 16).decode("utf-8-sig", "ignore").strip()
    if not head.startswith("{"):
        return False
    try:
        row = json.loads(head.split("\n")[0])
    except ValueError:
        # One object over many lines, or a line longer than this.
        return any(f'"{key}"' in head for key in ("images", "annotations", "categories", "info"))
    return "images" in row and "annotations" in row


def _with(keys: frozenset[str]) -> Callable[[Path, Heads], dict[str, Path]]:
    """Finds the files whose head has `keys`. Raises ValueError where two give the same split."""

    def find(path: Path, heads: Heads) -> dict[str, Path]:
        found: dict[str, Path] = {}
        for file, head in heads.items():
            if keys <= head and found.setdefault(_stem(file), file) != file:
                raise ValueError(
                    f"{path} has the split {_stem(file)} twice, as {found[_stem(file)].name} and {file.name}; name one "
                    "of them, or take one out"
                )
        return found

    return find


def _find_voc(path: Path, _: Heads) -> dict[str, Path]:
    """A data set, or a folder train/, valid/, test/ of them."""
    if found := find_voc(path):
        return found
    return {name: place for name in _FOLDERS for place in find_voc(path / name).values()}


def _find_yolo(path: Path, _: Heads) -> dict[str, Path]:
    return find_yolo(path)


def _without_name(read: Callable[[Path, Path | None], Read]) -> Callable[[Path, Path | None, str], Read]:
    return lambda path, images, _: read(path, images)


FORMATS: dict[str, Format] = {
    each.name: each
    for each in (
        Format(
            "prefix",
            'JSON lines {"image", "prefix", "suffix"}, or a folder of train/annotations.jsonl, … (maestro, TF-ID)',
            _with(frozenset({"image", "prefix", "suffix"})),
            _without_name(read_prefix),
        ),
        Format(
            "query",
            'JSON lines or array {"query", "response", "images"}, with history and objects (ms-swift v2)',
            _with(frozenset({"query", "response"})),
            _without_name(read_queries),
        ),
        Format(
            "messages",
            'JSON lines or array {"messages": [{"role", "content"}], "images"}, objects (ms-swift v3, LLaMA-Factory)',
            _with(frozenset({"messages"})),
            _without_name(read_messages),
        ),
        Format(
            "conversations",
            'JSON lines or array {"conversations": [{"from", "value"}]} (Qwen-VL, sharegpt)',
            _with(frozenset({"conversations"})),
            _without_name(read_conversations),
        ),
        Format(
            "coco",
            "a .json file with images and annotations, or a folder of train/_annotations.coco.json, … (Roboflow)",
            _with(COCO_HEAD),
            _without_name(read_coco),
        ),
        Format("yolo", "data.yaml, or a folder with images/, labels/ and classes.txt", _find_yolo, read_yolo),
        Format(
            "voc",
            "a folder with Annotations/*.xml and JPEGImages/, or with .xml files beside the pictures",
            _find_voc,
            _without_name(read_voc),
        ),
    )
}
"""All formats by name, in the order in which they are tried."""
