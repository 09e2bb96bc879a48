"""VQA accuracy: an answer is right as far as three of ten people gave it.

The rules are those of the official evaluation (github.com/GT-Vision-Lab/VQA, vqaEval.py); as on the EvalAI server,
answers and references are both normalised.
"""

import re
from collections.abc import Sequence

ANNOTATORS = 10
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
# The official pattern's look-behind has no effect: a dot goes unless a digit follows it.
_PERIOD = re.compile(r"\.(?!\d)")
_ARTICLES = {"a", "an", "the"}
_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBER_WORDS)}
_WITH_APOSTROPHE = """
ain't can't couldn't could've didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's isn't
it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't
somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's
they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd
where's where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll
you're you've
"""
_CONTRACTIONS = {word.replace("'", ""): word for word in _WITH_APOSTROPHE.split()}


def accuracy(pairs: Sequence[tuple[str, list[str]]]) -> float | None:
    """Over the questions that ten people have answered; None if there are none."""
    values = [_one(answer, wanted) for answer, wanted in pairs if len(wanted) == ANNOTATORS]
    return sum(values) / len(values) if values else None


def _one(answer: str, wanted: Sequence[str]) -> float:
    given, texts = normalize(answer), [normalize(text) for text in wanted]
    matches = texts.count(given)
    # Each person is left out once.
    return sum(min((matches - (text == given)) / 3, 1) for text in texts) / len(texts)


def normalize(text: str) -> str:
    text = text.replace("\n", " ").replace("\t", " ").strip()
    stripped = text
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        stripped = stripped.replace(mark, "" if beside_space or _COMMA_IN_NUMBER.search(text) else " ")
    words = [_NUMBERS.get(word, word) for word in _PERIOD.sub("", stripped).lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)
