"""Who runs and who waits."""

import random

import pytest
from fake_runner import request

from florence2.errors import InvalidRequest, Unavailable
from florence2.generation.caches import CacheSizes
from florence2.generation.request import Request
from florence2.generation.scheduler import Scheduler

CACHES = CacheSizes(rows=8, decoder_entries=256, encoder_entries=128, entry_values=1)


def scheduler(*requests: Request, max_waiting: int = 100, encoder_batch: int = 4) -> Scheduler:
    made = Scheduler(CACHES, max_waiting, encoder_batch)
    for waiting in requests:
        made.add(waiting)
    return made


def test_they_start_in_the_order_they_came() -> None:
    requests = [request() for _ in range(6)]
    made = scheduler(*requests)
    assert made.admit() == requests[:4]
    assert made.admit() == requests[4:]
    assert made.admit() == []
    assert (made.running, list(made.waiting), made.rows_used) == (requests, [], 6)


@pytest.mark.parametrize("encoder_batch", [1, 2, 3])
def test_so_many_start_in_one_step(encoder_batch: int) -> None:
    made = scheduler(*[request() for _ in range(6)], encoder_batch=encoder_batch)
    started = [len(made.admit()) for _ in range(7)]
    assert started == [encoder_batch] * (6 // encoder_batch) + [0] * (7 - 6 // encoder_batch)


def test_a_large_request_is_not_overtaken() -> None:
    """One row is taken, seven are free: the small ones behind would fit, and wait."""
    first, large, small, other = request(), request(num_beams=8), request(), request()
    made = scheduler(first, large, small, other)
    assert made.admit() == [first]
    assert made.admit() == []
    made.remove(first)
    assert made.admit() == [large]
    assert made.admit() == []
    made.remove(large)
    assert made.admit() == [small, other]


def test_what_is_free_is_taken_at_once() -> None:
    first, second, third = request(num_beams=5), request(num_beams=3), request(num_beams=3)
    made = scheduler(first, second, third)
    assert made.admit() == [first, second]
    made.remove(second)
    assert made.admit() == [third]


def test_who_waits_can_leave() -> None:
    first, large, small = request(), request(num_beams=8), request()
    made = scheduler(first, large, small)
    made.admit()
    made.remove(large)
    assert made.admit() == [small]


def test_the_list_of_those_who_wait_is_bounded() -> None:
    made = scheduler(*[request() for _ in range(3)], max_waiting=3)
    with pytest.raises(Unavailable, match="3 requests are waiting already; try again later"):
        made.add(request())
    made.admit()
    made.add(request())
    assert (len(made.running), len(made.waiting)) == (3, 1)


@pytest.mark.parametrize(
    ("impossible", "words"),
    [
        (request(tokens=32, num_beams=8), "8 beams of up to 33 tokens over 16 tokens"),
        (request(tokens=256), "1 beams of up to 257 tokens over 16 tokens"),
        (request(encoder_length=129), "1 beams of up to 4 tokens over 129 tokens"),
    ],
)
def test_what_never_fits_is_refused_at_once(impossible: Request, words: str) -> None:
    """Even where the list is full: waiting would not help."""
    made = scheduler(request(), max_waiting=1)
    with pytest.raises(InvalidRequest, match=f"{words} of picture and prompt don't fit .* ask for fewer num_beams"):
        made.add(impossible)
    assert len(made.waiting) == 1


@pytest.mark.parametrize("seed", range(20))
def test_whatever_comes_and_goes_the_caches_hold_it_and_nobody_overtakes(seed: int) -> None:
    choose = random.Random(seed)
    made = scheduler(encoder_batch=choose.randint(1, 4), max_waiting=20)
    came: list[Request] = []
    started: list[Request] = []
    left: set[Request] = set()
    for _ in range(300):
        for _ in range(choose.randint(0, 3)):
            one = request(choose.randint(1, 31), choose.randint(1, 8), encoder_length=choose.randint(6, 100))
            if len(made.waiting) < 20:
                made.add(one)
                came.append(one)
        admitted = made.admit()
        started += admitted
        if made.running:
            assert CACHES.hold(made.running)
        if made.waiting and len(admitted) < made.encoder_batch:
            assert not CACHES.hold([*made.running, made.waiting[0]])
        gone = [one for one in (*made.running, *made.waiting) if choose.random() < 0.2]
        for one in gone:
            made.remove(one)
        left.update(gone)
    assert started == [one for one in came if one in started]
    assert [one for one in came if one not in left] == [*made.running, *made.waiting]
    assert len(started) > 40
