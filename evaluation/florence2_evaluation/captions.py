"""Captions against reference captions."""

import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.tokenizer import ptbtokenizer
from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS, PTBTokenizer

_TOKEN = re.compile(
    r"n't\b|'(?:s|ll|ve|re|d|m)\b"  # ends of contractions
    r"|\w+?(?=n't\b)"
    r"|\w+(?:-\w+|(?<=\d)[.,](?=\d)\w+)*"  # well-known, 3.5
    r"|[^\w\s]"
)
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}


def has_ptb_tokenizer() -> bool:
    """Stanford's tokenizer runs in Java, and its caller writes a file beside it."""
    return bool(shutil.which("java")) and os.access(Path(ptbtokenizer.__file__).parent, os.W_OK)


@dataclass(frozen=True)
class Words:
    """Texts by question, words with one space between them."""

    answers: dict[int, list[str]]
    references: dict[int, list[str]]
    ptb: bool
    """Whether the field's own tokenizer split them."""

    def __bool__(self) -> bool:
        return any(text for own in self.references.values() for text in own)


def tokenized(pairs: Sequence[tuple[str, list[str]]]) -> Words:
    """Answers, each with its references."""
    ptb = has_ptb_tokenizer()
    # PTBTokenizer reads a line per text, ends of lines of every kind, and gives back as many.
    texts = {
        number: [" ".join(text.split()) for text in (answer, *wanted)] for number, (answer, wanted) in enumerate(pairs)
    }
    if ptb:
        # All at once: it is a process that has to start.
        split = PTBTokenizer().tokenize({key: [{"caption": one} for one in own] for key, own in texts.items()})
        if any(len(split.get(key, [])) != len(own) for key, own in texts.items()):
            raise RuntimeError("Stanford's tokenizer failed: repair `java`, or take it off the PATH to do without")
    else:
        split = {key: [_words(text) for text in own] for key, own in texts.items()}
    return Words({key: own[:1] for key, own in split.items()}, {key: own[1:] for key, own in split.items()}, ptb)


def _words(text: str) -> str:
    """Much as PTBTokenizer splits, less its abbreviations and rare contractions."""
    tokens = [_BRACKETS.get(token, token) for token in _TOKEN.findall(text.lower())]
    return " ".join(token for token in tokens if token not in PUNCTUATIONS and token != '"')


def cider(words: Words) -> float | None:
    """1.0 is what is published as 100. Words that every picture has count nothing: of one question it is 0."""
    return float(Cider().compute_score(words.references, words.answers)[0]) if words else None


def bleu4(words: Words) -> float | None:
    """Of the corpus, from 0 to 1."""
    return float(Bleu(4).compute_score(words.references, words.answers, verbose=0)[0][3]) if words else None
