"""What a checkpoint says about lengths: its tokenizer, and how long its decoder is."""

import json
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer


@dataclass(frozen=True)
class Lengths:
    tokenizer: Tokenizer
    limit: int
    """Tokens of the longest answer, `<s>` and `</s>` included."""

    @classmethod
    def read(cls, checkpoint: Path) -> "Lengths":
        """Raises ValueError if the folder has no tokenizer.json, or no config.json with max_position_embeddings."""
        try:
            tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
        except Exception as error:
            # tokenizers raises bare Exceptions.
            raise ValueError(f"{checkpoint / 'tokenizer.json'}: no tokenizer ({error}); name a checkpoint") from None
        try:
            limit = json.loads((checkpoint / "config.json").read_text())["text_config"]["max_position_embeddings"]
        except (OSError, ValueError, KeyError, TypeError):
            message = f"{checkpoint / 'config.json'} has no text_config.max_position_embeddings; name a checkpoint"
            raise ValueError(message) from None
        tokenizer.no_truncation()
        return cls(tokenizer, limit)

    def tokens(self, suffix: str) -> list[int]:
        return self.tokenizer.encode(f"<s>{suffix}</s>", add_special_tokens=False).ids
