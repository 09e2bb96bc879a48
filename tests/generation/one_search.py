"""The searches of florence2/generation/beam_search.py, for one request at a time and as short as they can be said: what
those, for all requests at once, are held against. In the order of operations of `GenerationMixin._beam_search` and
`_sample` (transformers 5.13), which decides ties and the rounding of scores.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from florence2.generation.beam_search import Generation
from florence2.generation.settings import GenerationSettings

Ids = NDArray[np.int64]
Scores = NDArray[np.float32]

# HF's stand-in for minus infinity: scores that must lose against any real one, yet keep an order.
_LOSES = np.float32(-1.0e9)


def start(settings: GenerationSettings) -> "GreedySearch | BeamSearch":
    """The search that HF's `generate` picks for these settings."""
    return GreedySearch(settings) if settings.num_beams == 1 else BeamSearch(settings)


class GreedySearch:
    """HF's `_sample` without sampling."""

    def __init__(self, settings: GenerationSettings) -> None:
        self.settings = settings
        self.sequence: list[int] = [settings.decoder_start_token_id]
        self.logprobs: list[np.float32] = []
        self.beam_indices = np.zeros(1, np.int64)
        self.finished = False

    @property
    def input_ids(self) -> Ids:
        return np.array(self.sequence[-1:], np.int64)

    @property
    def length(self) -> int:
        return len(self.sequence)

    def banned_tokens(self) -> list[Ids]:
        return banned_tokens(np.array([self.sequence], np.int64), self.settings)

    def advance(self, candidate_ids: Ids, candidate_logprobs: Scores) -> None:
        ids, logprobs = _forced(self.settings, self.length, candidate_ids, candidate_logprobs)
        self.sequence.append(int(ids[0, 0]))
        self.logprobs.append(logprobs[0, 0])
        ended = self.sequence[-1] == self.settings.eos_token_id
        self.finished = ended or self.length >= self.settings.max_length

    def result(self) -> Generation:
        logprobs = np.array(self.logprobs, np.float32)
        score = _divide(logprobs.sum(dtype=np.float32), _penalty(len(logprobs), self.settings))
        return _generation(self.settings, np.array(self.sequence, np.int64), logprobs, score)


class BeamSearch:
    """HF's `_beam_search` for a batch of one. Candidates of all beams compete; the best `2 * num_beams` are looked at,
    so that `num_beams` stay running when some of them end."""

    def __init__(self, settings: GenerationSettings) -> None:
        beams, max_length = settings.num_beams, settings.max_length
        self.settings = settings
        self.length = 1
        self.finished = False
        self.beam_indices = np.arange(beams)
        self._sequences = np.zeros((beams, max_length), np.int64)
        self._sequences[:, 0] = settings.decoder_start_token_id
        self._logprobs = np.zeros((beams, max_length - 1), np.float32)
        # Only the first beam counts at the start, or every beam would be the same.
        self._scores = np.where(np.arange(beams) == 0, np.float32(0), _LOSES)
        self._ended: list[_Ended] = []

    @property
    def input_ids(self) -> Ids:
        return self._sequences[:, self.length - 1]

    def banned_tokens(self) -> list[Ids]:
        return banned_tokens(self._sequences[:, : self.length], self.settings)

    def advance(self, candidate_ids: Ids, candidate_logprobs: Scores) -> None:
        settings = self.settings
        ids, logprobs = _forced(settings, self.length, candidate_ids, candidate_logprobs)
        totals = (logprobs + self._scores[:, None]).reshape(-1)
        best = np.argsort(-totals, kind="stable")[: 2 * settings.num_beams]
        tops = _Tops(best // ids.shape[1], ids.reshape(-1)[best], logprobs.reshape(-1)[best], totals[best])
        ends = (tops.ids == settings.eos_token_id) | (self.length + 1 >= settings.max_length)
        self._collect(tops, ends)
        self._run_on(tops, ends)
        self.length += 1
        full = len(self._ended) == settings.num_beams
        self.finished = bool(ends.all()) or (settings.early_stopping is True and full) or not self._can_improve()

    def _collect(self, tops: "_Tops", ends: NDArray[np.bool_]) -> None:
        """What ended among the best `num_beams` competes with what ended before."""
        penalty = _penalty(self.length, self.settings)
        for rank in np.flatnonzero(ends[: self.settings.num_beams]):
            beam = tops.beams[rank]
            sequence = np.append(self._sequences[beam, : self.length], tops.ids[rank])
            logprobs = np.append(self._logprobs[beam, : self.length - 1], tops.logprobs[rank])
            self._ended.append(_Ended(sequence, logprobs, _divide(tops.totals[rank], penalty)))
        self._ended.sort(key=lambda ended: -ended.score)
        del self._ended[self.settings.num_beams :]

    def _run_on(self, tops: "_Tops", ends: NDArray[np.bool_]) -> None:
        """The best that go on become the beams."""
        running = tops.totals + ends.astype(np.float32) * _LOSES
        kept = np.argsort(-running, kind="stable")[: self.settings.num_beams]
        self.beam_indices = tops.beams[kept]
        self._scores = running[kept]
        self._sequences = self._sequences[self.beam_indices]
        self._sequences[:, self.length] = tops.ids[kept]
        self._logprobs = self._logprobs[self.beam_indices]
        self._logprobs[:, self.length - 1] = tops.logprobs[kept]

    def _can_improve(self) -> bool:
        """HF's `_check_early_stop_heuristic`: could the best running beam still beat the worst that ended?"""
        settings = self.settings
        to_the_end = settings.early_stopping == "never" and settings.length_penalty > 0
        generated = (settings.max_length if to_the_end else self.length) - 1
        worst = self._ended[-1].score if len(self._ended) == settings.num_beams else _LOSES
        return bool(_divide(self._scores[0], _penalty(generated, settings)) > worst)

    def result(self) -> Generation:
        if not self._ended:
            # Only a length penalty that makes every score infinite gets here; HF returns the start token alone too.
            return _generation(self.settings, self._sequences[0, :1], np.zeros(0, np.float32), _LOSES)
        best = self._ended[0]
        return _generation(self.settings, best.sequence, best.logprobs, best.score)


@dataclass(frozen=True)
class _Tops:
    """The best continuations of a step, each [2 * num_beams], best first."""

    beams: Ids
    ids: Ids
    logprobs: Scores
    totals: Scores


@dataclass(frozen=True)
class _Ended:
    sequence: Ids
    logprobs: Scores
    score: np.float32


def banned_tokens(sequences: Ids, settings: GenerationSettings) -> list[Ids]:
    """Per row of `sequences` [K, length] the tokens that may not follow: suppressed ones, and those that would complete
    an n-gram the row already has (HF's NoRepeatNGramLogitsProcessor)."""
    length, size = sequences.shape[1], settings.no_repeat_ngram_size
    suppressed = list(settings.suppress_tokens)
    # HF moves begin_suppress_tokens behind a forced first token.
    if length == (1 if settings.forced_bos_token_id is None else 2):
        suppressed += settings.begin_suppress_tokens
    if size == 0 or length < size:
        return [np.array(suppressed, np.int64)] * len(sequences)
    windows = np.lib.stride_tricks.sliding_window_view(sequences, size, axis=1)
    suffix = sequences[:, length + 1 - size :]
    repeats = (windows[:, :, :-1] == suffix[:, None, :]).all(axis=2)
    return [
        np.unique(np.append(row[hits, -1], np.array(suppressed, np.int64)))
        for row, hits in zip(windows, repeats, strict=True)
    ]


def forced_token(settings: GenerationSettings, length: int) -> int | None:
    """The token that must come next after `length` tokens, if any. Where both apply the end wins, as in HF."""
    if length == settings.max_length - 1 and settings.forced_eos_token_id is not None:
        return settings.forced_eos_token_id
    return settings.forced_bos_token_id if length == 1 else None


def _forced(settings: GenerationSettings, length: int, ids: Ids, logprobs: Scores) -> tuple[Ids, Scores]:
    token = forced_token(settings, length)
    if token is None:
        return ids, logprobs
    # HF sets the forced token to 0 and all others to minus infinity; which others fill the lower ranks is all the same.
    ids, logprobs = ids.copy(), np.full_like(logprobs, -np.inf)
    ids[:, 0], logprobs[:, 0] = token, 0
    return ids, logprobs


def _penalty(generated: int, settings: GenerationSettings) -> np.float32:
    # In double, then rounded, as Python's power meets a float32 tensor; too large or too small is no error here.
    with np.errstate(all="ignore"):
        return np.float32(np.float64(generated) ** np.float64(settings.length_penalty))


def _divide(score: np.float32, penalty: np.float32) -> np.float32:
    with np.errstate(all="ignore"):
        return np.nan_to_num(score / penalty, nan=-np.inf)


def _generation(settings: GenerationSettings, sequence: Ids, logprobs: Scores, score: np.float32) -> Generation:
    at_limit = len(sequence) == settings.max_length
    forced = settings.forced_eos_token_id is not None
    ended = sequence[-1] == settings.eos_token_id and not (at_limit and forced)
    return Generation(sequence, logprobs, float(score), "stop" if ended else "length")
