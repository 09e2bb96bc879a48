"""Which tokens come next, for many requests at once: greedy and beam search as `transformers` defines them, in numpy.

No graph is run here. Each step the caller reads `input_ids`, `beam_indices` and `banned_tokens()`, runs the decoder,
and hands its candidates to `advance`. Arithmetic is float32, as in `GenerationMixin._beam_search` and `_sample`
(transformers 5.13), whose order of operations is kept because it decides ties and the rounding of scores.
tests/generation/one_search.py is the same for one request, where transformers' code is easier to see.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from florence2.generation.search_state import LOSES, NONE, SearchState
from florence2.generation.settings import GenerationSettings
from florence2.generation.token_rules import repeating, suppressed

Ids = NDArray[np.int64]
Scores = NDArray[np.float32]
Candidates = tuple[Ids, Scores]
"""Tokens that may come next and their log-probabilities, both [N, K, C], best first."""
Flags = NDArray[np.bool_]
R = TypeVar("R")


@dataclass(frozen=True)
class Generation:
    """One finished answer."""

    token_ids: Ids
    """[L], decoder start included, as `generate` returns them."""
    token_logprobs: Scores
    """[L - 1], one per generated token: as `compute_transition_scores`; 0 for forced tokens."""
    sequence_score: float
    """Sum of the log-probabilities / (L - 1) ** length_penalty."""
    finish_reason: str
    """"stop" if the model ended the answer, "length" if the limit did."""


class Searches(ABC, Generic[R]):
    """N requests with the same number of beams, K, and each with settings of its own."""

    def __init__(self, num_beams: int) -> None:
        self.num_beams = num_beams
        self.requests: list[R] = []
        """In the order of every array's first axis. Who leaves is replaced by the last."""
        self._settings: list[GenerationSettings] = []
        self._state = SearchState(num_beams)

    def add(self, request: R, settings: GenerationSettings) -> None:
        self._state.append(settings)
        self.requests.append(request)
        self._settings.append(settings)

    def remove(self, request: R) -> None:
        index = self.requests.index(request)
        self._state.replace_by_last(index)
        for kept in self._lists():
            kept[index] = kept[-1]
            kept.pop()

    def _lists(self) -> tuple[list, ...]:
        """What there is of each request beside the arrays."""
        return self.requests, self._settings

    @property
    def lengths(self) -> Ids:
        """[N]: tokens so far, decoder start included."""
        return self._state.lengths

    @property
    def input_ids(self) -> NDArray[np.int32]:
        """[N, K]: the last token of each beam, next decoder input."""
        return self._state.sequences[self._state.everyone, :, self._state.lengths - 1]

    @property
    def beam_indices(self) -> Ids:
        """[N, K]: the beam of the previous step that each beam continues, to reorder caches."""
        return self._state.beam_indices

    def banned_tokens(self) -> tuple[Ids, Ids]:
        """Beams, counted through from 0 to N x K - 1 and rising, and tokens that may not come next in them; some
        perhaps twice."""
        state, beams = self._state, self.num_beams
        lengths = np.repeat(state.lengths, beams)
        sequences = state.sequences[:, :, : state.longest].reshape(len(lengths), state.longest)
        found = []
        for size in {settings.no_repeat_ngram_size for settings in self._settings} - {0}:
            if (state.ngram_sizes == size).all():
                found.append(repeating(sequences, lengths, size))
            else:
                (own,) = np.repeat(state.ngram_sizes == size, beams).nonzero()
                rows, tokens = repeating(sequences[own], lengths[own], size)
                found.append((own[rows], tokens))
        for index, settings in enumerate(self._settings):
            if settings.suppress_tokens or settings.begin_suppress_tokens:
                always = suppressed(settings, int(state.lengths[index]))
                rows = np.arange(index * beams, (index + 1) * beams)
                found.append((np.repeat(rows, len(always)), np.tile(np.array(always, np.int64), beams)))
        if len(found) == 1:
            return found[0]
        nothing = np.zeros(0, np.int64)
        rows, tokens = (np.concatenate([nothing, *(pair[part] for pair in found)]) for part in (0, 1))
        order = np.argsort(rows, kind="stable")
        return rows[order], tokens[order]

    def advance(self, candidate_ids: Ids, candidate_logprobs: Scores) -> Flags:
        """Take one step. Both [N, K, C], best first: per beam the best tokens after the bans, with log-probabilities
        -> [N]: whose answer is finished."""
        # Absurd length penalties make scores that are no numbers; they are no error here.
        with np.errstate(all="ignore"):
            return self._advance(*self._forced(candidate_ids, candidate_logprobs))

    @abstractmethod
    def _advance(self, ids: Ids, logprobs: Scores) -> Flags: ...

    @abstractmethod
    def result(self, request: R) -> Generation:
        """Of one that is finished."""

    def _forced(self, ids: Ids, logprobs: Scores) -> tuple[Ids, Scores]:
        state = self._state
        tokens = np.where(state.lengths == 1, state.forced_first, NONE)
        # Where both apply the end wins, as in HF.
        at_limit = (state.lengths == state.max_lengths - 1) & (state.forced_last != NONE)
        tokens = np.where(at_limit, state.forced_last, tokens)
        (forced,) = (tokens != NONE).nonzero()
        if len(forced):
            # HF sets the forced token to 0 and all others to minus infinity; which others fill the lower ranks is all
            # the same.
            ids, logprobs = ids.copy(), logprobs.copy()
            ids[forced, :, 0] = tokens[forced, None]
            logprobs[forced] = -np.inf
            logprobs[forced, :, 0] = 0
        return ids, logprobs

    def _write(self, ids: Ids, logprobs: Scores) -> None:
        """Of each beam, [N, K], the next token."""
        state = self._state
        state.sequences[state.everyone, :, state.lengths] = ids
        state.logprobs[state.everyone, :, state.lengths] = logprobs
        state.lengths += 1
        state.longest += 1

    def _generation(self, index: int, sequence: NDArray, logprobs: Scores, score: np.float32) -> Generation:
        settings = self._settings[index]
        at_limit = len(sequence) == settings.max_length
        forced = settings.forced_eos_token_id is not None
        ended = sequence[-1] == settings.eos_token_id and not (at_limit and forced)
        reason = "stop" if ended else "length"
        return Generation(sequence.astype(np.int64), logprobs.copy(), float(score), reason)


class GreedySearches(Searches[R]):
    """HF's `_sample` without sampling."""

    def __init__(self) -> None:
        super().__init__(1)

    def _advance(self, ids: Ids, logprobs: Scores) -> Flags:
        state, best = self._state, ids[:, :, 0]
        self._write(best, logprobs[:, :, 0])
        return (best[:, 0] == state.end_tokens) | (state.lengths >= state.max_lengths)

    def result(self, request: R) -> Generation:
        index = self.requests.index(request)
        state, length = self._state, self._state.lengths[index]
        logprobs = state.logprobs[index, 0, 1:length]
        with np.errstate(all="ignore"):
            score = _divided(logprobs.sum(dtype=np.float32), state.penalties[index, length - 1])
        return self._generation(index, state.sequences[index, 0, :length], logprobs, np.float32(score))


class BeamSearches(Searches[R]):
    """HF's `_beam_search`, for each request by itself. Candidates of all its beams compete; the best `2 * num_beams`
    are looked at, so that `num_beams` stay running when some of them end."""

    def __init__(self, num_beams: int) -> None:
        super().__init__(num_beams)
        self._ended: list[list[_Ended]] = []
        """Per request the best answers so far, at most `num_beams`, best first."""

    def add(self, request: R, settings: GenerationSettings) -> None:
        super().add(request, settings)
        self._ended.append([])

    def _lists(self) -> tuple[list, ...]:
        return *super()._lists(), self._ended

    def _advance(self, ids: Ids, logprobs: Scores) -> Flags:
        state, beams = self._state, self.num_beams
        # As a beam's candidates come best first, no more of them can be among the best of all.
        ids, logprobs = ids[:, :, : 2 * beams], logprobs[:, :, : 2 * beams]
        count, _, each = ids.shape
        totals = (logprobs + state.scores[:, :, None]).reshape(count, -1)
        best = np.argsort(-totals, axis=1, kind="stable")[:, : 2 * beams]
        places = best + state.everyone[:, None] * (beams * each)
        tops = _Tops(best // each, ids.reshape(-1)[places], logprobs.reshape(-1)[places], totals.reshape(-1)[places])
        ends = (tops.ids == state.end_tokens[:, None]) | (state.lengths + 1 >= state.max_lengths)[:, None]
        if ends.any():
            self._collect(tops, ends)
            tops = tops.without(ends)
        self._run_on(tops)
        return ends.all(axis=1) | (state.stops_when_full & state.full) | ~self._can_improve()

    def _collect(self, tops: "_Tops", ends: Flags) -> None:
        """What ended among the best `num_beams` competes with what ended before."""
        state, beams = self._state, self.num_beams
        for index in ends[:, :beams].any(axis=1).nonzero()[0].tolist():
            length, ended = state.lengths[index], self._ended[index]
            for rank in np.flatnonzero(ends[index, :beams]):
                beam = tops.beams[index, rank]
                sequence = np.append(state.sequences[index, beam, :length], tops.ids[index, rank])
                logprobs = np.append(state.logprobs[index, beam, 1:length], tops.logprobs[index, rank])
                score = _divided(tops.totals[index, rank], state.penalties[index, length])
                ended.append(_Ended(sequence, logprobs, np.float32(score)))
            ended.sort(key=lambda one: -one.score)
            del ended[beams:]
            if len(ended) == beams:
                state.full[index], state.worst[index] = True, ended[-1].score

    def _run_on(self, tops: "_Tops") -> None:
        """The best become the beams."""
        state, beams = self._state, self.num_beams
        parents = tops.beams[:, :beams]
        state.beam_indices[:] = parents
        state.scores[:] = tops.totals[:, :beams]
        (moved,) = (parents != state.beams).any(axis=1).nonzero()
        if len(moved):
            others = moved[:, None], parents[moved], slice(state.longest)
            state.sequences[moved, :, : state.longest] = state.sequences[others]
            state.logprobs[moved, :, : state.longest] = state.logprobs[others]
        self._write(tops.ids[:, :beams], tops.logprobs[:, :beams])

    def _can_improve(self) -> Flags:
        """HF's `_check_early_stop_heuristic`: could the best running beam still beat the worst that ended?"""
        state = self._state
        generated = np.where(state.hopes_to_the_end, state.max_lengths, state.lengths) - 1
        penalty = state.penalties[state.everyone, generated]
        return _divided(state.scores[:, 0], penalty) > state.worst

    def result(self, request: R) -> Generation:
        index = self.requests.index(request)
        if not self._ended[index]:
            # Only a length penalty that makes every score infinite gets here; HF returns the start token alone too.
            return self._generation(index, self._state.sequences[index, 0, :1], np.zeros(0, np.float32), LOSES)
        best = self._ended[index][0]
        return self._generation(index, best.sequence, best.logprobs, best.score)


@dataclass(frozen=True)
class _Ended:
    sequence: Ids
    logprobs: Scores
    score: np.float32


@dataclass(frozen=True)
class _Tops:
    """The best continuations of a step, each [N, 2 * num_beams], best first."""

    beams: Ids
    ids: Ids
    logprobs: Scores
    totals: Scores

    def without(self, ends: Flags) -> "_Tops":
        """Those behind all others."""
        running = self.totals + ends.astype(np.float32) * LOSES
        order = np.argsort(-running, axis=1, kind="stable")
        own = np.arange(len(order))[:, None]
        return _Tops(self.beams[own, order], self.ids[own, order], self.logprobs[own, order], running[own, order])


def _divided(scores: Scores, penalties: Scores) -> Scores:
    quotients = scores / penalties
    return quotients if np.isfinite(quotients).all() else np.nan_to_num(quotients, nan=-np.inf)


def new_searches(num_beams: int) -> Searches:
    """What HF's `generate` picks."""
    return GreedySearches() if num_beams == 1 else BeamSearches(num_beams)
