"""One short word in capitals, large enough to be read at the model's side."""

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw

from florence2_demo.things import Thing, backdrop, box_of, font, jittered
from florence2_demo.words import COLOURS, LETTERS, TRAINING_WORDS

# Parts of the picture: squashed to the model's 96 pixels, letters are 12 to 17 wide, whatever its shape.
_LETTER_WIDTH = 12.5 / 96, 17 / 96
_LETTER_HEIGHT = 24 / 96, 40 / 96
_WORD_WIDTH = 88 / 96


def draw_word(rng: Generator, vocabulary: tuple[str, ...] | None = None) -> tuple[Image.Image, list[Thing]]:
    """`vocabulary` None is the training's: words, and as often random letters, which cannot be guessed."""
    text = _spelling(rng) if vocabulary is None else str(rng.choice(vocabulary))
    colour = str(rng.choice(list(COLOURS)))
    width = int(rng.integers(192, 641))
    em, stroke, pens = _set(rng, text, width)
    # Aileron's capitals are 0.7 of its em, and start 0.25 below where Pillow anchors a text.
    height = max(96, int(0.7 * em / rng.uniform(*_LETTER_HEIGHT)))
    pale = np.mean(COLOURS[colour]) > 140
    image = backdrop(rng, (width, height), (15, 60) if pale else (205, 250))
    left = rng.uniform(0.02 * width, 0.98 * width - pens[-1])
    top = rng.uniform(0.03 * height, 0.97 * height - 0.75 * em) - 0.2 * em
    word, boxes = Image.new("L", image.size), []
    for letter, pen in zip(text, pens, strict=False):
        mask = Image.new("L", image.size)
        ImageDraw.Draw(mask).text((left + pen, top), letter, 255, font(em), stroke_width=stroke)
        boxes.append(box_of(mask))
        word.paste(255, (0, 0), mask)
    image.paste(jittered(rng, COLOURS[colour]), (0, 0), word)
    return image, [Thing("word", box_of(word), colour, text, tuple(boxes))]


def _set(rng: Generator, text: str, width: int) -> tuple[int, int, np.ndarray]:
    """The font's size, the stroke that makes it heavier, where each letter starts, where the word ends."""
    weight = rng.uniform(0, 0.04)
    reach = width * min(len(text) * rng.uniform(*_LETTER_WIDTH), _WORD_WIDTH)
    per_em = sum(font(100).getlength(letter) / 100 + weight + 0.02 for letter in text)
    em = int(reach / per_em)
    advances = [font(em).getlength(letter) + (weight + 0.02) * em for letter in text]
    return em, round(weight * em / 2), np.cumsum([0.0, *advances])


def _spelling(rng: Generator) -> str:
    if rng.random() < 0.5:
        return "".join(rng.choice(list(LETTERS), int(rng.integers(3, 7))))
    return str(rng.choice(TRAINING_WORDS))
