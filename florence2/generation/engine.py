"""In-flight beam search: every running request shares every step, each with settings of its own."""

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from florence2.errors import Cancelled, TimeIsOver, Unavailable
from florence2.faults import Faults, is_of_the_device
from florence2.generation.beam_search import Candidates, Generation, Searches, new_searches
from florence2.generation.errands import Errands
from florence2.generation.request import Request
from florence2.generation.scheduler import Scheduler

ASKED_EVERY = 0.05
"""Seconds between two times that running requests are asked whether they were cancelled: each time goes to the server
and back."""


class Runner(Protocol):
    """What runs the graphs, or stands in for it."""

    def encode(self, requests: Sequence[Request]) -> None:
        """Make these ready to be decoded, together."""

    def decode(self, searches: Sequence[Searches[Request]]) -> list[Candidates]:
        """One step of all that run -> for each of `searches` candidate ids and log-probabilities [N, K, C], best
        first."""

    def clear(self, request: Request) -> None:
        """Whatever the caches hold of it must reach nobody else."""

    def release(self, request: Request) -> None:
        """It won't be decoded any more, or never was ready to be."""


@dataclass
class Counters:
    """Since the engine was made."""

    steps: int = 0
    failed_steps: int = 0
    """Runs of either graph."""
    tokens: int = 0
    encoder_seconds: float = 0.0
    decoder_seconds: float = 0.0
    first_tokens: int = 0
    first_token_seconds: float = 0.0
    waiting_seconds: float = 0.0
    running_seconds: float = 0.0


class Engine:
    """`submit` may be called from any thread, `step` from one."""

    def __init__(self, runner: Runner, scheduler: Scheduler) -> None:
        self.runner, self.scheduler = runner, scheduler
        self.counters = Counters()
        self.errands = Errands()
        """Beside the steps, while the engine runs in a thread of its own."""
        self._changed = threading.Condition()
        self._closed: str | None = None
        self._searches: dict[int, Searches[Request]] = {}
        """Of all that run, by their number of beams."""
        self._ask_next, self._next_deadline = 0.0, math.inf
        self._encoder_faults, self._decoder_faults = Faults(), Faults()

    def submit(self, request: Request) -> None:
        """Returns at once; the answer comes through `request.respond`. Raises InvalidRequest or Unavailable."""
        with self._changed:
            if self._closed:
                raise Unavailable(self._closed)
            request.submitted = time.perf_counter()
            self.scheduler.add(request)
            self._next_deadline = min(self._next_deadline, request.deadline)
            self._changed.notify()

    def step(self) -> None:
        """Who has gone makes room, who waits moves in, all that run get their next token."""
        self._give_up()
        self._encode(self._admit())
        self._decode([searches for searches in self._searches.values() if searches.requests])

    def _give_up(self) -> None:
        """Those whose time is over, waiting or running, and those who were cancelled while they ran."""
        now = time.monotonic()
        if now >= self._next_deadline:
            with self._changed:
                everybody = [*self.scheduler.running, *self.scheduler.waiting]
                self._next_deadline = min((one.deadline for one in everybody if one.deadline > now), default=math.inf)
            for request in everybody:
                if request.deadline <= now:
                    self._retire(request, TimeIsOver("the request's time is over; ask for less, or allow more time"))
        if now >= self._ask_next:
            self._ask_next = now + ASKED_EVERY
            self._drop_cancelled([request for request in self.scheduler.running if request.may_be_cancelled_late])

    def _admit(self) -> list[Request]:
        with self._changed:
            admitted = self.scheduler.admit()
        now = time.perf_counter()
        for request in admitted:
            request.admitted = now
            self.counters.waiting_seconds += now - request.submitted
        return self._drop_cancelled(admitted)

    def _drop_cancelled(self, requests: list[Request]) -> list[Request]:
        """The others."""
        kept = []
        for request in requests:
            reason: Exception | None
            try:
                reason = Cancelled("the request was cancelled") if request.is_cancelled() else None
            except Exception as error:
                reason = error
            if reason:
                self._retire(request, reason)
            else:
                kept.append(request)
        return kept

    def _encode(self, admitted: list[Request]) -> None:
        if not admitted:
            return
        started = time.perf_counter()
        try:
            self._run_encoder(admitted)
        finally:
            self.counters.encoder_seconds += time.perf_counter() - started

    def _run_encoder(self, requests: list[Request]) -> None:
        """Together, and where that fails one by one: only those who can't be encoded are refused. Raises for a fault
        that stays."""
        try:
            self.runner.encode(requests)
            self._encoder_faults.worked()
        except Exception as error:
            self.counters.failed_steps += 1
            if len(requests) > 1 and not is_of_the_device(error):
                for request in requests:
                    self.runner.release(request)
                for request in requests:
                    self._run_encoder([request])
                return
            self._fail(requests, error)
            if self._encoder_faults.failed(error):
                raise
            return
        for request in requests:
            try:
                self._searches_with(request.num_beams).add(request, request.settings)
            except Exception as error:
                self._fail([request], error)

    def _searches_with(self, num_beams: int) -> Searches[Request]:
        if num_beams not in self._searches:
            self._searches[num_beams] = new_searches(num_beams)
        return self._searches[num_beams]

    def _decode(self, running: list[Searches[Request]]) -> None:
        if not running:
            return
        started = time.perf_counter()
        first = [own.requests[index] for own in running for index in (own.lengths == 1).nonzero()[0]]
        try:
            candidates = self.runner.decode(running)
            self._decoder_faults.worked()
        except Exception as error:
            self.counters.failed_steps += 1
            self._fail([request for searches in running for request in searches.requests], error)
            if self._decoder_faults.failed(error):
                raise
            return
        now = time.perf_counter()
        self.counters.steps += 1
        self.counters.tokens += sum(len(searches.requests) for searches in running)
        self.counters.decoder_seconds += now - started
        self.counters.first_tokens += len(first)
        self.counters.first_token_seconds += sum(now - request.submitted for request in first)
        for searches, found in zip(running, candidates, strict=True):
            self._advance(searches, *found)

    def _advance(self, searches: Searches[Request], ids: NDArray[np.int64], logprobs: NDArray[np.float32]) -> None:
        # False for what is no number, too.
        sound = (logprobs <= 0).all(axis=(1, 2))
        try:
            finished = searches.advance(ids, logprobs)
        except Exception as error:
            self._fail(list(searches.requests), error)
            return
        ended = [(searches.requests[index], sound[index]) for index in (finished | ~sound).nonzero()[0]]
        # Searches stand in any order.
        for request, is_sound in sorted(ended, key=lambda pair: pair[0].submitted):
            self._end(searches, request, is_sound)

    def _end(self, searches: Searches[Request], request: Request, is_sound: bool) -> None:
        try:
            if not is_sound:
                self.runner.clear(request)
                raise RuntimeError("the decoder gave log-probabilities that are none; nothing of them is kept")
            answer = searches.result(request)
        except Exception as error:
            self._fail([request], error)
        else:
            self._retire(request, answer)

    def _fail(self, requests: list[Request], error: Exception) -> None:
        for request in requests:
            self._retire(request, error)

    def _retire(self, request: Request, answer: Generation | Exception) -> None:
        with self._changed:
            self.scheduler.remove(request)
        searches = self._searches.get(request.num_beams)
        if searches and request in searches.requests:
            searches.remove(request)
        if request.admitted is not None:
            self.counters.running_seconds += time.perf_counter() - request.admitted
        try:
            self.runner.release(request)
        finally:
            self.errands.add(partial(request.respond, answer))

    def run(self, after_step: Callable[[], None] = lambda: None) -> None:
        """Step while there is something to do, wait while there is not, until `close`. Whoever is left then is told, or
        when this raises: for a fault that stays, or of the engine's own."""
        reason = "the engine has failed"
        try:
            with self.errands:
                while self._wait():
                    self.step()
                    after_step()
            reason = "the server is stopping"
        finally:
            self.close(reason)
            with self._changed:
                left = [*self.scheduler.running, *self.scheduler.waiting]
                self.scheduler.running.clear()
                self.scheduler.waiting.clear()
            # The runner, which may be what has failed, is left as it is.
            for request in left:
                self.errands.add(partial(request.respond, Unavailable(str(self._closed))))

    def _wait(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or not self.is_idle)
            return not self._closed

    def close(self, reason: str = "the server is stopping") -> None:
        """No request is taken any more, and `run` returns after its step."""
        with self._changed:
            self._closed = self._closed or reason
            self._changed.notify()

    @property
    def is_idle(self) -> bool:
        return not (self.scheduler.running or self.scheduler.waiting)

    def finish(self) -> None:
        """Step, in the caller's thread, until nothing is left to do."""
        while not self.is_idle:
            self.step()
