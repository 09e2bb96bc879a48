"""What is remembered of searches: arrays of N requests with K beams each, which grow and close up together."""

from functools import lru_cache

import numpy as np
from numpy.typing import DTypeLike, NDArray

from florence2.generation.settings import GenerationSettings

Ids = NDArray[np.int64]
Scores = NDArray[np.float32]

LOSES = np.float32(-1.0e9)
"""HF's stand-in for minus infinity: scores that must lose against any real one, yet keep an order."""
NONE = -1
"""In the place of a token."""
_FIELDS: dict[str, tuple[str, DTypeLike]] = {
    "sequences": ("KL", np.int32),
    "logprobs": ("KL", np.float32),
    "scores": ("K", np.float32),
    "beam_indices": ("K", np.int64),
    "worst": ("", np.float32),
    "penalties": ("L", np.float32),
    **{name: ("", np.int64) for name in ("lengths", "max_lengths", "end_tokens", "forced_first", "forced_last")},
    "ngram_sizes": ("", np.int64),
    **{name: ("", np.bool_) for name in ("stops_when_full", "hopes_to_the_end", "full")},
}
"""By name the axes behind N, and the type."""


class SearchState:
    """Each array's first axis is N; L is the longest answer that any of them may have had so far."""

    sequences: NDArray[np.int32]
    """[N, K, L]; NONE behind the last token."""
    logprobs: Scores
    """[N, K, L]: of each token; 0 for the decoder start."""
    scores: Scores
    """[N, K]: sums of the log-probabilities."""
    beam_indices: Ids
    """[N, K]: the beam of the previous step that each beam continues."""
    worst: Scores
    """[N]: what the next answer must beat; LOSES while there is room for it."""
    full: NDArray[np.bool_]
    """[N]: as many answers have ended as there are beams."""
    penalties: Scores
    """[N, L]: what the sum of so many log-probabilities is divided by."""
    lengths: Ids
    """[N]: tokens so far, decoder start included."""
    max_lengths: Ids
    """[N]"""
    end_tokens: Ids
    """[N]"""
    forced_first: Ids
    """[N]: the token behind the decoder start, or NONE."""
    forced_last: Ids
    """[N]: the token at the limit, or NONE."""
    ngram_sizes: Ids
    """[N]: `no_repeat_ngram_size`."""
    stops_when_full: NDArray[np.bool_]
    """[N]: `early_stopping` is True."""
    hopes_to_the_end: NDArray[np.bool_]
    """[N]: `early_stopping` is "never", and length is a gain."""

    everyone: Ids
    """[N]: 0, 1, 2 ..."""

    def __init__(self, num_beams: int) -> None:
        self.beams = np.arange(num_beams)
        """[K]: 0, 1, 2 ..."""
        self.longest = 0
        """Tokens of the longest sequence."""
        self._count = 0
        self._arrays: dict[str, NDArray] = {}
        self._allocate(0, 0)

    def append(self, settings: GenerationSettings) -> None:
        """One more request, with its decoder start. A failure changes nothing."""
        table = penalties(settings.length_penalty, settings.positions)
        room, length = self._arrays["penalties"].shape
        if self._count == room or settings.max_length > length:
            self._allocate(max(room, 2 * self._count, 1), max(length, settings.max_length))
        self._count += 1
        self._view()
        self.sequences[-1] = NONE
        self.sequences[-1, :, 0] = settings.decoder_start_token_id
        self.logprobs[-1, :, 0] = 0
        # Only the first beam counts at the start, or every beam would be the same.
        self.scores[-1] = np.where(self.beams == 0, np.float32(0), LOSES)
        self.beam_indices[-1] = self.beams
        self.worst[-1], self.full[-1] = LOSES, False
        self.penalties[-1, : settings.max_length] = table[: settings.max_length]
        self.lengths[-1], self.max_lengths[-1] = 1, settings.max_length
        self.end_tokens[-1] = settings.eos_token_id
        self.forced_first[-1] = _or_none(settings.forced_bos_token_id)
        self.forced_last[-1] = _or_none(settings.forced_eos_token_id)
        self.ngram_sizes[-1] = settings.no_repeat_ngram_size
        self.stops_when_full[-1] = settings.early_stopping is True
        self.hopes_to_the_end[-1] = settings.early_stopping == "never" and settings.length_penalty > 0
        self.longest = max(self.longest, 1)

    def replace_by_last(self, index: int) -> None:
        """This request is no more; the last one has its place."""
        self._count -= 1
        for array in self._arrays.values():
            array[index] = array[self._count]
        self._view()
        self.longest = int(self.lengths.max(initial=0))

    def _allocate(self, room: int, length: int) -> None:
        sizes = {"K": len(self.beams), "L": length}
        allocated = {}
        for name, (axes, dtype) in _FIELDS.items():
            allocated[name] = np.full((room, *(sizes[axis] for axis in axes)), NONE, dtype)
            old = self._arrays.get(name)
            if old is not None:
                allocated[name][tuple(map(slice, old.shape))] = old
        self._arrays = allocated
        self._view()

    def _view(self) -> None:
        self.everyone = np.arange(self._count)
        for name, array in self._arrays.items():
            setattr(self, name, array[: self._count])


def _or_none(token: int | None) -> int:
    return NONE if token is None else token


@lru_cache(maxsize=64)
def penalties(length_penalty: float, count: int) -> Scores:
    """[count]: 0, 1, 2 ... ** `length_penalty`: in double, then rounded, as Python's power meets a float32 tensor; too
    large or too small is no error here."""
    with np.errstate(all="ignore"):
        # One by one: numpy's power of a whole array may round the last bit otherwise.
        powers = [np.float64(generated) ** np.float64(length_penalty) for generated in range(count)]
        return np.array(powers).astype(np.float32)
