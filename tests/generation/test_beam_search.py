"""Searches of all requests at once against one_search.py, bit for bit, whoever comes, goes and ends meanwhile. Against
transformers they are held by tests/differential/test_generation.py."""

import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from one_search import start

from florence2.generation.beam_search import Generation, new_searches
from florence2.generation.search_state import penalties
from florence2.generation.settings import GenerationSettings

EOS, BOS, VOCABULARY, POSITIONS = 2, 0, 40, 64
CANDIDATES = 16


def random_settings(choose: random.Random, num_beams: int) -> GenerationSettings:
    tokens = range(3, VOCABULARY)
    return GenerationSettings(
        decoder_start_token_id=EOS,
        eos_token_id=EOS,
        positions=POSITIONS,
        max_length=choose.choice([2, 3, 5, 9, 20, POSITIONS]),
        num_beams=num_beams,
        length_penalty=choose.choice([0.0, 0.5, 0.6, 1.0, 2.0, -1.0, 1e300, -1e300]),
        early_stopping=choose.choice([True, False, "never"]),
        no_repeat_ngram_size=choose.choice([0, 1, 2, 3, 3, 3, 4, 100]),
        forced_bos_token_id=choose.choice([None, BOS]),
        forced_eos_token_id=choose.choice([None, EOS]),
        suppress_tokens=tuple(choose.choice([(), (), (), choose.sample(tokens, 3)])),
        begin_suppress_tokens=tuple(choose.choice([(), (), (), choose.sample(tokens, 3)])),
    )


def random_candidates(rng: np.random.Generator, beams: int, each: int) -> tuple[np.ndarray, np.ndarray]:
    """[K, C], best first, with ties, endings and tokens that come again."""
    ids = np.stack([rng.permutation(VOCABULARY)[:each] for _ in range(beams)])
    coarse = rng.integers(0, 6, ids.shape) * rng.choice([0.25, 0.5, 1.0], ids.shape)
    logprobs = np.where(rng.random(ids.shape) < 0.5, coarse, rng.exponential(3, ids.shape))
    if rng.random() < 0.1:
        logprobs[:, rng.integers(1, each + 1) :] = np.inf
    return ids, -np.sort(logprobs.astype(np.float32), axis=1)


@dataclass(eq=False)
class Asked:
    """One request, by itself."""

    settings: GenerationSettings
    search: Any = field(init=False)

    def __post_init__(self) -> None:
        self.search = start(self.settings)


def same(found: Generation, expected: Generation) -> None:
    assert found.token_ids.tolist() == expected.token_ids.tolist()
    assert found.token_ids.dtype == np.int64
    assert found.token_logprobs.tobytes() == expected.token_logprobs.tobytes()
    assert (found.sequence_score, found.finish_reason) == (expected.sequence_score, expected.finish_reason)


@given(st.sampled_from([1, 2, 3, 4, 5, 8]), st.integers(0, 2**32))
@settings(max_examples=150, deadline=None)
def test_all_at_once_is_as_one_by_one(num_beams: int, seed: int) -> None:
    choose, rng = random.Random(seed), np.random.default_rng(seed)
    each = choose.choice([2, 5, CANDIDATES, CANDIDATES])
    searches = new_searches(num_beams)
    for _ in range(40):
        while len(searches.requests) < 6 and choose.random() < 0.4:
            asked = Asked(random_settings(choose, num_beams))
            searches.add(asked, asked.settings)
        if searches.requests and choose.random() < 0.1:
            searches.remove(choose.choice(searches.requests))
        if not searches.requests:
            continue
        rows, tokens = searches.banned_tokens()
        assert (np.diff(rows) >= 0).all()
        candidates = []
        for index, asked in enumerate(searches.requests):
            one = asked.search
            assert searches.lengths[index] == one.length
            assert searches.input_ids[index].tolist() == one.input_ids.tolist()
            assert searches.beam_indices[index].tolist() == one.beam_indices.tolist()
            for beam, banned in enumerate(one.banned_tokens()):
                assert set(tokens[rows == index * num_beams + beam].tolist()) == set(banned.tolist())
            candidates.append(random_candidates(rng, num_beams, each))
            one.advance(*candidates[-1])
        ids, logprobs = (np.stack(part) for part in zip(*candidates, strict=True))
        # One whose numbers are none is dropped after the step; nobody else notices.
        broken = choose.choice(searches.requests) if choose.random() < 0.05 else None
        if broken:
            logprobs[searches.requests.index(broken), :, choose.randrange(each) :] = choose.choice([np.nan, 1, np.inf])
        finished = searches.advance(ids, logprobs).tolist()
        for asked, has in zip(list(searches.requests), finished, strict=True):
            if asked is broken:
                searches.remove(asked)
                continue
            assert has == asked.search.finished
            if has:
                same(searches.result(asked), asked.search.result())
                searches.remove(asked)


@pytest.mark.parametrize("length_penalty", [0.0, 0.6, 1.0, -2.5, 1e300])
def test_penalties_are_pythons_power_in_32_bits(length_penalty: float) -> None:
    table = penalties(length_penalty, 1024)
    for generated in (1, 2, 3, 10, 100, 1000):
        try:
            assert table[generated] == np.float32(generated**length_penalty)
        except OverflowError:
            assert np.isinf(table[generated])
