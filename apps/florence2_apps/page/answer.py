"""An answer as the page shows it: the picture with what was found, a line about the request, a table."""

from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from florence2_client import Instances, Text
from florence2_client.results import Box
from PIL import Image

from florence2.drawing import draw
from florence2.images import decode

_LARGEST = 2048
"""Pixels on the longer side of what a browser is sent."""


@dataclass(frozen=True)
class Answered:
    """What came back, and what it is an answer to."""

    result: Text | Instances
    picture: Path
    region: Box | None
    seconds: float
    """From the call of the client to its return."""


def drawn(picture: Path, region: Box | None, answer: dict[str, Any]) -> Image.Image:
    """The upright picture with the region and the answer over it, made smaller for a screen. Raises OSError,
    InvalidRequest."""
    asked = {"": {"bboxes": [region], "labels": ["region"], "scores": [None]}} if region else {}
    image = draw(decode(picture.read_bytes()), asked | answer)
    image.thumbnail((_LARGEST, _LARGEST))
    return image


def status(answered: Answered) -> str:
    """HTML: who answered, how long it took, how it ended."""
    result = answered.result
    cut = "" if result.finish_reason == "stop" else ", cut short by the limit on new tokens"
    facts = {
        "seconds": f"{answered.seconds:.2f}",
        "release": result.model_version,
        "sequence score": f"{result.sequence_score:.3f}",
        "finish reason": f"{result.finish_reason}{cut}",
    }
    cells = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(fact)}</dd></div>" for name, fact in facts.items())
    return f'<dl class="facts">{cells}</dl>'


def table(found: Instances, of: int) -> str:
    """HTML: an instance per row, and how many of all these are."""
    if not of:
        return '<p class="count">Nothing found.</p>'
    count = f'<p class="count">{len(found)} of {of} found</p>'
    if not len(found):
        return count
    rows = "".join(
        f"<tr><td>{escape(one.label) or '-'}</td><td>{one.score:.3f}</td>"
        + "".join(f"<td>{edge:.1f}</td>" for edge in one.box)
        + "</tr>"
        for one in found
    )
    heads = "".join(f"<th>{name}</th>" for name in ("label", "score", "x1", "y1", "x2", "y2"))
    return f'{count}<div class="found"><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'
