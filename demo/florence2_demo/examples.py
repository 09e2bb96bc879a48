"""Example pictures with their truths: what ships in demo/pictures."""

import json
from pathlib import Path

from PIL import Image

from florence2_demo.generators import HELD_OUT, HELD_OUT_NEW_WORDS, Picture, draw
from florence2_demo.samples import TASKS_OF, answer

SEED = 7
_TURNED = 6
"""EXIF orientation: to be turned a quarter to the right to be seen upright."""

EXAMPLES = {
    "scene-1.png": ("scene", HELD_OUT, 0),
    "scene-2.jpg": ("scene", HELD_OUT, 3),
    "page-1.png": ("page", HELD_OUT, 0),
    "page-2.jpg": ("page", HELD_OUT, 6),
    "word-1.png": ("word", HELD_OUT_NEW_WORDS, 0),
    "word-2.png": ("word", HELD_OUT_NEW_WORDS, 2),
}
_ROTATED = "scene-2.jpg"


def write_examples(folder: Path) -> list[Path]:
    """The pictures and `truth.json`: sizes and boxes are those of the picture seen upright."""
    folder.mkdir(parents=True, exist_ok=True)
    truths = {}
    for name, (kind, split, index) in EXAMPLES.items():
        picture = draw(kind, SEED, split, index)
        orientation = _TURNED if name == _ROTATED else 1
        _write(picture.image, folder / name, orientation)
        truths[name] = {"size": picture.image.size, "exif_orientation": orientation, **_truth(picture)}
    (folder / "truth.json").write_text(json.dumps(truths, indent=1) + "\n")
    return sorted(folder.iterdir())


def _write(image: Image.Image, path: Path, orientation: int) -> None:
    exif = Image.Exif()
    if orientation == _TURNED:
        exif[0x0112] = _TURNED
        image = image.transpose(Image.Transpose.ROTATE_90)
    if path.suffix == ".png":
        # 128 colours are enough for what is drawn here, and half the size.
        image.quantize(128).save(path, optimize=True)
    else:
        image.save(path, quality=80, exif=exif)


def _truth(picture: Picture) -> dict:
    things = [
        {"label": thing.noun, "box": thing.box, "colour": thing.colour, "text": thing.text} for thing in picture.things
    ]
    samples = [answer(task, picture.kind, picture.things, picture.image.size, 0) for task in TASKS_OF[picture.kind]]
    return {"things": things, "answers": {sample.prompt: sample.target for sample in samples if sample}}
