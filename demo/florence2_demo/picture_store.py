"""The training's pictures, drawn once and kept in a folder: picture files at the model's side, and the truths."""

import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from florence2.locations import Size
from florence2_demo.generators import TRAINING, draw
from florence2_demo.model import SIDE
from florence2_demo.things import Thing

# Half are words: reading is what takes the vision tower longest to learn.
PATTERN = ("scene", "word", "page", "word")


def kind_of(index: int) -> str:
    return PATTERN[index % len(PATTERN)]


@dataclass(frozen=True)
class Truth:
    kind: str
    size: Size
    things: tuple[Thing, ...]


@dataclass(frozen=True)
class Gallery:
    folder: Path
    truths: list[Truth]

    def file(self, index: int) -> str:
        return str(_file(self.folder, index))

    def files(self, indices: Sequence[int]) -> list[str]:
        return [self.file(index) for index in indices]


def draw_gallery(folder: Path, count: int, seed: int, processes: int) -> None:
    if (folder / "truths.json").exists():
        return
    with ProcessPoolExecutor(processes) as pool:
        drawn = pool.map(partial(_draw_one, folder, seed), range(count), chunksize=64)
        truths = [asdict(truth) for truth in tqdm(drawn, "pictures", count, disable=None)]
    (folder / "truths.new").write_text(json.dumps(truths))
    (folder / "truths.new").replace(folder / "truths.json")


def open_gallery(folder: Path) -> Gallery:
    truths = []
    for truth in json.loads((folder / "truths.json").read_text()):
        things = tuple(
            Thing(**{**thing, "box": tuple(thing["box"]), "letters": tuple(map(tuple, thing["letters"]))})
            for thing in truth["things"]
        )
        truths.append(Truth(truth["kind"], tuple(truth["size"]), things))
    return Gallery(folder, truths)


def _draw_one(folder: Path, seed: int, index: int) -> Truth:
    picture = draw(kind_of(index), seed, TRAINING, index)
    path = _file(folder, index)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.image.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(path, compress_level=1)
    return Truth(picture.kind, picture.image.size, picture.things)


def _file(folder: Path, index: int) -> Path:
    return folder / "pictures" / f"{index // 1000:03}" / f"{index:06}.png"
