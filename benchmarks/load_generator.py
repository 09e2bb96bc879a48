"""Requests to a served model from a process of its own, over plain HTTP/1.1 with bodies that are made beforehand.

On two cores that the server shares, tritonclient's work would be a good part of what is measured.

python benchmarks/load_generator.py '{"port": 8000, "seconds": 10, "seed": 0, "rate": 50, "out": "records.npz"}'

prints when it started, on time.monotonic's clock, and writes one record per request.
"""

import asyncio
import io
import json
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SCENE = Path(__file__).resolve().parents[1] / "demo" / "pictures" / "scene-1.png"
PROMPT, NEW_TOKENS = "<OD>", 30
CONNECTIONS = 2000
"""At most; a request that finds none waits for one, and is late."""
PICTURES = 4000
"""Then they come again: more than can be on their way at once."""
GIVE_UP = 330.0
"""Seconds after which a client goes; the models' own limit is 300."""
LATE = 0.05
"""Seconds after its moment from which on a request has not kept the schedule."""
KINDS = ("answered", "refused", "out of time", "failed", "not sent")


@dataclass(frozen=True)
class Load:
    """Either `rate` requests per second, Poisson, whatever comes back, or always `in_flight` of them."""

    port: int
    seconds: float
    seed: int
    out: str
    rate: float = 0
    in_flight: int = 0


def picture(rng: np.random.Generator) -> bytes:
    """A JPEG file of a scene with other noise in its corner each time."""
    scene = Image.open(SCENE).convert("RGB")
    noise = Image.fromarray(rng.integers(0, 256, (8, 8, 3)).astype(np.uint8))
    scene.paste(noise.resize((64, 64), Image.Resampling.NEAREST))
    file = io.BytesIO()
    scene.save(file, "JPEG")
    return file.getvalue()


def http_request(file: bytes) -> bytes:
    """All of it, in KServe's binary extension."""
    image = len(file).to_bytes(4, "little") + file
    inputs = [
        {"name": "prompt", "shape": [1, 1], "datatype": "BYTES", "data": [PROMPT]},
        {"name": "max_new_tokens", "shape": [1, 1], "datatype": "INT32", "data": [NEW_TOKENS]},
        {"name": "image", "shape": [1, 1], "datatype": "BYTES", "parameters": {"binary_data_size": len(image)}},
    ]
    head = json.dumps({"inputs": inputs}).encode()
    return (
        b"POST /v2/models/florence2/infer HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        b"Inference-Header-Content-Length: %d\r\nContent-Length: %d\r\n\r\n" % (len(head), len(head) + len(image))
    ) + (head + image)


class Connection(asyncio.Protocol):
    """Kept alive; one request at a time."""

    def __init__(self) -> None:
        self._received = bytearray()
        self._answer: asyncio.Future[tuple[int, bytes]] | None = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def ask(self, request: bytes) -> asyncio.Future[tuple[int, bytes]]:
        """-> HTTP status and body."""
        self._answer = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        return self._answer

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, _, body = bytes(self._received).partition(b"\r\n\r\n")
        length = re.search(rb"content-length: *(\d+)", head, re.IGNORECASE)
        if length and len(body) >= int(length[1]) and self._answer and not self._answer.done():
            self._received.clear()
            self._answer.set_result((int(head.split()[1]), body))

    def connection_lost(self, error: Exception | None) -> None:
        if self._answer and not self._answer.done():
            self._answer.set_exception(error or ConnectionResetError("the server closed the connection"))


async def connect(port: int) -> Connection:
    _, connection = await asyncio.get_running_loop().create_connection(Connection, "127.0.0.1", port)
    return connection


def outcome(status: int, body: bytes) -> tuple[str, str]:
    """One of KINDS, and what the server said if it is no answer."""
    if status == 200 and b'"answer"' in body:
        return "answered", ""
    said = f"{status} {body.decode(errors='replace')}"[:200]
    if status in (408, 504) or (status == 503 and re.search("time (is|was) over", said)):
        return "out of time", said
    return ("refused" if status == 503 else "failed"), said


class Generator:
    def __init__(self, load: Load) -> None:
        self.load, self.loop = load, asyncio.get_running_loop()
        rng = np.random.default_rng(load.seed)
        count = rng.poisson(load.rate * load.seconds)
        # Given their number, a Poisson process's arrivals are uniform.
        self.arrivals = np.sort(rng.uniform(0, load.seconds, count)).tolist()
        distinct = min(count, PICTURES) if load.rate else PICTURES
        self.requests = [http_request(picture(rng)) for _ in range(distinct)]
        self.idle: list[Connection] = []
        self.free = asyncio.Semaphore(CONNECTIONS)
        self.records: list[tuple[float, float, float, int]] = []
        self.said: Counter[str] = Counter()

    async def run(self) -> None:
        print(self.loop.time(), flush=True)
        self.start = self.loop.time()
        await (self.open_loop() if self.load.rate else self.closed_loop())
        due, sent, ended, kinds = np.array(self.records).reshape(-1, 4).T
        said = json.dumps(self.said)
        np.savez(self.load.out, due=due, sent=sent, ended=ended, kinds=kinds.astype(int), said=said)

    async def open_loop(self) -> None:
        tasks: set[asyncio.Task[None]] = set()
        for place, due in enumerate(self.arrivals):
            await asyncio.sleep(max(self.start + due - self.loop.time(), 0))
            await self.free.acquire()
            if self.loop.time() - self.start > max(self.load.seconds, due + LATE):
                not_sent = KINDS.index("not sent")
                self.records += [(late, np.nan, np.nan, not_sent) for late in self.arrivals[place:]]
                break
            task = self.loop.create_task(self.ask(place, due))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            task.add_done_callback(lambda _: self.free.release())
        await asyncio.gather(*tasks)

    async def closed_loop(self) -> None:
        async def client(place: int) -> None:
            while (now := self.loop.time() - self.start) < self.load.seconds:
                await self.ask(place, now)
                place += self.load.in_flight

        await asyncio.gather(*(client(place) for place in range(self.load.in_flight)))

    async def ask(self, place: int, due: float) -> None:
        sent, connection = self.loop.time() - self.start, None
        try:
            async with asyncio.timeout(GIVE_UP):
                connection = await self.connection()
                kind, said = outcome(*await connection.ask(self.requests[place % len(self.requests)]))
            self.idle.append(connection)
        except (TimeoutError, OSError) as error:
            if connection:
                connection.transport.abort()
            # TimeoutError is an OSError.
            kind, said = ("out of time" if isinstance(error, TimeoutError) else "failed"), f"the client: {error!r}"
            # A server that has ended refuses connections as fast as they are made.
            await asyncio.sleep(0.1)
        self.records.append((due, sent, self.loop.time() - self.start, KINDS.index(kind)))
        self.said[said] += 1

    async def connection(self) -> Connection:
        while self.idle:
            connection = self.idle.pop()
            if not connection.transport.is_closing():
                return connection
        return await connect(self.load.port)


async def main() -> None:
    await Generator(Load(**json.loads(sys.argv[1]))).run()


if __name__ == "__main__":
    asyncio.run(main())
