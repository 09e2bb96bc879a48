"""Text of the chat formats -> text with regions: placeholders filled, picture tags taken out."""

import re
from collections.abc import Callable, Sequence
from typing import Any

from florence2_training.data.record import Region, Text

_IMAGE = re.compile(r"(?:Picture\s*\d+\s*:\s*)?<img>(.*?)</img>[ \t]*\r?\n?|<image>[ \t]*\r?\n?", re.DOTALL)
_PART = re.compile(
    r"(?P<bbox><bbox>)|(?P<ref><ref-object>)|<ref>(?P<label>.*?)</ref>|<box>(?P<box>.*?)</box>", re.DOTALL
)
_LARGE = 1e12
# Qwen-VL's boxes, in thousandths of the picture's width and height.
_QWEN_BOX = re.compile(r"\s*\((\d+),\s*(\d+)\)\s*,\s*\((\d+),\s*(\d+)\)\s*")


def take_images(text: str) -> tuple[str, list[str]]:
    """The text without `<img>PATH</img>` and `<image>`, and the paths.

    "Picture 1:" before a tag and the line break behind it belong to the tag.
    """
    paths = [path.strip() for path in _IMAGE.findall(text) if path]
    return _IMAGE.sub("", text), paths


def fill(text: str, boxes: Callable[[], Sequence[Region]], ref: Callable[[], str]) -> Text:
    """The text with each `<bbox>` and `<ref-object>` replaced by what `boxes` and `ref` give next, and Qwen-VL's
    `<ref>…</ref><box>…</box>` by label and region; white space at the ends taken off."""
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
            corners = _QWEN_BOX.fullmatch(found["box"])
            if not corners:
                raise ValueError(
                    f"<box>{found['box'][:40]}</box> is no box; write <box>(x1,y1),(x2,y2)</box>, 0 to 1000"
                )
            parts.append(Region(tuple(map(float, corners.groups())), (1000, 1000)))
    parts.append(text[end:])
    return _stripped(parts)


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
