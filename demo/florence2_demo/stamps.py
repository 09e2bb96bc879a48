"""A task that the demo checkpoint does not know, stamps on pages, in ms-swift's format; and tasks that it knows."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw

from florence2_demo.generators import HELD_OUT, KINDS, TRAINING, Picture, draw
from florence2_demo.samples import TASKS_OF, answer
from florence2_demo.things import Thing, box_of, font, jittered, overlap
from florence2_demo.words import COLOURS, TRAINING_WORDS

STAMP = "stamp"
_INKS = ("red", "blue", "purple", "green")
_MOST = 3
"""Stamps on a page; one page in five has none."""


def draw_stamped(seed: int, split: int, index: int) -> Picture:
    """The page that `draw` gives for the same arguments, with stamps on it."""
    page = draw("page", seed, split, index)
    rng = np.random.default_rng([seed, split, len(KINDS), index])
    image, things = page.image.copy(), list(page.things)
    for _ in range(int(rng.choice(_MOST + 1, p=(0.2, 0.35, 0.25, 0.2)))):
        stamp = _stamp(rng, image, things)
        if stamp:
            things.append(stamp)
    return Picture("page", image, tuple(sorted(things, key=lambda thing: thing.box[0] + thing.box[1])))


def _stamp(rng: Generator, image: Image.Image, others: list[Thing]) -> Thing | None:
    """A round seal, turned: two rings, a word across. None where no free place was found."""
    side = int(min(image.size) * rng.uniform(0.28, 0.42))
    colour = str(rng.choice(_INKS))
    for _ in range(20):
        left, top = (int(rng.integers(2, extent - side - 2)) for extent in image.size)
        if all(overlap((left, top, left + side, top + side), other.box) < 0.05 for other in others):
            seal = Image.new("L", image.size)
            seal.paste(_seal(rng, side), (left, top))
            image.paste(jittered(rng, COLOURS[colour]), (0, 0), seal)
            return Thing(STAMP, box_of(seal))
    return None


def _seal(rng: Generator, side: int) -> Image.Image:
    seal = Image.new("L", (side, side))
    pen = ImageDraw.Draw(seal)
    pen.ellipse((0, 0, side - 1, side - 1), outline=255, width=max(side // 16, 2))
    inner = side * 0.2
    pen.ellipse((inner, inner, side - 1 - inner, side - 1 - inner), outline=255, width=max(side // 32, 1))
    text, size = str(rng.choice(TRAINING_WORDS)), max(side // 6, 8)
    pen.rectangle((side * 0.06, side / 2 - size * 0.7, side * 0.94, side / 2 + size * 0.7), fill=0)
    pen.text((side / 2, side / 2), text, 255, font(size), anchor="mm")
    return seal.rotate(float(rng.uniform(-40, 40)), Image.Resampling.BICUBIC)


_SPLITS = (("train", TRAINING, 4000), ("valid", HELD_OUT, 100), ("test", HELD_OUT, 300))
_SEED = 2027


def write_all(folder: Path, scale: float) -> Iterator[tuple[Path, int]]:
    """train.jsonl, valid.jsonl and test.jsonl with stamps; replay.jsonl and known.jsonl, samples of what the demo
    checkpoint knows, to train with and to test."""
    for place, (name, split, count) in enumerate(_SPLITS):
        yield folder / f"{name}.jsonl", _write_stamps(folder, name, round(count * scale), _SEED + place, split)
    for name, split, count in (("replay", TRAINING, 16000), ("known", HELD_OUT, 1500)):
        yield folder / f"{name}.jsonl", _write_known(folder, name, round(count * scale), _SEED, split)


def _write_stamps(folder: Path, name: str, count: int, seed: int, split: int) -> int:
    """NAME.jsonl and its pictures: `<OD>` with every table, figure and stamp, as ms-swift 2 writes boxes in pixels."""
    lines = []
    for index in range(count):
        picture = draw_stamped(seed, split, index)
        objects = [
            {"caption": thing.noun, "bbox": thing.box, "bbox_type": "real", "image": 0} for thing in picture.things
        ]
        lines.append(
            {
                "query": "<OD>",
                "response": "<ref-object><bbox>" * len(objects),
                "images": [_save(picture, folder, f"{name}-{index}")],
                "objects": json.dumps(objects),
            }
        )
    return _write(folder / f"{name}.jsonl", lines)


def _write_known(folder: Path, name: str, count: int, seed: int, split: int) -> int:
    """NAME.jsonl and its pictures: every task on every kind of picture, as `image`, `prefix` and `suffix`."""
    return _write(folder / f"{name}.jsonl", list(_known(folder, name, count, seed, split)))


def _known(folder: Path, name: str, count: int, seed: int, split: int) -> Iterator[dict[str, str]]:
    for index in range(count):
        kind = KINDS[index % len(KINDS)]
        picture = draw(kind, seed, split, index)
        tasks = TASKS_OF[kind]
        sample = answer(tasks[index // len(KINDS) % len(tasks)], kind, picture.things, picture.image.size, index)
        if sample is not None:
            yield {"image": _save(picture, folder, f"{name}-{index}"), "prefix": sample.prompt, "suffix": sample.target}


def _save(picture: Picture, folder: Path, name: str) -> str:
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    picture.image.save(folder / "pictures" / f"{name}.png")
    return f"pictures/{name}.png"


def _write(path: Path, lines: list[dict]) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return len(lines)
