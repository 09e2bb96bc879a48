"""What answers a checkpoint can write, without its weights."""

from florence2.answer_limits import AnswerLimits
from florence2_export.source import CheckpointError, open_source
from florence2_export.tokenizer import load_tokenizer


def read_answer_limits(checkpoint: str) -> AnswerLimits:
    """`checkpoint`: a folder or hub id. Raises ValueError where the tokenizer or max_position_embeddings is missing."""
    files = open_source(checkpoint)
    tokenizer = load_tokenizer(files)
    text = files.json("config.json").get("text_config") or {}
    limit = text.get("max_position_embeddings")
    if not isinstance(limit, int):
        raise CheckpointError(f"{files.path('config.json')} has no text_config.max_position_embeddings")
    settings = text | files.optional_json("generation_config.json")
    return AnswerLimits(tokenizer, limit, settings.get("no_repeat_ngram_size") or 0)
