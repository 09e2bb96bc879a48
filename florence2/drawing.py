"""An answer drawn over its picture."""

from typing import Any

from PIL import Image, ImageDraw, ImageFont

from florence2.answers import instances

_COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#800000", "#000075")


def draw(image: Image.Image, answer: dict[str, Any]) -> Image.Image:
    """A copy of the upright RGB picture with the boxes, quads and polygons of `{task: value}`, labels and scores.

    A score of None draws no number. Texts have nothing to draw: the copy is then the picture."""
    picture = image.convert("RGB")
    for value in answer.values():
        if isinstance(value, dict):
            _Canvas(picture).draw(value)
    return picture


class _Canvas:
    def __init__(self, picture: Image.Image) -> None:
        self.pen = ImageDraw.Draw(picture, "RGBA")
        self.size = picture.size
        self.unit = max(picture.size) / 640
        self.font = ImageFont.load_default(size=max(10, 14 * self.unit))
        self.colours: dict[str, str] = {}

    def draw(self, value: dict[str, Any]) -> None:
        for instance in instances(value):
            self._instance(*instance)

    def _instance(self, kind: str, shape: list[Any], label: str, score: float | None) -> None:
        colour = self.colours.setdefault(label, _COLOURS[len(self.colours) % len(_COLOURS)])
        outlines = shape if kind == "polygons" else [_corners(shape) if kind == "bboxes" else shape]
        # A polygon of one coordinate has no point.
        outlines = [outline for outline in outlines if outline]
        if not outlines:
            return
        width = max(2, round(2.5 * self.unit))
        for outline in outlines:
            points = list(zip(outline[0::2], outline[1::2], strict=True))
            if kind == "polygons" and len(points) > 2:
                self.pen.polygon(points, fill=colour + "40")
            self.pen.line([*points, points[0]], fill=colour, width=width, joint="curve")
        text = " ".join(f"{label} {'' if score is None else f'{score:.2f}'}".split())
        if text:
            self._tag(min(outlines[0][0::2]), min(outlines[0][1::2]), text, colour)

    def _tag(self, x: float, y: float, text: str, colour: str) -> None:
        left, top, right, bottom = self.pen.textbbox((x, y), text, font=self.font, anchor="lb")
        left, right = left - 1, right + 1
        # What would stick out goes inside; of a tag wider than the picture the beginning is seen.
        across = max(0.0 - left, min(0.0, self.size[0] - 1 - right))
        down = max(0.0 - top, min(0.0, self.size[1] - 1 - bottom))
        self.pen.rectangle((left + across, top + down, right + across, bottom + down), fill=colour)
        self.pen.text((x + across, y + down), text, fill="white", font=self.font, anchor="lb")


def _corners(box: list[float]) -> list[float]:
    x1, y1, x2, y2 = box
    return [x1, y1, x2, y1, x2, y2, x1, y2]
