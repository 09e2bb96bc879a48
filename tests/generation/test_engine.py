"""The engine's promises to those who ask, with a runner that needs no graphs."""

import math
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from fake_runner import START, TOKEN, FakeRunner, request

import florence2.generation.engine as engine_module
from florence2.backend.metric_names import COUNTERS, FAILED, GAUGES, EngineFigures
from florence2.errors import Cancelled, InvalidRequest, Unavailable
from florence2.generation import search_state
from florence2.generation.beam_search import Generation
from florence2.generation.caches import CacheSizes
from florence2.generation.engine import Engine
from florence2.generation.request import Request
from florence2.generation.scheduler import Scheduler

CACHES = CacheSizes(rows=8, decoder_entries=512, encoder_entries=128, entry_values=10)
PATIENCE = 30
"""Seconds that a test waits for another thread before it fails."""


class Served:
    """An engine, and what it answered in which order."""

    def __init__(self, max_waiting: int = 1000, encoder_batch: int = 4) -> None:
        self.runner = FakeRunner(CACHES)
        self.engine = Engine(self.runner, Scheduler(CACHES, max_waiting, encoder_batch))
        self.answers: dict[Request, Generation | Exception] = {}

    def ask(self, tokens: int = 3, num_beams: int = 1, **more: Any) -> Request:
        asked = request(tokens, num_beams, **more)
        asked.respond = partial(self._answer, asked)
        self.engine.submit(asked)
        return asked

    def _answer(self, asked: Request, answer: Generation | Exception) -> None:
        self.answers[asked] = AssertionError("answered twice") if asked in self.answers else answer

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.engine.step()

    def tokens(self, asked: Request) -> list[int]:
        answer = self.answers[asked]
        assert isinstance(answer, Generation), answer
        return answer.token_ids.tolist()

    def assert_all_free(self) -> None:
        assert self.engine.is_idle
        assert self.engine.scheduler.rows_used == 0
        assert self.runner.ready == []
        assert set(self.runner.released) == set(self.answers)


@pytest.fixture
def served() -> Served:
    return Served()


class Clock:
    """Stands still until it is told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(engine_module, "time", SimpleNamespace(monotonic=clock, perf_counter=clock))
    return clock


# --- who gets which step ------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_beams", [1, 3, 8])
@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_an_answer_takes_a_step_per_token(served: Served, num_beams: int, tokens: int) -> None:
    asked = served.ask(tokens, num_beams)
    served.steps(tokens - 1)
    assert served.answers == {}
    served.steps(1)
    assert served.tokens(asked) == [START] + [TOKEN] * tokens
    assert served.runner.encoded == [[asked]]
    assert served.runner.decoded == [[asked]] * tokens
    served.assert_all_free()


def test_all_that_run_share_every_step(served: Served) -> None:
    first, second = served.ask(4), served.ask(2, 3)
    served.steps(1)
    third = served.ask(3)
    served.engine.finish()
    assert served.runner.decoded == [[first, second], [first, second, third], [first, third], [first, third]]
    assert list(served.answers) == [second, first, third]


def test_a_large_request_is_not_overtaken(served: Served) -> None:
    first, large, small = served.ask(3), served.ask(2, num_beams=8), served.ask(1)
    served.engine.finish()
    assert served.runner.decoded == [[first]] * 3 + [[large]] * 2 + [[small]]


def test_rows_are_used_again_in_the_next_step(served: Served) -> None:
    first, other, second, third = served.ask(2, 3), served.ask(5, 3), served.ask(1, 5), served.ask(2, 5)
    served.engine.finish()
    expected = [[first, other]] * 2 + [[other, second]] + [[other, third]] * 2
    assert served.runner.decoded == expected


@pytest.mark.parametrize("encoder_batch", [1, 2, 3])
def test_those_who_start_do_not_hold_up_those_who_run(encoder_batch: int) -> None:
    served = Served(encoder_batch=encoder_batch)
    running = served.ask(20)
    served.steps(1)
    others = [served.ask(3) for _ in range(6)]
    for step in range(1, 7):
        served.steps(1)
        assert len(served.runner.decoded) == step + 1
        assert running in served.runner.decoded[-1]
    assert served.runner.encoded[1:] == [others[at : at + encoder_batch] for at in range(0, 6, encoder_batch)]


def tokens_left(served: Served) -> int:
    """Of all that run or wait."""
    scheduler = served.engine.scheduler
    done = Counter(one for batch in served.runner.decoded for one in batch if one not in served.answers)
    return sum(one.settings.max_length - 1 - done[one] for one in (*scheduler.running, *scheduler.waiting))


@pytest.mark.parametrize(
    ("stream", "single"),
    [
        ({"tokens": 15}, {"tokens": 1}),
        ({"tokens": 15, "num_beams": 4}, {"tokens": 1}),
        ({"tokens": 1}, {"tokens": 15, "num_beams": 8}),
        ({"tokens": 2, "num_beams": 3}, {"tokens": 31, "num_beams": 8, "encoder_length": 128}),
    ],
)
def test_a_stream_of_others_starves_nobody(served: Served, stream: dict[str, Any], single: dict[str, Any]) -> None:
    """More come at every step than can be served. A request starts not later than if those who were there before it
    ran one after the other: after as many steps as they have tokens left. Whoever comes later does not count."""
    for _ in range(20):
        served.ask(**stream)
    served.steps(3)
    bound = tokens_left(served)
    asked = served.ask(**single)
    later = []
    steps = 0
    while asked in served.engine.scheduler.waiting and steps <= bound:
        later += [served.ask(**stream) for _ in range(4)]
        served.steps(1)
        steps += 1
    assert steps <= bound + 1
    assert any(asked in batch for batch in served.runner.encoded)
    assert not any(one in batch for one in later for batch in served.runner.encoded[:-1])


@pytest.mark.parametrize("seed", range(10))
def test_the_bound_holds_for_any_mixture(seed: int) -> None:
    """As above, for every single one of some hundred requests."""
    choose = random.Random(seed)
    served = Served(encoder_batch=choose.randint(1, 4))
    latest = dict[Request, int]()
    seen = 0
    for step in range(400):
        for _ in range(choose.choice([0, 0, 0, 0, 0, 1, 3])):
            bound = step + tokens_left(served)
            asked = served.ask(choose.randint(1, 6), choose.randint(1, 8), encoder_length=choose.randint(10, 128))
            latest[asked] = bound
        served.steps(1)
        started = [one for batch in served.runner.encoded for one in batch]
        assert all(step <= latest[one] for one in started[seen:])
        seen = len(started)
    assert seen > 80
    served.engine.finish()
    assert len(served.answers) == len(latest) > 100
    served.assert_all_free()


# --- who is turned away -------------------------------------------------------------------------------------


def test_a_full_list_turns_others_away_until_there_is_room() -> None:
    served = Served(max_waiting=2, encoder_batch=1)
    served.ask()
    served.ask()
    with pytest.raises(Unavailable, match="2 requests are waiting already"):
        served.ask()
    served.steps(1)
    served.ask()
    served.engine.finish()
    assert len(served.answers) == 3


def test_what_never_fits_is_refused_and_leaves_nothing(served: Served) -> None:
    with pytest.raises(InvalidRequest, match="don't fit into this server's caches"):
        served.ask(tokens=64, num_beams=8)
    assert served.engine.is_idle


# --- who goes early -----------------------------------------------------------------------------------------


def test_time_is_over_while_it_runs(served: Served, clock: Clock) -> None:
    asked, other = served.ask(5, 8, deadline=clock.now + 10), served.ask(2, 8)
    served.steps(2)
    clock.now += 9.99
    served.steps(1)
    assert served.answers == {}
    clock.now += 0.01
    served.steps(1)
    assert isinstance(served.answers[asked], Unavailable)
    # Its rows are free within the same step.
    assert served.runner.decoded == [[asked]] * 3 + [[other]]
    served.engine.finish()
    served.assert_all_free()


def test_time_is_over_while_it_waits(served: Served, clock: Clock) -> None:
    running, asked, behind = served.ask(3, 8), served.ask(1, 8, deadline=clock.now + 5), served.ask(1)
    served.steps(1)
    clock.now += 5
    served.steps(1)
    assert isinstance(served.answers[asked], Unavailable)
    served.engine.finish()
    assert served.runner.encoded == [[running], [behind]]
    served.assert_all_free()


def test_who_comes_too_late_is_never_encoded(served: Served, clock: Clock) -> None:
    asked = served.ask(deadline=clock.now)
    served.steps(1)
    assert isinstance(served.answers[asked], Unavailable)
    assert served.runner.encoded == served.runner.decoded == []
    served.assert_all_free()


def test_cancelled_while_it_runs(served: Served, clock: Clock) -> None:
    gone: list[bool] = []
    asked, other = served.ask(5, is_cancelled=lambda: bool(gone)), served.ask(5)
    served.steps(2)
    gone.append(True)
    clock.now += 1
    served.steps(1)
    assert isinstance(served.answers[asked], Cancelled)
    assert served.runner.decoded == [[asked, other]] * 2 + [[other]]
    served.engine.finish()
    served.assert_all_free()


def test_cancelled_while_it_waits_it_is_never_encoded(served: Served) -> None:
    running = served.ask(2, 8)
    asked, behind = served.ask(1, 4, is_cancelled=lambda: True), served.ask(1, 8)
    served.engine.finish()
    assert isinstance(served.answers[asked], Cancelled)
    assert served.runner.encoded == [[running], [behind]]
    served.assert_all_free()


def test_running_requests_are_asked_now_and_then_whether_they_are_cancelled(
    served: Served, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every time goes to the server and back."""
    monkeypatch.setattr(engine_module, "ASKED_EVERY", 1.0)
    times: list[float] = []

    def is_cancelled() -> bool:
        times.append(clock.now)
        return False

    served.ask(15, is_cancelled=is_cancelled)
    for _ in range(15):
        served.steps(1)
        clock.now += 0.25
    # First when it starts.
    assert times == [1000, 1001, 1002, 1003]
    assert len(served.answers) == 1


def test_who_cannot_be_cancelled_while_it_runs_is_asked_once(served: Served, clock: Clock) -> None:
    times: list[float] = []
    asking = {"is_cancelled": lambda: bool(times.append(clock.now)), "may_be_cancelled_late": False}
    asked = served.ask(3, **asking)
    for _ in range(3):
        clock.now += 10
        served.steps(1)
    assert len(times) == 1
    assert served.tokens(asked) == [START] + [TOKEN] * 3


def test_who_is_late_and_cancelled_is_answered_once(served: Served, clock: Clock) -> None:
    asked = served.ask(5, deadline=clock.now + 1, is_cancelled=lambda: clock.now > 1000)
    served.steps(1)
    clock.now += 1
    served.steps(1)
    assert isinstance(served.answers[asked], Unavailable)
    served.assert_all_free()


# --- what fails ---------------------------------------------------------------------------------------------


@contextmanager
def failing(thing: Any, name: str, error: Exception) -> Iterator[None]:
    """Its method raises, after it has done what it does."""
    works = getattr(thing, name)

    def fails(*args: Any) -> None:
        works(*args)
        raise error

    setattr(thing, name, fails)
    yield
    setattr(thing, name, works)


def test_an_encoder_that_fails_costs_those_who_start_only(served: Served) -> None:
    running = served.ask(4)
    served.steps(1)
    others, error = [served.ask(2), served.ask(2, 3)], RuntimeError("encoder")
    with failing(served.runner, "encode", error):
        served.steps(1)
    assert served.answers == dict.fromkeys(others, error)
    behind = served.ask(2)
    served.engine.finish()
    assert served.tokens(running) == [START] + [TOKEN] * 4
    assert served.tokens(behind) == [START] + [TOKEN] * 2
    assert served.runner.decoded == [[running], [running], [running, behind], [running, behind]]
    served.assert_all_free()


def test_those_who_can_be_encoded_alone_are(served: Served) -> None:
    first, bad, last = served.ask(2), served.ask(2), served.ask(2, 3)
    encode = served.runner.encode

    def fails(requests: Any) -> None:
        encode(requests)
        if bad in requests:
            raise RuntimeError("too large")

    served.runner.encode = fails  # type: ignore[method-assign]
    served.engine.finish()
    assert str(served.answers[bad]) == "too large"
    assert served.tokens(first) == served.tokens(last) == [START] + [TOKEN] * 2
    assert served.runner.encoded == [[first, bad, last], [first], [bad], [last]]
    assert served.engine.counters.failed_steps == 2
    served.assert_all_free()


@pytest.mark.parametrize("graph", ["encode", "decode"])
def test_three_failures_in_a_row_end_the_engine(served: Served, graph: str) -> None:
    served.engine.scheduler.encoder_batch = 1
    error = RuntimeError("out of order")
    # Two, one that works, and two more are not three in a row.
    for _ in range(2):
        with failing(served.runner, graph, error):
            for _ in range(2):
                served.ask()
                served.steps(1)
        served.ask(1)
        served.steps(1)
    asked = [served.ask() for _ in range(4)]
    with failing(served.runner, graph, error):
        if graph == "decode":
            served.engine.scheduler.caches = replace(CACHES, rows=1)
        with pytest.raises(RuntimeError, match="out of order"):
            served.engine.run()
    assert [str(served.answers[one]) for one in asked] == ["out of order"] * 3 + ["the engine has failed"]
    assert served.engine.counters.failed_steps == 7
    with pytest.raises(Unavailable, match="the engine has failed"):
        served.ask()


@pytest.mark.parametrize("graph", ["encode", "decode"])
@pytest.mark.parametrize("library", ["CUDA failure 700: an illegal memory access", "cublasSgemm", "CUDNN_STATUS_X"])
def test_one_failure_of_the_device_ends_the_engine(served: Served, graph: str, library: str) -> None:
    asked, waiting = [served.ask(), served.ask()], [served.ask(1, 8)]
    with failing(served.runner, graph, RuntimeError(library)), pytest.raises(RuntimeError, match=library):
        served.engine.run()
    assert [str(served.answers[one]) for one in asked] == [library] * 2
    assert [str(served.answers[one]) for one in waiting] == ["the engine has failed"]


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.5])
def test_log_probabilities_that_are_none_fail_their_request_alone(served: Served, value: float) -> None:
    bad, other = served.ask(3, 2), served.ask(3, 2)
    served.steps(1)
    decode = served.runner.decode

    def wrong(searches: Any) -> Any:
        found = decode(searches)
        if bad in searches[0].requests:
            found[0][1][searches[0].requests.index(bad), 1, 2] = value
        return found

    served.runner.decode = wrong  # type: ignore[method-assign]
    served.engine.finish()
    assert "log-probabilities that are none" in str(served.answers[bad])
    assert served.tokens(other) == [START] + [TOKEN] * 3
    assert served.runner.cleared == [bad]
    served.assert_all_free()


def test_a_decoder_that_fails_costs_those_of_the_step_only(served: Served) -> None:
    running, starting, waiting = served.ask(4), served.ask(4, 7), served.ask(2, 8)
    served.steps(1)
    error = MemoryError("decoder")
    with failing(served.runner, "decode", error):
        served.steps(1)
    assert served.answers == {running: error, starting: error}
    served.engine.finish()
    assert served.tokens(waiting) == [START] + [TOKEN] * 2
    served.assert_all_free()


@pytest.mark.parametrize("method", ["advance", "result"])
def test_searches_that_fail_cost_their_own_requests_only(served: Served, method: str) -> None:
    broken, other = served.ask(3, 2), served.ask(3)
    error = ZeroDivisionError("search")
    with failing(served.engine._searches_with(2), method, error):
        served.engine.finish()
    assert served.answers[broken] is error
    assert served.tokens(other) == [START] + [TOKEN] * 3
    served.assert_all_free()


def test_requests_that_no_search_has_room_for_are_told(served: Served) -> None:
    """Those who start together with them are not held up, nor entered twice."""
    first, broken, last = served.ask(3), served.ask(3, 2), served.ask(3)
    error = MemoryError("no room")
    with failing(served.engine._searches_with(2), "add", error):
        served.steps(1)
    assert served.answers == {broken: error}
    served.engine.finish()
    assert served.tokens(first) == served.tokens(last) == [START] + [TOKEN] * 3
    served.assert_all_free()


def test_searches_that_find_no_memory_stay_as_they_were(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    running = served.ask(5)
    served.steps(1)
    longer = served.ask(9)
    with monkeypatch.context() as patched:
        patched.setattr(search_state.np, "full", lambda *_: (_ for _ in ()).throw(MemoryError("no memory")))
        served.steps(1)
    assert str(served.answers[longer]) == "no memory"
    other = served.ask(12)
    served.engine.finish()
    assert served.tokens(running) == [START] + [TOKEN] * 5
    assert served.tokens(other) == [START] + [TOKEN] * 12
    served.assert_all_free()


def test_an_answer_that_cannot_be_delivered_stops_nobody(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    def gone(_: Any) -> None:
        raise ConnectionError("nobody there")

    served.engine.submit(request(2, respond=gone))
    other = served.ask(3)
    served.engine.finish()
    assert served.tokens(other) == [START] + [TOKEN] * 3
    assert "nobody there" in caplog.text
    assert len(served.runner.released) == 2


# --- in a thread of its own ---------------------------------------------------------------------------------


class Gate:
    """Holds every step of the decoder until it is let through."""

    def __init__(self, runner: FakeRunner) -> None:
        self.reached, self.open = threading.Event(), threading.Event()
        self._decode = runner.decode
        runner.decode = self.decode  # type: ignore[method-assign]

    def decode(self, requests: Any) -> Any:
        self.reached.set()
        assert self.open.wait(PATIENCE)
        return self._decode(requests)


@contextmanager
def running(run: Callable[[], object]) -> Iterator[threading.Thread]:
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield thread
    thread.join(PATIENCE)
    assert not thread.is_alive()


def test_it_sleeps_until_somebody_asks(served: Served) -> None:
    answered = threading.Event()
    steps: list[int] = []
    with running(lambda: served.engine.run(after_step=lambda: steps.append(len(served.runner.decoded)))):
        for _ in range(3):
            answered.clear()
            served.engine.submit(request(2, respond=lambda _: answered.set()))
            assert answered.wait(PATIENCE)
        served.engine.close()
    assert steps == [1, 2, 3, 4, 5, 6]


def test_at_the_end_everybody_is_told(served: Served) -> None:
    gate = Gate(served.runner)
    everybody = [served.ask(9, 8), served.ask(1, 8), served.ask()]
    with running(served.engine.run):
        assert gate.reached.wait(PATIENCE)
        served.engine.close()
        with pytest.raises(Unavailable, match="the server is stopping"):
            served.ask()
        gate.open.set()
    assert set(served.answers) == set(everybody)
    assert {(type(answer), str(answer)) for answer in served.answers.values()} == {
        (Unavailable, "the server is stopping")
    }
    assert len(served.runner.decoded) == 1
    assert served.engine.is_idle


def test_an_answer_that_is_slow_to_leave_holds_up_no_step(served: Served) -> None:
    left, stepped = threading.Event(), threading.Event()
    served.engine.submit(request(1, respond=lambda _: left.wait(PATIENCE)))
    other = served.ask(5)
    with running(lambda: served.engine.run(lambda: stepped.set() if len(served.runner.decoded) == 5 else None)):
        assert stepped.wait(PATIENCE)
        assert served.answers == {}
        left.set()
        served.engine.close()
    assert served.tokens(other) == [START] + [TOKEN] * 5


def test_what_was_told_at_the_first_close_counts(served: Served) -> None:
    asked = served.ask()
    served.engine.close("moving house")
    served.engine.close()
    served.engine.run()
    assert str(served.answers[asked]) == "moving house"


def test_an_answer_of_the_last_step_is_given(served: Served) -> None:
    gate = Gate(served.runner)
    asked, other = served.ask(1), served.ask(2)
    with running(served.engine.run):
        assert gate.reached.wait(PATIENCE)
        served.engine.close()
        gate.open.set()
    assert served.tokens(asked) == [START, TOKEN]
    assert isinstance(served.answers[other], Unavailable)


@pytest.mark.parametrize("broken", ["release", "admit", "after_step"])
def test_an_engine_that_fails_tells_everybody_and_takes_nobody(served: Served, broken: str) -> None:
    first, *others = served.ask(1, 4), served.ask(3, 4), served.ask(2, 8), served.ask()

    def fails(*_: Any) -> Any:
        raise RuntimeError("broken")

    if broken == "release":
        served.runner.release = fails  # type: ignore[assignment]
    if broken == "admit":
        served.engine.scheduler.admit = fails  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="broken"):
        served.engine.run(fails if broken == "after_step" else lambda: None)
    if broken == "admit":
        others.append(first)
    else:
        assert served.tokens(first) == [START, TOKEN]
    for other in others:
        assert isinstance(served.answers[other], Unavailable)
        assert str(served.answers[other]) == "the engine has failed"
    with pytest.raises(Unavailable, match="the engine has failed"):
        served.ask()
    assert served.engine.is_idle


def test_from_many_threads_everybody_is_answered_once(served: Served) -> None:
    served.engine.scheduler.max_waiting = 20
    accepted: list[tuple[Request, int]] = []
    refused: list[Unavailable] = []

    def ask_many(seed: int) -> None:
        choose = random.Random(seed)
        for _ in range(100):
            tokens, num_beams = choose.randint(1, 6), choose.randint(1, 8)
            try:
                accepted.append((served.ask(tokens, num_beams), tokens))
            except Unavailable as error:
                refused.append(error)

    with running(served.engine.run):
        threads = [threading.Thread(target=ask_many, args=[seed]) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        served.engine.scheduler.max_waiting = 1000
        # Longer than all others, and the last to start, it is the last to end.
        ended = threading.Event()
        served.engine.submit(request(15, respond=lambda _: ended.set()))
        assert ended.wait(PATIENCE)
        served.engine.close()
    assert len(accepted) + len(refused) == 400
    assert len(served.answers) == len(accepted) >= 20
    for asked, tokens in accepted:
        assert served.tokens(asked) == [START] + [TOKEN] * tokens


# --- figures ------------------------------------------------------------------------------------------------


def takes(work: Callable[[Any], Any], seconds: float, clock: Clock) -> Any:
    def worked(requests: Any) -> Any:
        clock.now += seconds
        return work(requests)

    return worked


def test_counters_and_figures(served: Served, clock: Clock) -> None:
    served.runner.encode = takes(served.runner.encode, 0.5, clock)  # type: ignore[method-assign]
    served.runner.decode = takes(served.runner.decode, 0.25, clock)  # type: ignore[method-assign]
    report = EngineFigures(served.engine)
    assert set(report()) | {FAILED} == COUNTERS.keys() | GAUGES.keys()
    served.ask(2, 3), served.ask(3, 2), served.ask(1, 8)
    served.steps(1)
    assert report() == {
        "florence2_steps_total": 1,
        "florence2_failed_steps_total": 0,
        "florence2_tokens_total": 2,
        "florence2_encoder_seconds_total": 0.5,
        "florence2_decoder_seconds_total": 0.25,
        "florence2_first_tokens_total": 2,
        "florence2_first_token_seconds_total": 1.5,
        "florence2_waiting_seconds_total": 0,
        "florence2_running_seconds_total": 0,
        "florence2_requests_running": 2,
        "florence2_requests_waiting": 1,
        "florence2_rows_used": 5,
        "florence2_rows_free": 3,
        "florence2_tokens_per_step": 2,
        "florence2_cache_bytes": 25600,
    }
    served.engine.finish()
    counters = served.engine.counters
    assert (counters.steps, counters.tokens) == (4, 6)
    assert (counters.encoder_seconds, counters.decoder_seconds) == (1.0, 1.0)
    # The third one waited until the first was done, for another second.
    assert (counters.first_tokens, counters.first_token_seconds) == (3, 1.5 + 2.0)
    # Until after an encoder pass and three steps; then it had one of each.
    assert counters.waiting_seconds == 1.25
    assert counters.running_seconds == 1.25 + 1.0 + 0.75
    figures = report()
    # Since the last report: two steps of the first two requests, one of the third.
    assert figures["florence2_tokens_per_step"] == pytest.approx(4 / 3)
    assert (figures["florence2_rows_used"], figures["florence2_rows_free"]) == (0, 8)
    assert report()["florence2_tokens_per_step"] == 0


def test_a_step_that_fails_is_not_counted(served: Served) -> None:
    served.ask()
    with failing(served.runner, "decode", RuntimeError()):
        served.steps(1)
    counters = served.engine.counters
    assert (counters.steps, counters.tokens, counters.failed_steps) == (0, 0, 1)
