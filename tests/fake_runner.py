"""Requests of any size, and a runner without graphs."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from florence2.generation.beam_search import Candidates, Searches
from florence2.generation.caches import CacheSizes
from florence2.generation.request import Request
from florence2.generation.settings import GenerationSettings

START, TOKEN, END = 2, 5, 9
IMAGE_TOKENS = 5


def request(
    tokens: int = 3,
    num_beams: int = 1,
    encoder_length: int = 16,
    *,
    respond: Callable[[Any], None] = lambda _: None,
    deadline: float = math.inf,
    is_cancelled: Callable[[], bool] = lambda: False,
    may_be_cancelled_late: bool = True,
) -> Request:
    """One that the `FakeRunner` answers with START and so many times TOKEN."""
    settings = GenerationSettings(
        decoder_start_token_id=START, eos_token_id=END, max_length=tokens + 1, positions=1024, num_beams=num_beams
    )
    features, prompt = np.zeros((IMAGE_TOKENS, 1), np.float32), np.zeros(encoder_length - IMAGE_TOKENS, np.int64)
    return Request(features, prompt, settings, respond, deadline, is_cancelled, may_be_cancelled_late)


class FakeRunner:
    """Notes who is encoded, decoded and released. TOKEN is always the best that can follow; nothing ends by itself."""

    def __init__(self, caches: CacheSizes) -> None:
        self.caches = caches
        self.ready: list[Request] = []
        self.encoded: list[list[Request]] = []
        self.decoded: list[list[Request]] = []
        self.released: list[Request] = []
        self.cleared: list[Request] = []

    def encode(self, requests: Sequence[Request]) -> None:
        self.encoded.append(list(requests))
        # Who was released may come again: together and then alone.
        self.released = [request for request in self.released if request not in requests]
        self.ready += requests
        assert self.caches.hold(self.ready)

    def decode(self, searches: Sequence[Searches[Request]]) -> list[Candidates]:
        asked = [request for own in searches for request in own.requests]
        assert len(asked) == len(self.ready)
        assert set(asked) == set(self.ready)
        self.decoded.append(list(self.ready))
        return [self._candidates(own) for own in searches]

    def clear(self, request: Request) -> None:
        assert request in self.ready
        self.cleared.append(request)

    def release(self, request: Request) -> None:
        assert request not in self.released
        self.released.append(request)
        if request in self.ready:
            self.ready.remove(request)

    @staticmethod
    def _candidates(searches: Searches[Request]) -> Candidates:
        ids, logprobs = np.array([TOKEN, 6, 7]), np.array([-0.5, -50, -60], np.float32)
        beams = len(searches.requests), searches.num_beams, 1
        return np.tile(ids, beams), np.tile(logprobs, beams)
