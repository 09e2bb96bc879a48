"""Pictures to label."""

import io
import random
from pathlib import Path

from PIL import Image
from serving import PICTURES


def make_pictures(folder: Path, count: int) -> Path:
    """`count` cut-outs of the demo's, no two alike; every 50th is cut short, and every 50th is no picture."""
    pages = [Image.open(path).convert("RGB") for path in PICTURES]
    chance = random.Random(0)
    for number in range(count):
        page = pages[number % len(pages)]
        corner = [chance.randrange(side // 3) for side in page.size]
        path = folder / f"{number % 7}" / f"{number:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        page.crop((*corner, *page.size)).resize((96, 96)).save(path, compress_level=1)
        if number % 50 == 20:
            path.write_bytes(path.read_bytes()[:2000])
        elif number % 50 == 40:
            path.write_text("<html>")
    return folder


def png(number: int) -> bytes:
    """A picture of 4 x (number + 1) pixels."""
    file = io.BytesIO()
    Image.new("L", (4, number + 1)).save(file, "PNG")
    return file.getvalue()


def make_folder(folder: Path, names: list[str]) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(sum(name.encode())))
    return folder
