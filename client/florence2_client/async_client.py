"""The client that is awaited."""

import asyncio
import random
import time
from collections import deque
from collections.abc import AsyncGenerator, Coroutine, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from typing import Any, TypedDict, Unpack

from florence2.prompts import task_of
from florence2.tasks import Takes
from florence2_client.connection import OVER, Connection, Endpoint, File, Tensor
from florence2_client.errors import ServerRefused, refused
from florence2_client.pictures import Image, again, encoded
from florence2_client.results import CaptionedInstances, Instances, Text, read
from florence2_client.retries import with_retries
from florence2_client.task_methods import Detail, Settings, Tasks, caption_task, check, tensors
from florence2_client.window import busy, check_many, outcome

Answer = Text | Instances


class Options(TypedDict, total=False):
    """What a client may be told beside its URL."""

    model: str
    timeout: float
    retries: int
    next_share: float
    headers: Mapping[str, str] | None
    ca: File | None
    certificate: File | None
    key: File | None


class AsyncFlorence2Client(
    Tasks[
        Coroutine[Any, Any, Answer],
        Coroutine[Any, Any, Text],
        Coroutine[Any, Any, Instances],
        Coroutine[Any, Any, CaptionedInstances],
    ]
):
    """A server, asked from one event loop. Its connections are kept and shared by all requests: close it, or use it in
    an `async with`, in the same `asyncio.run` as its calls. Cancelling a call ends the wait for its answer; the server
    works on until the request's timeout."""

    def __init__(
        self,
        url: str = "localhost:8001",
        *,
        model: str = "florence2",
        timeout: float = 300,
        retries: int = 9,
        next_share: float = 0.0,
        headers: Mapping[str, str] | None = None,
        ca: File | None = None,
        certificate: File | None = None,
        key: File | None = None,
    ) -> None:
        """`url`: HOST:PORT, or grpc://HOST:PORT, for gRPC; grpcs:// for TLS; http:// and https:// for HTTP.

        `timeout`: seconds for a call, tries and pauses included; a server that doesn't say that they are over is waited
        for one second more. `retries`: how often a request is sent again that found the server busy or not there, after
        growing pauses; 9 take 14 to 29 s, in which `florence2 serve` has started a server that died. `headers` go with
        every request. With TLS, `ca` is a file of the authorities to trust, `certificate` and `key` are who we are; all
        are PEM. `next_share`: the share of requests that try the candidate, where there is one, for
        half of the timeout.
        """
        _check_seconds(timeout)
        if not 0 <= next_share <= 1:
            raise ValueError(f"next_share is a part of the requests, from 0 to 1, not {next_share}")
        if retries < 0:
            raise ValueError(f"retries is a number of times, 0 or more, not {retries}")
        self._endpoint = Endpoint(url, headers, ca, certificate, key)
        self.url, self.model, self.timeout = url, model, timeout
        self._retries, self._next_share = retries, next_share
        self._connection: Connection | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self.is_closed = False

    @property
    def is_connected(self) -> bool:
        return self._connection is not None

    async def __aenter__(self) -> "AsyncFlorence2Client":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Requests under way are refused as CANCELLED, at once; where there are any, the server has a second to answer
        them before they are cut off."""
        self.is_closed = True
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()

    async def run(
        self,
        prompt: str,
        image: Image,
        *,
        region: Sequence[float] | None = None,
        min_score: float | None = None,
        **settings: Unpack[Settings],
    ) -> Answer:
        check(prompt, region, min_score, settings)
        until = self._until(settings)
        data = await _read(image, until)
        return await self._run(prompt, data, again(image, data), region, min_score, settings, until)

    async def run_tasks(
        self,
        prompts: Iterable[str],
        image: Image,
        *,
        region: Sequence[float] | None = None,
        **settings: Unpack[Settings],
    ) -> list[Answer]:
        """Several prompts about one picture, in their order. They are sent together, so that the server computes the
        picture's features once; `region` goes to those that take one."""
        if isinstance(prompts, str):
            raise ValueError(f"prompts are a list of texts, not the text {prompts!r}")
        regions = [(prompt, region if _takes_region(prompt) else None) for prompt in prompts]
        for prompt, box in regions:
            check(prompt, box, None, settings)
        until = self._until(settings)
        data = await _read(image, until)
        kept = again(image, data)
        asked = [
            asyncio.create_task(self._run(prompt, data, kept, box, None, settings, until)) for prompt, box in regions
        ]
        try:
            return list(await asyncio.gather(*asked))
        finally:
            for task in asked:
                task.cancel()

    async def caption_and_ground(
        self, image: Image, detail: Detail = "short", *, min_score: float | None = None, **settings: Unpack[Settings]
    ) -> CaptionedInstances:
        ground = "<CAPTION_TO_PHRASE_GROUNDING>"
        check(ground, None, min_score, settings)
        task, until = caption_task(detail), self._until(settings)
        data = await _read(image, until)
        kept = again(image, data)
        caption = await self._run(task, data, kept, None, None, settings, until)
        found = await self._run(f"{ground}{caption}", data, kept, None, min_score, settings, until)
        return CaptionedInstances(
            **{one.name: getattr(found, one.name) for one in fields(found) if one.init}, caption=caption
        )

    async def run_many(
        self,
        asked: Iterable[tuple[str, Image]],
        *,
        in_flight: int = 8,
        region: Sequence[float] | None = None,
        min_score: float | None = None,
        return_exceptions: bool = False,
        **settings: Unpack[Settings],
    ) -> AsyncGenerator[Answer | Any, None]:
        """The answers to prompts and pictures, in their order; at most `in_flight` are with the server, and twice as
        many in memory. `return_exceptions`: what failed is its exception, and the others go on."""
        check_many(in_flight, settings)
        window: deque[asyncio.Task[Answer]] = deque()
        try:
            for prompt, image in asked:
                run = self.run(prompt, image, region=region, min_score=min_score, **settings)
                window.append(asyncio.create_task(run))
                # Lets it start, however long the next one is in coming.
                await asyncio.sleep(0)
                while window:
                    if window[0].done():
                        yield outcome(window.popleft(), return_exceptions)
                    elif waits := busy(window, in_flight):
                        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                    else:
                        break
            while window:
                await asyncio.wait([window[0]])
                yield outcome(window.popleft(), return_exceptions)
        finally:
            for task in window:
                task.cancel()

    def _until(self, settings: Settings) -> float:
        timeout = settings.get("timeout")
        if timeout is None:
            timeout = self.timeout
        _check_seconds(timeout)
        return time.monotonic() + timeout

    async def _run(
        self,
        prompt: str,
        data: bytes,
        kept: Image,
        region: Sequence[float] | None,
        min_score: float | None,
        settings: Settings,
        until: float,
    ) -> Any:
        inputs = tensors(prompt, data, region, settings)
        if random.random() < self._next_share:
            # Whatever is wrong with it is no concern of who asks here.
            with suppress(ServerRefused, LookupError, TypeError, ValueError, TimeoutError):
                half = (until - time.monotonic()) / 2
                # The other half is for the release that serves: no grace here.
                async with asyncio.timeout(half):
                    return await self._once(f"{self.model}_next", inputs, kept, min_score, half)
        return await with_retries(
            lambda: self._once(self.model, inputs, kept, min_score, until - time.monotonic()), self._retries, until
        )

    async def _once(
        self, model: str, inputs: Mapping[str, Tensor], kept: Image, min_score: float | None, seconds: float
    ) -> Answer:
        if self.is_closed:
            raise RuntimeError("this client is closed: make another")
        if seconds <= 0:
            raise refused(self.url, OVER, "DEADLINE_EXCEEDED")
        if self._connection is None:
            self._connection, self._loop = self._endpoint.connect(), asyncio.get_running_loop()
        if self._loop is not asyncio.get_running_loop():
            raise RuntimeError("this client belongs to another event loop: make one in each, or take Florence2Client")
        result = read(await self._connection.infer(model, inputs, seconds), inputs["prompt"][1].item().decode(), kept)
        return result if min_score is None or isinstance(result, Text) else result.at_least(min_score)


async def _read(image: Image, until: float) -> bytes:
    seconds = until - time.monotonic()
    try:
        async with asyncio.timeout(seconds):
            return await asyncio.to_thread(encoded, image, seconds)
    except TimeoutError as error:
        raise TimeoutError(f"the picture was not read within the timeout: {error or image!r}") from error


def _takes_region(prompt: str) -> bool:
    task = task_of(prompt)
    return task is not None and task.takes is Takes.REGION and "<loc_" not in prompt


def _check_seconds(timeout: float) -> None:
    if not 1e-6 <= timeout <= 1e9:  # whole microseconds, in 64 bits
        raise ValueError(f"a timeout is seconds, finite and more than 0, not {timeout}")
