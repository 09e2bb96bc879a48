"""What is drawn and where: shared by the scenes, the pages and the words."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageFont

Box = tuple[float, float, float, float]
"""x1, y1, x2, y2 in pixels; x2 and y2 lie behind the last pixel."""
RGB = tuple[int, int, int]


@dataclass(frozen=True)
class Thing:
    noun: str
    box: Box
    colour: str = ""
    text: str = ""
    letters: tuple[Box, ...] = ()


def box_of(drawn: Image.Image) -> Box:
    """Round all that is not black."""
    box = drawn.getbbox()
    if box is None:
        raise RuntimeError(f"nothing was drawn on a canvas of {drawn.size}")
    return box


def overlap(a: Box, b: Box) -> float:
    """Shared area over the smaller of the two."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    smaller = min((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return max(width, 0) * max(height, 0) / smaller


def jittered(rng: Generator, colour: RGB, by: int = 14) -> RGB:
    red, green, blue = (int(value) for value in np.clip(np.array(colour) + rng.integers(-by, by + 1, 3), 0, 255))
    return red, green, blue


def backdrop(rng: Generator, size: tuple[int, int], lightness: tuple[int, int]) -> Image.Image:
    """Pale or dark, never as saturated as a shape: plain, shaded, or blotched."""
    base = np.full(3, rng.integers(*lightness)) + rng.integers(-12, 13, 3)
    shape = [(1, 1), (2, 2), (5, 7)][rng.integers(3)]
    small = np.clip(base + rng.integers(-22, 23, (*shape, 1)) + rng.integers(-6, 7, (*shape, 3)), 0, 255)
    return Image.fromarray(small.astype(np.uint8)).resize(size, Image.Resampling.BILINEAR)


@lru_cache(maxsize=512)
def font(size: int) -> ImageFont.FreeTypeFont:
    """The sans face inside Pillow: no font of the machine is needed."""
    loaded = ImageFont.load_default(size)
    if not isinstance(loaded, ImageFont.FreeTypeFont):
        raise RuntimeError("the demo draws with Pillow's own font, which needs a Pillow built with FreeType")
    return loaded
