"""What a checkpoint says about the answers that it can write: its tokens, how many of them, and which repetitions."""

from collections.abc import Sequence
from dataclasses import dataclass

from florence2_export.source import CheckpointError, open_source
from florence2_export.tokenizer import load_tokenizer
from tokenizers import Tokenizer


@dataclass(frozen=True)
class Lengths:
    tokenizer: Tokenizer
    limit: int
    """Tokens of the longest answer, `<s>` and `</s>` included."""
    ngram: int = 3
    """Its no_repeat_ngram_size; 0 is none."""

    @classmethod
    def read(cls, checkpoint: str) -> "Lengths":
        """A folder or hub id. Raises ValueError where the tokenizer or max_position_embeddings is missing."""
        files = open_source(checkpoint)
        tokenizer = load_tokenizer(files)
        text = files.json("config.json").get("text_config") or {}
        limit = text.get("max_position_embeddings")
        if not isinstance(limit, int):
            raise CheckpointError(f"{files.path('config.json')} has no text_config.max_position_embeddings")
        settings = text | files.optional_json("generation_config.json")
        return cls(tokenizer, limit, settings.get("no_repeat_ngram_size") or 0)

    def tokens(self, suffix: str) -> list[int]:
        return self.tokenizer.encode(suffix).ids


def repeats(tokens: Sequence[int], ngram: int) -> bool:
    """Whether a run of `ngram` tokens comes twice, which generation with that no_repeat_ngram_size never writes."""
    runs = list(zip(*(tokens[start:] for start in range(ngram)), strict=False))
    return len(set(runs)) < len(runs)
