"""Threads that answer requests, one after the other each."""

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from threading import Condition, Lock, Thread
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from florence2.backend.metric_names import TIMES
from florence2.backend.metrics import Metrics
from florence2.backend.occupancy import Occupancy
from florence2.backend.tensors import Arrival, Responder, Tensors, amount, at_least, copies, views
from florence2.errors import TimeIsOver, Unavailable

MEGA = 1e6
A_MOMENT = 0.1
"""Seconds."""


@dataclass(frozen=True, eq=False)
class Item:
    tensors: Tensors
    responder: Responder
    arrival: Arrival
    deadline: float
    came: float
    """Here, on `time.monotonic`'s clock."""
    bytes: int


class Worker:
    """Bounds what waits, by number and by bytes, and what is too late.

    Not Triton's own queue policy: with one and with batches of 1, the dynamic batcher misses that an instance became
    idle and sleeps for up to half a second (core, `DynamicBatchScheduler::WaitForPayloadSlotAvailable`): 64 requests at
    once took 6 s instead of 0.5.
    """

    def __init__(
        self,
        answer: Callable[[Tensors, Arrival], Tensors],
        given: Mapping[str, str],
        metrics: Metrics,
        occupancy: Occupancy,
        at_once: int = 1,
        check: Callable[[Tensors, float], None] = lambda tensors, deadline: None,
    ) -> None:
        """`given`: the model's parameters, of which max_waiting, max_waiting_megabytes (if it has that) and
        timeout_seconds are read. `metrics`: of WORKER_COUNTERS. `at_once` requests are answered at the same time.
        `check` raises for one that can't be, by its tensors and its deadline, before anything of it is copied."""
        self._answer, self._check = answer, check
        self._metrics, self._occupancy = metrics, occupancy
        self._figures, self._counting = dict.fromkeys(TIMES, 0.0), Lock()
        self._timeout = amount(given, "timeout_seconds")
        self._most = at_least(1, given, "max_waiting")
        bounded = "max_waiting_megabytes" in given
        self._most_bytes = amount(given, "max_waiting_megabytes") * MEGA if bounded else math.inf
        self._waiting: deque[Item] = deque()
        self._here: set[Item] = set()
        """Those that wait, and those that are being answered."""
        self._changed = Condition()
        self._bytes = 0
        self._stopping = False
        self._refusal: Exception | None = None
        self._threads = [Thread(target=self._run, name="worker", daemon=True) for _ in range(at_once)]
        for thread in self._threads:
            thread.start()

    def submit(self, request: Any) -> Any:
        """-> what `execute` returns for it: None where the answer comes later, or a refusal, UNAVAILABLE where there is
        no room. Never waits."""
        responder = Responder(request, self._failed)
        try:
            tensors = views(request)
            arrival = Arrival.of(tensors)
            responder.number = arrival.number
            deadline = arrival.deadline(request, self._timeout)
            self._admit(tensors, deadline)
            item = Item(copies(tensors), responder, arrival, deadline, time.monotonic(), size(tensors))
            with self._changed:
                if self._refusal:
                    raise self._refusal
                self._waiting.append(item)
                self._here.add(item)
                self._bytes += item.bytes
                self._tell()
                self._changed.notify()
        except Exception as error:
            refusal = responder.refusal(error)
            self._count()
            return refusal
        return None

    def _failed(self, error: Exception) -> None:
        self._metrics.failed(error)
        self._occupancy.failed()

    def _admit(self, tensors: Tensors, deadline: float) -> None:
        if len(self._waiting) >= self._most:
            raise Unavailable(f"{self._most} requests are waiting already; try again later")
        # One alone may be larger than the bound.
        if self._here and self._bytes + size(tensors) > self._most_bytes:
            raise Unavailable(f"{self._bytes / MEGA:.3g} MB are waiting already; try again later")
        self._check(tensors, deadline)

    def stop(self) -> None:
        """After those that wait."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        self._metrics.close()
        self._occupancy.close()

    def refuse(self, error: Exception) -> None:
        """Tells all that wait, and all that come from now on; after a moment those that are being answered, too."""
        with self._changed:
            self._refusal = error
            waiting = list(self._waiting)
            self._waiting.clear()
        for item in waiting:
            self._respond(item, error)
        time.sleep(A_MOMENT)
        with self._changed:
            left = list(self._here)
        for item in left:
            self._respond(item, error)

    def _tell(self) -> None:
        self._occupancy.hold(len(self._here), len(self._waiting))

    def _next(self) -> Item | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._stopping)
            item = self._waiting.popleft() if self._waiting else None
            self._tell()
            return item

    def _respond(self, item: Item, answer: Tensors | Exception) -> None:
        """Once."""
        # Before the answer: who has it may ask again, and must find the room.
        with self._changed:
            if item not in self._here:
                return
            self._here.remove(item)
            self._bytes -= item.bytes
            self._tell()
        try:
            item.responder(answer)
        except Exception as error:
            pb_utils.Logger.log_error(f"an answer could not be delivered: {error!r}")

    def _run(self) -> None:
        while item := self._next():
            began = time.monotonic()
            try:
                if began >= item.deadline:
                    raise TimeIsOver("the request's time was over before its turn; allow more, or try again later")
                answer: Tensors | Exception = self._answer(item.tensors, item.arrival)
            except Exception as error:
                answer = error
            except BaseException as error:  # a panic of tokenizers, which is in Rust, is no Exception
                answer = RuntimeError(repr(error))
            self._respond(item, answer)
            self._count(began - item.came, time.monotonic() - began)

    def _count(self, *seconds: float) -> None:
        """`seconds`: of one request that was taken, in the order of TIMES."""
        with self._counting:
            for name, more in zip(TIMES, seconds, strict=False):
                self._figures[name] += more
            if self._metrics.are_due() or (seconds and not self._waiting):
                self._metrics.try_report(self._figures)


def size(tensors: Tensors) -> int:
    """Bytes."""
    return sum(
        sum(map(len, value.reshape(-1))) if value.dtype == np.object_ else value.nbytes for value in tensors.values()
    )
