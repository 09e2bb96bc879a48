"""Generated tokens -> the task's structured answer, in pixels of the picture that was sent, with a score per box.

The grammar is that of HF's `Florence2PostProcessor`. Deliberate differences from it:

- Boxes are floats (transformers truncates to integers; Microsoft's processor, like this one, does not).
- `scores` beside every list of boxes: exp of the mean log-probability of the box's location tokens, Microsoft's
  `SCORE_MODE = "avg_loc_scores"`, here for every task with boxes and per instance for polygons. Microsoft's code steps
  over matched text only, so behind text that belongs to no instance it takes other tokens' scores; this one does not.
- Labels of boxes keep letters outside ASCII; HF drops them.
"""

import codecs
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from tokenizers import Tokenizer

from florence2.locations import Size, dequantize
from florence2.tasks import AnswerKind, Task

_LOCATION = re.compile(r"<loc_(\d+)>")
_MOST_DIGITS = 300
"""Of what a float holds."""
_BOX = re.compile(r"<loc_\d+>" * 4)

# HF's patterns, in time linear in the text: where one fails, its last alternative takes the text that it failed on,
# without group 1. HF's start again at every character of that text, and each time fail for the same reason.
_QUAD = re.compile(r"(.+?)(" + r"<loc_\d+>" * 8 + r")|.+")
_LABELLED_BOXES = re.compile(r"([^<]++(?:<loc_\d+>){4,})|[^<]+")
_BARE_BOXES = re.compile(r"((?:<loc_\d+>){4,})")
_LABELLED_POLYGONS = re.compile(r"([^<]++(?:<loc_\d+>|<sep>|<poly>|</poly>){4,})|[^<]+")
_BARE_POLYGONS = re.compile(r"((?:<loc_\d+>|<sep>|<poly>|</poly>){4,})")
_POLYGON_INSTANCE = re.compile(r"<poly>(.*?)</poly>|<poly>.*")
_POLYGON = re.compile(r"((?:<loc_\d+>)+)(?:<sep>|$)|(?:<loc_\d+>)+")
# HF's ends at <od>, <box> and <bbox> too, which no phrase has.
_LABEL = re.compile(r"\s*+.*?(?=<loc_|<poly>)")


@dataclass(frozen=True)
class Decoded:
    """Text and, for each of its characters, the index of the token it came from."""

    text: str
    tokens: NDArray[np.int64]

    def __getitem__(self, span: slice) -> "Decoded":
        return Decoded(self.text[span], self.tokens[span])

    def without(self, literal: str) -> "Decoded":
        """`str.replace(literal, "")`."""
        keep = np.ones(len(self.text), bool)
        for found in re.finditer(re.escape(literal), self.text):
            keep[found.start() : found.end()] = False
        return Decoded(self.text.replace(literal, ""), self.tokens[keep])

    def findall(self, pattern: re.Pattern[str], group: int = 1) -> Iterator["Decoded"]:
        """The group, of every match that has it."""
        for found in pattern.finditer(self.text):
            if found[group] is not None:
                yield self[slice(*found.span(group))]


class Detokenizer:
    """Token ids -> text, special tokens kept, as `batch_decode(..., skip_special_tokens=False)`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        alphabet = {character: byte for byte, character in _byte_alphabet().items()}
        self._bytes: dict[int, bytes] = {}
        for token, token_id in tokenizer.get_vocab(with_added_tokens=True).items():
            # A token with a character outside the alphabet stands for itself: tokenizers' ByteLevel decoder.
            known = all(character in alphabet for character in token)
            self._bytes[token_id] = bytes(alphabet[character] for character in token) if known else token.encode()

    def __call__(self, token_ids: Sequence[int]) -> Decoded:
        """Ids that the tokenizer does not know, such as padded vocabulary rows, decode to nothing."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        last = len(token_ids) - 1
        pieces = [
            decoder.decode(self._bytes.get(int(token_id), b""), final=index == last)
            for index, token_id in enumerate(token_ids)
        ]
        lengths = np.array([len(piece) for piece in pieces], np.int64)
        return Decoded("".join(pieces), np.repeat(np.arange(len(pieces)), lengths))


class AnswerParser:
    """The post-processing of one checkpoint, in time linear in the text."""

    def __init__(self, banned_grounding_phrases: Sequence[str] = (), location_bins: int = 1000) -> None:
        self.banned = frozenset(banned_grounding_phrases)
        self.bins = location_bins

    def parse(self, task: Task | None, decoded: Decoded, logprobs: ArrayLike, size: Size) -> Any:
        """The value under the task's key.

        `logprobs` f32: one per token of `decoded`; `size`: (width, height) of the picture the answer is about. Texts
        are strings; everything else is a dict of lists, as `post_process_generation` gives it, `scores` added.
        """
        kind = task.answer if task else AnswerKind.PURE_TEXT
        if kind is AnswerKind.PURE_TEXT:
            return decoded.text.replace("<s>", "").replace("</s>", "").strip()
        text = decoded.without("<s>").without("</s>").without("<pad>")
        reader = _Reader(np.asarray(logprobs, np.float64), size, self.bins)
        if kind is AnswerKind.OCR:
            return _columns(reader.quads(text), "quad_boxes", "labels", "scores")
        if kind is AnswerKind.PHRASE_GROUNDING:
            boxes = [row for row in reader.boxes(text, _LABELLED_BOXES) if row[1] not in self.banned]
            return _columns(boxes, "bboxes", "labels", "scores")
        if kind is AnswerKind.DESCRIPTION_WITH_BBOXES:
            return _columns(reader.boxes(text, _LABELLED_BOXES), "bboxes", "labels", "scores")
        if kind is AnswerKind.BBOXES:
            return _columns(reader.boxes(text, _BARE_BOXES), "bboxes", "labels", "scores")
        if kind is AnswerKind.POLYGONS:
            return _columns(reader.polygons(text, _BARE_POLYGONS), "polygons", "labels", "scores")
        polygons = "<poly>" in decoded.text
        return {
            **_columns([] if polygons else reader.boxes(text, _LABELLED_BOXES), "bboxes", "bboxes_labels", "scores"),
            **_columns(
                reader.polygons(text, _LABELLED_POLYGONS) if polygons else [],
                *("polygons", "polygons_labels", "polygons_scores"),
            ),
        }


_GROUPS = (
    *((kind, "labels", "scores") for kind in ("bboxes", "quad_boxes", "polygons")),
    ("bboxes", "bboxes_labels", "scores"),
    ("polygons", "polygons_labels", "polygons_scores"),
)
"""The columns that an answer may have: coordinates, labels, scores."""


def instances(value: dict[str, list[Any]]) -> Iterator[tuple[str, list[Any], str, float]]:
    """What an answer holds that is no text: per instance its kind ("bboxes", "quad_boxes" or "polygons"), coordinates,
    label and score."""
    for kind, labels, scores in _GROUPS:
        if kind in value and labels in value:
            for row in zip(value[kind], value[labels], value[scores], strict=True):
                yield kind, *row


def at_least(value: dict[str, list[Any]], min_score: float) -> dict[str, list[Any]]:
    """The same without instances of a lower score."""
    kept = dict(value)
    for group in _GROUPS:
        if all(name in value for name in group):
            keep = [score >= min_score for score in value[group[2]]]
            kept |= {name: list(compress(value[name], keep)) for name in group}
    return kept


_Row = tuple[Any, str, float]
"""Coordinates in pixels, label, score."""


@dataclass(frozen=True)
class _Reader:
    logprobs: NDArray[np.float64]
    size: Size
    bins: int

    def quads(self, text: Decoded) -> list[_Row]:
        rows = []
        for found in _QUAD.finditer(text.text):
            if found[1] is not None:
                quad = text[slice(*found.span(2))]
                rows.append((self._pixels(quad.text), found[1].strip(), self._score(quad)))
        return rows

    def boxes(self, text: Decoded, pattern: re.Pattern[str]) -> list[_Row]:
        rows = []
        for phrase in text.findall(pattern):
            label = _label(phrase.text)
            if label is not None:
                for box in phrase.findall(_BOX, group=0):
                    rows.append((self._pixels(box.text), label, self._score(box)))
        return rows

    def polygons(self, text: Decoded, pattern: re.Pattern[str]) -> list[_Row]:
        rows = []
        for phrase in text.findall(pattern):
            # HF takes a location at the very start away before it looks for the label.
            label = _label(re.sub(r"^<loc_\d+>", "", phrase.text, count=1))
            if label is None:
                continue
            whole = "<poly>" in phrase.text and "</poly>" in phrase.text
            for instance in phrase.findall(_POLYGON_INSTANCE) if whole else [phrase]:
                parts = list(instance.findall(_POLYGON))
                outlines = [self._pixels(part.text) for part in parts]
                if parts:
                    rows.append((outlines, label, self._score(*parts)))
        return rows

    def _pixels(self, locations: str) -> list[float]:
        bins = [_bin(number) for number in _LOCATION.findall(locations)]
        return dequantize(bins[: len(bins) // 2 * 2], self.size, self.bins).tolist()

    def _score(self, *parts: Decoded) -> float:
        tokens = sorted(set().union(*(part.tokens.tolist() for part in parts)))
        return float(np.exp(self.logprobs[tokens].mean()))


def _bin(digits: str) -> int:
    """Raises OverflowError for more than a coordinate can be made of: letters spell them too."""
    if len(digits) > _MOST_DIGITS:
        raise OverflowError(f"a location of {len(digits)} digits")
    return int(digits)


def _label(phrase: str) -> str | None:
    """None where a line ends inside it, as HF's `.` is no newline, or neither a location nor a `<poly>` follows."""
    found = _LABEL.match(phrase)
    return found.group().strip() if found else None


def _columns(rows: list[_Row], *names: str) -> dict[str, list[Any]]:
    return {name: [row[column] for row in rows] for column, name in enumerate(names)}


def _byte_alphabet() -> dict[int, str]:
    """Byte -> printable character, the alphabet of byte-level BPE (GPT-2's `bytes_to_unicode`)."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    return {
        **{byte: chr(byte) for byte in printable},
        **{byte: chr(256 + i) for i, byte in enumerate(others)},
    }
