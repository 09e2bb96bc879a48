"""The client that waits, which runs the one that is awaited in a thread."""

import asyncio
import atexit
import concurrent.futures
import os
import threading
import weakref
from collections import deque
from collections.abc import Coroutine, Generator, Iterable, Sequence
from contextlib import suppress
from typing import Any, TypeVar, Unpack

from florence2_client.async_client import Answer, AsyncFlorence2Client, Options
from florence2_client.pictures import Image
from florence2_client.results import CaptionedInstances, Instances, Text
from florence2_client.task_methods import Detail, Settings, Tasks
from florence2_client.window import busy, check_many, outcome

T = TypeVar("T")


class Florence2Client(Tasks[Answer, Text, Instances, CaptionedInstances]):
    """A server, asked from any number of threads. Its connections are kept and shared by all requests: close it, or use
    it in a `with`. Another process makes its own; one that was forked after gRPC was used can take http:// only.

    Takes what AsyncFlorence2Client takes.
    """

    def __init__(self, url: str = "localhost:8001", **options: Unpack[Options]) -> None:
        self._asking = AsyncFlorence2Client(url, **options)
        self._process = os.getpid()
        self.url, self.model, self.timeout = self._asking.url, self._asking.model, self._asking.timeout
        # For those that nobody closes.
        self._end = weakref.finalize(self, _close_later, self._asking, self._process)
        # At the process's end `_close_all` closes it, and waits; this would come first, and not wait.
        self._end.atexit = False
        _clients.add(self)

    def __enter__(self) -> "Florence2Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """As AsyncFlorence2Client's."""
        self._end.detach()
        if self._asking.is_connected:
            self._wait(self._asking.close())
        else:
            self._asking.is_closed = True

    def run(
        self,
        prompt: str,
        image: Image,
        *,
        region: Sequence[float] | None = None,
        min_score: float | None = None,
        **settings: Unpack[Settings],
    ) -> Answer:
        return self._wait(self._asking.run(prompt, image, region=region, min_score=min_score, **settings))

    def run_tasks(
        self,
        prompts: Iterable[str],
        image: Image,
        *,
        region: Sequence[float] | None = None,
        **settings: Unpack[Settings],
    ) -> list[Answer]:
        """As AsyncFlorence2Client's."""
        return self._wait(self._asking.run_tasks(prompts, image, region=region, **settings))

    def caption_and_ground(
        self, image: Image, detail: Detail = "short", *, min_score: float | None = None, **settings: Unpack[Settings]
    ) -> CaptionedInstances:
        return self._wait(self._asking.caption_and_ground(image, detail, min_score=min_score, **settings))

    def run_many(
        self,
        asked: Iterable[tuple[str, Image]],
        *,
        in_flight: int = 8,
        region: Sequence[float] | None = None,
        min_score: float | None = None,
        return_exceptions: bool = False,
        **settings: Unpack[Settings],
    ) -> Generator[Answer | Any, None, None]:
        """As AsyncFlorence2Client's."""
        check_many(in_flight, settings)
        window: deque[concurrent.futures.Future[Answer]] = deque()
        try:
            for prompt, image in asked:
                run = self._asking.run(prompt, image, region=region, min_score=min_score, **settings)
                window.append(self._start(run))
                while window:
                    if window[0].done():
                        yield outcome(window.popleft(), return_exceptions)
                    elif waits := busy(window, in_flight):
                        concurrent.futures.wait(waits, return_when=concurrent.futures.FIRST_COMPLETED)
                    else:
                        break
            while window:
                concurrent.futures.wait([window[0]])
                yield outcome(window.popleft(), return_exceptions)
        finally:
            for future in window:
                future.cancel()

    def _start(self, coroutine: Coroutine[Any, Any, T]) -> "concurrent.futures.Future[T]":
        if os.getpid() != self._process:
            coroutine.close()
            raise RuntimeError("this client was made before the process was forked: make one in every process")
        return asyncio.run_coroutine_threadsafe(coroutine, _loop(self._process))

    def _wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        future = self._start(coroutine)
        try:
            return future.result()
        finally:
            # Where it is not done, Ctrl-C has ended the wait.
            future.cancel()


_loops: dict[int, asyncio.AbstractEventLoop] = {}
_starting = threading.Lock()
_clients: "weakref.WeakSet[Florence2Client]" = weakref.WeakSet()


def _loop(process: int) -> asyncio.AbstractEventLoop:
    """Of all clients of a process that wait."""
    with _starting:
        if process not in _loops:
            loop = asyncio.new_event_loop()
            threading.Thread(target=loop.run_forever, name="florence2_client", daemon=True).start()
            _loops[process] = loop
        return _loops[process]


def _close_later(asking: AsyncFlorence2Client, process: int) -> None:
    """In whatever thread collects garbage, the loop's own perhaps: so without a wait and without a lock."""
    loop = _loops.get(process)
    if asking.is_connected and loop is not None and os.getpid() == process:
        asyncio.run_coroutine_threadsafe(asking.close(), loop)


@atexit.register
def _close_all() -> None:
    for client in list(_clients):
        # Whatever is wrong now, nobody is there to be told.
        with suppress(Exception):
            client.close()
