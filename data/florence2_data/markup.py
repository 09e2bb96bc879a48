"""Text of the chat formats -> text with regions: placeholders filled, picture tags taken out."""

import re
from collections.abc import Callable, Sequence
from typing import Any

from florence2_data.record import Region, Text

_IMAGE = re.compile(r"(?:Picture\s*\d+\s*:\s*)?<img>(.*?)</img>[ \t]*\r?\n?|<image>[ \t]*\r?\n?", re.DOTALL)
_PART = re.compile(
    r"(?P<bbox><bbox>)|(?P<ref><ref-object>)|<ref>(?P<label>.*?)</ref>|<(?P<shape>box|quad)>(?P<points>.*?)</(?P=shape)>",
    re.DOTALL,
)
_LARGE = 1e12
_PAIR = re.compile(r"\s*\((\d+),\s*(\d+)\)\s*")
_WRITTEN = {"box": "(x1,y1),(x2,y2)", "quad": "(x1,y1),(x2,y2),(x3,y3),(x4,y4)"}
_FOREIGN = re.compile(r"<\|(?:box|quad|object_ref)_start\|>|<loc\d+>")


def take_images(text: str) -> tuple[str, list[str]]:
    """The text without `<img>PATH</img>` and `<image>`, and the paths.

    "Picture 1:" before a tag and the line break behind it belong to the tag.
    """
    paths = [path.strip() for path in _IMAGE.findall(text) if path]
    return _IMAGE.sub("", text), paths


def refuse_foreign(text: str) -> str:
    """The text. Raises ValueError for locations of Qwen2-VL and later, and of PaliGemma, which are no words of
    Florence-2's."""
    if found := _FOREIGN.search(text):
        raise ValueError(
            f"{found[0]} is another model's; write LABEL<loc_x1><loc_y1><loc_x2><loc_y2>, of pixels floor(x * 1000 / "
            "width) and floor(y * 1000 / height), at most 999"
        )
    return text


def fill(text: str, boxes: Callable[[], Sequence[Region]], ref: Callable[[], str]) -> Text:
    """The text with each `<bbox>` and `<ref-object>` replaced by what `boxes` and `ref` give next, and Qwen-VL's
    `<ref>…</ref><box>…</box>` or `<quad>…</quad>` by label and region; white space at the ends taken off."""
    refuse_foreign(text)
    parts: list[str | Region] = []
    end = 0
    for found in _PART.finditer(text):
        parts.append(text[end : found.start()])
        end = found.end()
        if found["bbox"]:
            parts += boxes()
        elif found["ref"]:
            parts.append(ref())
        elif found["label"] is not None:
            parts.append(found["label"].strip())
        else:
            parts.append(_qwen(found["shape"], found["points"]))
    parts.append(text[end:])
    return _stripped(parts)


def _qwen(shape: str, points: str) -> Region:
    """Qwen-VL's points are in thousandths of the picture's width and height."""
    pairs = [_PAIR.fullmatch(pair) for pair in re.split(r"(?<=\))\s*,", points)]
    found = [pair.groups() for pair in pairs if pair]
    if not len(found) == len(pairs) == _WRITTEN[shape].count("("):
        raise ValueError(
            f"<{shape}>{points[:40]}</{shape}> is no {shape}; write <{shape}>{_WRITTEN[shape]}</{shape}>, 0 to 1000"
        )
    return Region(tuple(float(number) for pair in found for number in pair), (1000, 1000))


def numbers(value: Any, what: str) -> tuple[float, ...]:
    """A JSON list of finite numbers. Raises ValueError naming `what`."""
    if not isinstance(value, list) or not all(map(_is_number, value)):
        raise ValueError(f"{what} is a list of numbers, not {str(value)[:60]}")
    return tuple(map(float, value))


def _is_number(value: Any) -> bool:
    # A whole number of JSON may be too long for a float.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _LARGE


def _stripped(parts: Sequence[str | Region]) -> Text:
    joined: list[str | Region] = []
    for part in parts:
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] += part
        elif part != "":
            joined.append(part)
    if joined and isinstance(joined[0], str):
        joined[0] = joined[0].lstrip()
    if joined and isinstance(joined[-1], str):
        joined[-1] = joined[-1].rstrip()
    return tuple(part for part in joined if part != "")
