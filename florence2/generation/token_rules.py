"""Tokens that may not come next, and tokens that must: HF's logits processors, for many rows at once."""

import numpy as np
from numpy.typing import NDArray

from florence2.generation.settings import GenerationSettings

Ids = NDArray[np.int64]


def repeating(sequences: NDArray[np.int32], lengths: Ids, size: int) -> tuple[Ids, Ids]:
    """Rows of `sequences` [R, L], of which so many tokens count, and tokens that would complete an n-gram of `size`
    that the row already has (HF's NoRepeatNGramLogitsProcessor); by rows, in order, and some perhaps twice."""
    windows = sequences.shape[1] - size + 1
    if windows <= 0:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    same = np.ones((len(sequences), windows), np.bool_)
    all_rows = np.arange(len(sequences))
    for place in range(size - 1):
        # Where the row is shorter than `size` anything may be read: no window of it is whole.
        suffix = sequences[all_rows, np.maximum(lengths - size + 1 + place, 0)]
        same &= sequences[:, place : place + windows] == suffix[:, None]
    rows, starts = same.nonzero()
    ends = starts + size - 1
    whole = ends < lengths[rows]
    if not whole.all():
        rows, ends = rows[whole], ends[whole]
    return rows, sequences[rows, ends].astype(np.int64)


def suppressed(settings: GenerationSettings, length: int) -> tuple[int, ...]:
    """After so many tokens, decoder start included."""
    # HF moves begin_suppress_tokens behind a forced first token.
    begins = length == (1 if settings.forced_bos_token_id is None else 2)
    return settings.suppress_tokens + settings.begin_suppress_tokens * begins
