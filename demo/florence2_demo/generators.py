"""Pictures that know what is in them, each kind from a seeded generator."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from florence2_demo.lettering import draw_word
from florence2_demo.pages import draw_page
from florence2_demo.scenes import draw_scene
from florence2_demo.things import Thing
from florence2_demo.words import HELD_OUT_WORDS

KINDS = ("scene", "page", "word")
TRAINING, HELD_OUT, HELD_OUT_NEW_WORDS = range(3)
"""Splits. Pictures of all three differ; the last draws only words that the training never draws."""


@dataclass(frozen=True)
class Picture:
    kind: str
    image: Image.Image
    things: tuple[Thing, ...]
    """By x + y of the top left corner: the order in which they are named in every answer."""


def draw(kind: str, seed: int, split: int, index: int) -> Picture:
    """The same arguments draw the same picture, in any order and any process."""
    rng = np.random.default_rng([seed, split, KINDS.index(kind), index])
    if kind == "scene":
        image, things = draw_scene(rng)
    elif kind == "page":
        image, things = draw_page(rng)
    else:
        image, things = draw_word(rng, HELD_OUT_WORDS if split == HELD_OUT_NEW_WORDS else None)
    return Picture(kind, image, tuple(sorted(things, key=lambda thing: thing.box[0] + thing.box[1])))
