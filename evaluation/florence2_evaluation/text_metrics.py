"""Texts against the texts that were to be read, or answered."""

from collections.abc import Sequence

import jiwer
from rapidfuzz.distance import Levenshtein

Pair = tuple[str, list[str]]
"""An answer and every text that is right."""


def exact(pairs: Sequence[Pair]) -> float:
    return sum(answer in wanted for answer, wanted in pairs) / len(pairs)


def character_errors(pairs: Sequence[Pair]) -> float | None:
    """Edits over the characters of the nearest references; None if these are empty."""
    wanted = [_nearest(*pair) for pair in pairs]
    return float(jiwer.cer(wanted, [answer for answer, _ in pairs])) if any(wanted) else None


def word_errors(pairs: Sequence[Pair]) -> float | None:
    """Edits over the words of the nearest references; None if these are empty."""
    # jiwer takes words apart at spaces only.
    wanted = [" ".join(_nearest(*pair).split()) for pair in pairs]
    return float(jiwer.wer(wanted, [" ".join(answer.split()) for answer, _ in pairs])) if any(wanted) else None


def normalized_distance(pairs: Sequence[Pair]) -> float:
    """Mean of edits / length of the longer text, from 0 to 1: 1 - N.E.D. of ICDAR's competitions."""
    return sum(Levenshtein.normalized_distance(answer, _nearest(answer, wanted)) for answer, wanted in pairs) / len(
        pairs
    )


ANLS_TAU = 0.5


def anls(pairs: Sequence[Pair]) -> float:
    """Average normalised Levenshtein similarity, without case; what is half wrong or worse is wrong. DocVQA's metric
    (arXiv:1905.13648)."""
    total = 0.0
    for answer, wanted in pairs:
        best = max(Levenshtein.normalized_similarity(answer.lower(), text.lower()) for text in wanted)
        total += best if best > 1 - ANLS_TAU else 0.0
    return total / len(pairs)


def _nearest(answer: str, wanted: Sequence[str]) -> str:
    return min(wanted, key=lambda text: Levenshtein.normalized_distance(answer, text))
