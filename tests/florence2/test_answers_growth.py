"""Answers in time linear in their tokens, and still those of HF's patterns, which are not."""

import re
import time
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from florence2.answers import AnswerParser, Decoded, Detokenizer, instances
from florence2.tasks import TASKS, AnswerKind

DEMO = ROOT / "demo" / "checkpoint"
TASK_OF = {task.answer: task for task in TASKS.values()}
WITH_SHAPES = [kind for kind in AnswerKind if kind is not AnswerKind.PURE_TEXT]


def parse(kind: AnswerKind, tokens: list[str]) -> Any:
    """The answer of a text in tokens, the log-probability of token i being -1 / (i + 1), in a picture of 1000 x 500."""
    owners = np.array([index for index, token in enumerate(tokens) for _ in token], np.int64)
    logprobs = -1 / np.arange(1, len(tokens) + 1)
    return AnswerParser(["it"]).parse(TASK_OF[kind], Decoded("".join(tokens), owners), logprobs, (1000, 500))


# The reference: HF's patterns of transformers' processing_florence2.py, quadratic as they are

LOCATION = r"<loc_\d+>"
PART = rf"(?:{LOCATION}|<sep>|<poly>|</poly>)"
LABEL = r"^\s*(.*?)(?=<od>|</od>|<box>|</box>|<bbox>|</bbox>|<loc_)"
POLYGON_LABEL = r"^\s*(.*?)(?=<od>|</od>|<box>|</box>|<bbox>|</bbox>|<loc_|<poly>)"

Row = tuple[str, list[tuple[int, int]], str]
"""What is found: its kind, the spans of its outlines in the text, its label."""


def spans(pattern: str, text: str, start: int, end: int, group: int = 0) -> list[tuple[int, int]]:
    return [tuple(start + place for place in found.span(group)) for found in re.finditer(pattern, text[start:end])]


def quads(text: str) -> Iterator[Row]:
    for found in re.finditer(rf"(.+?)((?:{LOCATION}){{8}})", text):
        yield "quad_boxes", [found.span(2)], found[1].strip()


def boxes(text: str, phrase: str) -> Iterator[Row]:
    for start, end in spans(phrase, text, 0, len(text)):
        label = re.search(LABEL, text[start:end].replace("<ground>", "", 1).replace("<obj>", "", 1))
        for box in spans(LOCATION * 4, text, start, end) if label else []:
            yield "bboxes", [box], label.group().strip()


def polygons(text: str, phrase: str) -> Iterator[Row]:
    for start, end in spans(phrase, text, 0, len(text)):
        label = re.search(POLYGON_LABEL, re.sub(rf"^{LOCATION}", "", text[start:end], count=1))
        if label is None:
            continue
        whole = "<poly>" in text[start:end] and "</poly>" in text[start:end]
        for instance in spans("<poly>(.*?)</poly>", text, start, end, 1) if whole else [(start, end)]:
            outlines = spans(rf"((?:{LOCATION})+)(?:<sep>|$)", text, *instance, 1)
            if outlines:
                yield "polygons", outlines, label.group().strip()


def found_by_hf(kind: AnswerKind, text: str, any_polygon: bool) -> Iterator[Row]:
    if kind is AnswerKind.OCR:
        return quads(text)
    if kind is AnswerKind.POLYGONS:
        return polygons(text, PART + "{4,}")
    if kind is AnswerKind.DESCRIPTION_WITH_BBOXES_OR_POLYGONS and any_polygon:
        return polygons(text, rf"[^<]+{PART}{{4,}}")
    rows = boxes(text, rf"(?:{LOCATION}){{4,}}" if kind is AnswerKind.BBOXES else rf"[^<]+(?:{LOCATION}){{4,}}")
    return (row for row in rows if kind is not AnswerKind.PHRASE_GROUNDING or row[2] != "it")


def reference(kind: AnswerKind, tokens: list[str]) -> list[tuple[str, Any, str, float]]:
    letters = [(letter, index) for index, token in enumerate(tokens) for letter in token]
    for taken in ("<s>", "</s>", "<pad>"):
        for found in reversed(list(re.finditer(taken, "".join(letter for letter, _ in letters)))):
            del letters[slice(*found.span())]
    text = "".join(letter for letter, _ in letters)
    rows = []
    for shape, outlines, label in found_by_hf(kind, text, "<poly>" in "".join(tokens)):
        points = [[int(number) for number in re.findall(r"\d+", text[slice(*span)])] for span in outlines]
        # A picture of 1000 x 500 has bins of 1 x 0.5.
        pixels = [
            [(place + 0.5) * (1, 0.5)[axis % 2] for axis, place in enumerate(outline[: len(outline) // 2 * 2])]
            for outline in points
        ]
        owners = sorted({owner for span in outlines for _, owner in letters[slice(*span)]})
        score = np.exp(np.mean([-1 / (owner + 1) for owner in owners]))
        rows.append((shape, pixels if shape == "polygons" else pixels[0], label, float(score)))
    return rows


PIECES = [
    *("<loc_0>", "<loc_1>", "<loc_999>", "<sep>", "<poly>", "</poly>"),
    *("a", " car", "it", " ", "   ", "\n", "a\n", "\nb", "日", "\x85", "<", ">", "loc_5>", "<loc_", "<loc_1000>"),
    *("<s>", "</s>", "<pad>", "<unk>", "<od>", "</od>", "<box>", "</bbox>", "<ground>", "<obj>", "<po<s>ly>"),
]
RUNS = [["<loc_12>", "<loc_3>"] * (length // 2) + ["<loc_4>"] * (length % 2) for length in (2, 3, 4, 7, 8, 9, 17)]
pieces = st.sampled_from([[piece] for piece in PIECES]) | st.sampled_from(RUNS)
answers = st.lists(pieces, max_size=20).map(lambda parts: [token for part in parts for token in part])


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=500)
@given(st.sampled_from(WITH_SHAPES), answers)
@example(AnswerKind.POLYGONS, ["<loc_1>", "<sep>", "<sep>", "<sep>"])
@example(AnswerKind.POLYGONS, ["<poly>", "<loc_1>", "<poly>", "<loc_1>", "<sep>", "<loc_1>", "</poly>", "<poly>"])
@example(AnswerKind.OCR, [*["<loc_1>"] * 18, "\n", *["<loc_1>"] * 9])
@example(AnswerKind.DESCRIPTION_WITH_BBOXES, [*["<loc_1>"] * 5, "a", *["<loc_1>"] * 3, "\n ", "b", *["<loc_1>"] * 4])
def test_answers_are_those_of_hfs_patterns(kind: AnswerKind, tokens: list[str]) -> None:
    assert list(instances(parse(kind, tokens))) == reference(kind, tokens)


# Growth


def grows_linearly(work: Callable[[int], Callable[[], Any]], size: int) -> None:
    """16 x the size in less than 64 x the processor's time; in quadratic time it would be 256 x."""
    times = []
    for times_as_much in (1, 16):
        run = work(times_as_much * size)
        clock = []
        for _ in range(3):
            start = time.thread_time()
            run()
            clock.append(time.thread_time() - start)
        times.append(min(clock))
    assert times[1] < 64 * times[0]


DETECTION, DETECTION_OR_MASKS = AnswerKind.DESCRIPTION_WITH_BBOXES, AnswerKind.DESCRIPTION_WITH_BBOXES_OR_POLYGONS


@pytest.mark.parametrize(
    ("kind", "before", "repeated", "after"),
    [
        (AnswerKind.PHRASE_GROUNDING, "", "a", ""),
        (DETECTION, "", "a", ""),
        (DETECTION, "", "\n", ""),
        (DETECTION, "<loc_", "1", ""),
        (DETECTION, "", " ", "a\n" + "<loc_1>" * 4),
        (DETECTION_OR_MASKS, "", "a", ""),
        (DETECTION_OR_MASKS, "<poly>", "a", ""),
        (DETECTION_OR_MASKS, "", " ", "a\n" + "<poly>" * 4),
        (DETECTION_OR_MASKS, "a<poly>", "<loc_1>", "<poly></poly>"),
        (AnswerKind.POLYGONS, "", "<loc_1>", "<poly>"),
        (AnswerKind.POLYGONS, "</poly>", "<poly>", ""),
        (AnswerKind.POLYGONS, "</poly>", "<poly><loc_1><sep>", ""),
        (AnswerKind.OCR, "", "a", ""),
        (AnswerKind.OCR, "", "<", ""),
        (AnswerKind.OCR, "", "<poly>", ""),
        (AnswerKind.OCR, "", "a<loc_1>", ""),
        (AnswerKind.OCR, "", "<loc_1><loc_1><loc_1>x", ""),
        (AnswerKind.OCR, "a" + "<loc_1>" * 8, "a", ""),
    ],
)
def test_time_is_linear_in_the_text(kind: AnswerKind, before: str, repeated: str, after: str) -> None:
    def work(size: int) -> Callable[[], Any]:
        text = before + repeated * size + after
        decoded = Decoded(text, np.arange(len(text)))
        return lambda: AnswerParser().parse(TASK_OF[kind], decoded, np.zeros(len(text)), (640, 480))

    grows_linearly(work, 100)


@cache
def detokenizer() -> tuple[Detokenizer, Tokenizer]:
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    return Detokenizer(tokenizer), tokenizer


# "ð" is the byte that begins a character of four, "Ģ" one that continues a character, None an unknown id.
@pytest.mark.parametrize("token", ["a", "<loc_1>", "ð", "Ģ", None])
def test_time_is_linear_in_the_tokens(token: str | None) -> None:
    detokenize, tokenizer = detokenizer()
    token_id = tokenizer.token_to_id(token) if token else 10**6
    assert token_id is not None
    grows_linearly(lambda size: lambda: detokenize([token_id] * size), 2000)
