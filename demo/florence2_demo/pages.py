"""Pages of a document: titles, paragraphs, and what a reader looks for: tables and figures, or neither."""

from collections.abc import Callable
from functools import cache
from itertools import pairwise

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageChops, ImageDraw

from florence2_demo.things import RGB, Thing, box_of, font, jittered
from florence2_demo.words import COLOURS, PAGE_OBJECTS, WORDS

_MOST = 3
"""Tables and figures on a page."""


def draw_page(rng: Generator) -> tuple[Image.Image, list[Thing]]:
    width, height = int(rng.integers(320, 481)), int(rng.integers(400, 641))
    paper = jittered(rng, (246, 246, 244), 9)
    image = Image.new("RGB", (width, height), paper)
    margin = int(width * rng.uniform(0.05, 0.1))
    columns = 2 if rng.random() < 0.25 else 1
    gutter = margin // 2
    column = (width - 2 * margin - (columns - 1) * gutter) // columns
    top = margin
    if rng.random() < 0.7:
        top += _title(rng, image, (margin, margin), width - 2 * margin) + margin // 2
    things: list[Thing] = []
    wanted = int(rng.integers(0, _MOST + 1))
    for index in range(columns):
        share = wanted if columns == 1 else (wanted + 1 - index) // 2
        left = margin + index * (column + gutter)
        things += _fill(rng, image, (left, top, left + column, height - margin), share, paper)
    return image, things


def _fill(rng: Generator, image: Image.Image, room: tuple[int, int, int, int], wanted: int, paper: RGB) -> list[Thing]:
    """Blocks from the top of a column to its end, `wanted` tables and figures among paragraphs."""
    left, y, right, bottom = room
    things: list[Thing] = []
    gap = int((bottom - y) * rng.uniform(0.02, 0.04))
    while wanted > len(things):
        left_over = bottom - y - gap * 2 * (wanted - len(things))
        if rng.random() < 0.6:
            y += _paragraph(rng, image, (left, y, right), int(left_over * rng.uniform(0.05, 0.2))) + gap
        tall = int((bottom - y) * rng.uniform(0.55, 0.95) / (wanted - len(things))) - gap
        wide = int((right - left) * rng.uniform(0.6, 1))
        noun = str(rng.choice(PAGE_OBJECTS))
        # A page is usually taller than it is wide; so are few tables and figures.
        drawn = _block(rng, noun, (wide, min(max(tall, 40), int(wide * 1.2))), paper)
        x = left + int(rng.integers(0, right - left - wide + 1))
        image.paste(drawn, (x, y))
        edges = box_of(ImageChops.difference(drawn, Image.new("RGB", drawn.size, paper)))
        things.append(Thing(noun, (x + edges[0], y + edges[1], x + edges[2], y + edges[3])))
        y += drawn.height + gap
    if rng.random() < 0.85:
        _paragraph(rng, image, (left, y, right), bottom - y)
    return things


def _block(rng: Generator, noun: str, size: tuple[int, int], paper: RGB) -> Image.Image:
    block = Image.new("RGB", size, paper)
    if noun == "table":
        _table(rng, block)
    else:
        figure: Callable = [_bars, _curves, _scatter, _photograph][int(rng.integers(4))]
        figure(rng, block)
    return block


def _ink(rng: Generator) -> RGB:
    return jittered(rng, (60, 60, 66), 40)


def _accent(rng: Generator) -> RGB:
    return jittered(rng, list(COLOURS.values())[int(rng.integers(len(COLOURS)))], 30)


@cache
def _length(word: str, size: int) -> float:
    return font(size).getlength(word)


def _text(rng: Generator, width: float, size: int) -> str:
    """Words until one more would pass `width`."""
    line: list[str] = []
    for index in rng.integers(0, len(WORDS), 40):
        width -= _length(WORDS[index].lower() + " ", size)
        if width < 0:
            break
        line.append(WORDS[index].lower())
    return " ".join(line)


def _title(rng: Generator, image: Image.Image, at: tuple[int, int], width: int) -> int:
    size = int(rng.integers(16, 27))
    text = _text(rng, width * rng.uniform(0.4, 0.8), size).title()
    ImageDraw.Draw(image).text(at, text, _ink(rng), font(size), stroke_width=int(rng.integers(2)))
    return int(size * 1.3)


def _paragraph(rng: Generator, image: Image.Image, place: tuple[int, int, int], height: int) -> int:
    """Real text, ragged at the right; returns the height it took."""
    left, top, right = place
    size = int(rng.integers(9, 14))
    leading = int(size * rng.uniform(1.2, 1.6))
    ink, pen = _ink(rng), ImageDraw.Draw(image)
    lines = height // leading
    for line in range(lines):
        last = line == lines - 1 or rng.random() < 0.12
        reach = (right - left) * (rng.uniform(0.2, 0.8) if last else 1)
        text = _text(rng, reach, size)
        pen.text((left, top + line * leading), text, ink, font(size))
    return max(lines, 0) * leading


def _table(rng: Generator, block: Image.Image) -> None:
    """Ruled both ways, or across only, with a header that may be shaded, and short entries."""
    width, height = block.width - 1, block.height - 1
    pen, ink = ImageDraw.Draw(block), _ink(rng)
    columns, rows = int(rng.integers(2, 6)), max(2, min(int(rng.integers(3, 9)), height // 14))
    xs = [0, *np.sort(rng.permutation(np.arange(1, columns) / columns) * width).astype(int), width]
    ys = np.linspace(0, height, rows + 1).astype(int)
    if rng.random() < 0.5:
        pen.rectangle((0, 0, width, ys[1]), fill=jittered(rng, (205, 208, 214), 20))
    size = int(np.clip(height / rows * 0.55, 7, 13))
    for top in ys[:-1]:
        for left, right in pairwise(xs):
            entry = str(rng.integers(1, 9999)) if rng.random() < 0.7 else WORDS[int(rng.integers(len(WORDS)))].lower()
            if _length(entry, size) < right - left - 6:
                pen.text((left + 4, top + 2), entry, ink, font(size))
    thickness = int(rng.integers(1, 3))
    for y in ys:
        pen.line((0, y, width, y), ink, thickness)
    if rng.random() < 0.75:
        for x in xs:
            pen.line((x, 0, x, height), ink, thickness)


def _axes(rng: Generator, block: Image.Image) -> tuple[ImageDraw.ImageDraw, int, int]:
    """Axes at the left and below, or a frame all round; ticks in either case."""
    width, height = block.width - 1, block.height - 1
    pen, ink = ImageDraw.Draw(block), _ink(rng)
    if rng.random() < 0.5:
        pen.rectangle((0, 0, width, height), outline=ink, width=2)
    pen.line((1, 0, 1, height), ink, 2)
    pen.line((0, height - 1, width, height - 1), ink, 2)
    for part in np.linspace(0, 1, 6):
        pen.line((0, part * height, 6, part * height), ink, 1)
        pen.line((part * width, height - 6, part * width, height), ink, 1)
    return pen, width, height


def _bars(rng: Generator, block: Image.Image) -> None:
    pen, width, height = _axes(rng, block)
    count, colour = int(rng.integers(3, 9)), _accent(rng)
    for index, tall in enumerate(rng.uniform(0.15, 0.95, count)):
        left = width * (index + 0.7) / (count + 1)
        pen.rectangle((left, height * (1 - tall), left + 0.6 * width / (count + 1), height - 2), fill=colour)


def _curves(rng: Generator, block: Image.Image) -> None:
    pen, width, height = _axes(rng, block)
    for _ in range(int(rng.integers(1, 4))):
        steps = np.cumsum(rng.normal(0, 1, 12))
        heights = 0.1 + 0.8 * (steps - steps.min()) / (np.ptp(steps) + 1e-6)
        points = [(width * (0.05 + 0.9 * i / 11), height * (1 - tall)) for i, tall in enumerate(heights)]
        pen.line(points, _accent(rng), int(rng.integers(2, 4)))


def _scatter(rng: Generator, block: Image.Image) -> None:
    pen, width, height = _axes(rng, block)
    radius, colour = int(rng.integers(2, 5)), _accent(rng)
    for x, y in rng.uniform(0.08, 0.92, (int(rng.integers(12, 40)), 2)):
        pen.circle((x * width, y * height), radius, fill=colour)


def _photograph(rng: Generator, block: Image.Image) -> None:
    small = rng.integers(40, 200, (int(rng.integers(3, 7)), int(rng.integers(3, 7)), 3)).astype(np.uint8)
    block.paste(Image.fromarray(small).resize(block.size, Image.Resampling.BICUBIC))
