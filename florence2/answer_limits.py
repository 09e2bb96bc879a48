"""What answers a checkpoint can write: of its tokens, so many of them, and without its forbidden repetitions."""

from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer


@dataclass(frozen=True)
class AnswerLimits:
    tokenizer: Tokenizer
    limit: int
    """Tokens of the longest answer, `<s>` and `</s>` included."""
    ngram: int
    """Its no_repeat_ngram_size; 0 is none."""

    def tokens(self, answer: str) -> list[int]:
        """`<s>` and `</s>` included, as generation gives them."""
        return self.tokenizer.encode(answer).ids


def repeats(tokens: Sequence[int], ngram: int) -> bool:
    """Whether a run of `ngram` tokens comes twice, which generation with that no_repeat_ngram_size never writes."""
    runs = list(zip(*(tokens[start:] for start in range(ngram)), strict=False))
    return len(set(runs)) < len(runs)
