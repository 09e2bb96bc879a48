"""What every format is read into: one picture, one prompt, one answer."""

from dataclasses import dataclass
from pathlib import Path

from florence2.locations import Size, to_text


@dataclass(frozen=True)
class Region:
    """Coordinates x, y, x, y, … that the model reads or writes as location tokens: 2 are a point, 4 a box, 8 a quad."""

    points: tuple[float, ...]
    space: Size | None = None
    """The (width, height) they are measured in, (1000, 1000); None is pixels of the picture seen upright."""
    written: str = ""
    """The numbers as the data set has them, for messages, where these are others."""


Text = tuple[str | Region, ...]
"""Text as it stands, with regions in it."""


@dataclass(frozen=True)
class Sample:
    """A line of somebody's data set, understood."""

    image: Path
    prompt: Text
    """As a client sends it: a task token with its text, or any other text."""
    answer: Text
    """As the model is to give it, without `<s>` and `</s>`."""
    where: str
    """For messages: `train.jsonl:17`."""
    stated_size: Size | None = None
    """(width, height) that the data set gives for its picture; pixels of a picture of another size land elsewhere."""

    def needs_size(self) -> bool:
        return any(isinstance(part, Region) and part.space is None for part in (*self.prompt, *self.answer))


@dataclass(frozen=True)
class Problem:
    """What can't be used, and what to do about it."""

    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


@dataclass(frozen=True)
class Example:
    """A sample in the words of the model; `prefix` and `suffix` as in `image`/`prefix`/`suffix` JSONL."""

    image: Path
    prefix: str
    suffix: str
    where: str


def as_text(parts: Text, size: Size) -> str:
    """The text that the model reads or writes. `size`: (width, height) of the upright picture.

    The one place where coordinates become tokens: floor, clamped to the bins (florence2.locations), nothing between the
    tokens of a region, between regions, or between a label and its region.
    """
    return "".join(part if isinstance(part, str) else to_text(part.points, part.space or size) for part in parts)


def example(sample: Sample, size: Size) -> Example:
    return Example(sample.image, as_text(sample.prompt, size), as_text(sample.answer, size), sample.where)
