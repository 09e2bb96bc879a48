"""One to three coloured shapes."""

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw

from florence2_demo.things import Thing, backdrop, box_of, jittered, overlap
from florence2_demo.words import COLOURS, SHAPES

_CROSS = [(0.35, 0), (0.65, 0), (0.65, 0.35), (1, 0.35), (1, 0.65), (0.65, 0.65)]


def _star() -> np.ndarray:
    angles = np.pi * (np.arange(10) / 5 - 0.5)
    radii = np.where(np.arange(10) % 2, 0.2, 0.5)
    return 0.5 + radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)


OUTLINES = {
    "square": np.array([(0.0, 0.0), (1.0, 0.0), (1.0, 1.0), (0.0, 1.0)]),
    "triangle": np.array([(0.5, 0.0), (1.0, 1.0), (0.0, 1.0)]),
    "star": _star(),
    "cross": np.array(_CROSS + [(1 - x, 1 - y) for x, y in _CROSS]),
}
"""Corners in the unit square."""


def draw_scene(rng: Generator) -> tuple[Image.Image, list[Thing]]:
    size = int(rng.integers(192, 641)), int(rng.integers(192, 481))
    image = backdrop(rng, size, (190, 250) if rng.random() < 0.75 else (15, 70))
    things: list[Thing] = []
    count = int(rng.integers(1, 4))
    while len(things) < count:
        thing, mask = _shape(rng, size)
        if all(overlap(thing.box, other.box) < 0.05 for other in things):
            image.paste(jittered(rng, COLOURS[thing.colour]), (0, 0), mask)
            things.append(thing)
    return image, things


def _shape(rng: Generator, size: tuple[int, int]) -> tuple[Thing, Image.Image]:
    noun, colour = str(rng.choice(SHAPES)), str(rng.choice(list(COLOURS)))
    side = min(size) * rng.uniform(0.2, 0.46)
    x, y = (rng.uniform(0.01 * extent, 0.99 * extent - side) for extent in size)
    mask = Image.new("L", size)
    pen = ImageDraw.Draw(mask)
    if noun == "circle":
        pen.ellipse((x, y, x + side, y + side), fill=255)
    else:
        pen.polygon([(x + side * u, y + side * v) for u, v in OUTLINES[noun]], fill=255)
    return Thing(noun, box_of(mask), colour), mask
