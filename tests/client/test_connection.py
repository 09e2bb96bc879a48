"""When the client cancels a gRPC request: never early. The server here answers when the test says so, and notes how its
requests end."""

import asyncio
import gc
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from florence2_client import AsyncFlorence2Client, Florence2Client, ServerRefused, connection
from florence2_client.connection import Connection, Endpoint
from tritonclient.grpc import service_pb2, service_pb2_grpc

HANGS = 30
"""Seconds after which something won't happen."""
TIME_IS_OVER = "the request's time is over; ask for less, or allow more time"


class Server(service_pb2_grpc.GRPCInferenceServiceServicer):
    def __init__(self) -> None:
        self.url = ""
        self.timeouts: list[int] = []
        """Microseconds, of those that came."""
        self.ended: list[str] = []
        """With the status that they were answered with, or "cancelled" by the client."""
        self._open: list[queue.SimpleQueue[str]] = []

    def ModelInfer(self, request: Any, context: grpc.ServicerContext) -> Any:
        end: queue.SimpleQueue[str] = queue.SimpleQueue()
        if not context.add_callback(lambda: end.put("cancelled")):
            end.put("cancelled")
        self._open.append(end)
        self.timeouts.append(request.parameters["timeout"].int64_param)
        status = end.get()
        self.ended.append(status)
        if status not in ("OK", "cancelled"):
            context.abort(grpc.StatusCode[status], TIME_IS_OVER)
        response = service_pb2.ModelInferResponse(model_name="florence2", model_version="1")
        response.outputs.add(name="text", datatype="BYTES", shape=[1, 1])
        response.raw_output_contents.append(b"\x03\0\0\0yes")
        return response

    def answer(self, status: str) -> None:
        """All that have come."""
        for end in self._open:
            end.put(status)


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    with ThreadPoolExecutor(64) as threads:
        running = grpc.server(threads)
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(made, running)
        made.url = f"127.0.0.1:{running.add_insecure_port('127.0.0.1:0')}"
        running.start()
        yield made
        made.answer("OK")
        running.stop(None).wait()


@pytest.fixture
def grace(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    return lambda seconds: monkeypatch.setattr(connection, "GRACE", seconds)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(HANGS):
        while not condition():
            await asyncio.sleep(0.001)


def wait_until(condition: Callable[[], object]) -> None:
    give_up = time.monotonic() + HANGS
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.001)


def run(server: Server, test: Callable[[Connection], Coroutine[Any, Any, None]]) -> None:
    """With a connection; nothing may be reported to the event loop, nor left in it."""
    reported: list[Any] = []

    async def connected() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
        made = Endpoint(server.url).connect()
        await test(made)
        await until(lambda: not made._running)
        await made.close()
        await until(lambda: len(asyncio.all_tasks()) == 1)

    asyncio.run(connected())
    # A task's error that was never retrieved is reported when the task goes.
    gc.collect()
    assert reported == []


@pytest.mark.parametrize("seconds", [1e-4, 1e-2])
def test_at_the_timeout_the_server_speaks_first(server: Server, grace: Any, seconds: float) -> None:
    async def ask(made: Connection) -> None:
        asked = asyncio.create_task(made.infer("florence2", {}, seconds))
        await until(lambda: server.timeouts or asked.done())
        await asyncio.sleep(2 * seconds)
        server.answer("UNAVAILABLE")
        with pytest.raises(ServerRefused) as told:
            await asked
        assert told.value.status == "DEADLINE_EXCEEDED"
        assert str(told.value) == (
            f"{server.url}: no answer within the timeout; allow more time with timeout=, or send fewer requests at once"
        )

    grace(HANGS)
    run(server, ask)
    assert server.timeouts == [round(seconds * 1e6)]
    assert server.ended == ["UNAVAILABLE"]


def test_before_the_timeout_unavailable_is_what_the_server_says(server: Server) -> None:
    async def ask(made: Connection) -> None:
        asked = asyncio.create_task(made.infer("florence2", {}, HANGS))
        await until(lambda: server.timeouts)
        server.answer("UNAVAILABLE")
        with pytest.raises(ServerRefused, match=TIME_IS_OVER) as told:
            await asked
        assert told.value.status == "UNAVAILABLE"

    run(server, ask)


def test_a_server_that_is_silent_is_given_up_after_the_grace(server: Server, grace: Any) -> None:
    async def ask(made: Connection) -> None:
        with pytest.raises(ServerRefused, match="no answer within the timeout") as told:
            await made.infer("florence2", {}, 0.1)
        assert told.value.status == "DEADLINE_EXCEEDED"
        await until(lambda: not made._running)

    grace(0.1)
    run(server, ask)
    assert "OK" not in server.ended


def test_an_answer_that_lacks_outputs_is_told(server: Server) -> None:
    async def ask(made: Connection) -> None:
        asked = asyncio.create_task(made.infer("florence2", {}, HANGS))
        await until(lambda: server.timeouts)
        server.answer("OK")
        with pytest.raises(ServerRefused) as told:
            await asked
        missing = "answer, token_ids, token_logprobs, sequence_score, finish_reason"
        assert str(told.value) == f"{server.url}: an answer without {missing}"
        assert told.value.status == "INTERNAL"

    run(server, ask)


async def _cancelled(asked: Coroutine[Any, Any, Any], seconds: float) -> None:
    task = asyncio.create_task(asked)
    await asyncio.sleep(seconds)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def _timed_out(asked: Coroutine[Any, Any, Any], seconds: float) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(seconds):
            await asked


@pytest.mark.parametrize("status", ["OK", "INTERNAL"])
@pytest.mark.parametrize("leave", [_cancelled, _timed_out])
def test_a_request_goes_on_when_its_caller_goes(server: Server, grace: Any, leave: Any, status: str) -> None:
    delays = [*[0.0001] * 8, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05]

    async def ask(made: Connection) -> None:
        await asyncio.gather(*(leave(made.infer("florence2", {}, HANGS), delay) for delay in delays))
        await until(lambda: len(server.timeouts) == len(delays) or "cancelled" in server.ended)
        assert server.ended == []
        server.answer(status)

    grace(HANGS)
    run(server, ask)
    wait_until(lambda: len(server.ended) == len(delays))
    assert server.ended == [status] * len(delays)


def test_a_request_that_nobody_waits_for_is_cancelled_after_the_grace(server: Server, grace: Any) -> None:
    async def ask(made: Connection) -> None:
        asked = [asyncio.create_task(made.infer("florence2", {}, HANGS)) for _ in range(50)]
        await until(lambda: len(server.timeouts) == 50)
        for task in asked:
            task.cancel()
        await until(lambda: not made._running)

    grace(0.01)
    run(server, ask)
    wait_until(lambda: len(server.ended) == 50)
    assert server.ended == ["cancelled"] * 50


@pytest.mark.parametrize(("seconds", "end"), [(HANGS, "OK"), (0.01, "cancelled")])
def test_closing_tells_callers_and_waits_for_their_requests(
    server: Server, grace: Any, seconds: float, end: str
) -> None:
    async def ask() -> None:
        asking = AsyncFlorence2Client(server.url, retries=0)
        asked = [asyncio.create_task(asking.caption(b"x")) for _ in range(5)]
        await until(lambda: len(server.timeouts) == 5)
        closing = asyncio.create_task(asking.close())
        for task in asked:
            with pytest.raises(ServerRefused, match="closed while it waited") as told:
                await task
            assert told.value.status == "CANCELLED"
        if end == "OK":
            assert not closing.done()
            assert server.ended == []
            server.answer("OK")
        await closing

    grace(seconds)
    asyncio.run(ask())
    wait_until(lambda: len(server.ended) == 5)
    assert server.ended == [end] * 5


def test_closing_before_the_event_loop_ends_is_early_enough(server: Server, grace: Any) -> None:
    gone = threading.Event()

    def answer() -> None:
        gone.wait(HANGS)
        time.sleep(0.2)
        server.answer("OK")

    async def ask() -> None:
        async with AsyncFlorence2Client(server.url) as asking:
            asked = asyncio.create_task(asking.caption(b"x"))
            await until(lambda: server.timeouts)
            asked.cancel()
            gone.set()
            await asked

    grace(HANGS)
    with ThreadPoolExecutor(1) as threads:
        answered = threads.submit(answer)
        with pytest.raises(asyncio.CancelledError):
            asyncio.run(ask())
        answered.result()
    assert server.ended == ["OK"]


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Even in what a shell has started in the background, where this signal is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_request_goes_on_when_its_thread_is_interrupted(server: Server, grace: Any, interruptible: None) -> None:
    def interrupt() -> None:
        wait_until(lambda: server.timeouts)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    grace(HANGS)
    with ThreadPoolExecutor(2) as threads, Florence2Client(server.url) as asking:
        threads.submit(interrupt)
        with pytest.raises(KeyboardInterrupt):
            asking.caption(b"x")
        closing = threads.submit(asking.close)
        wait_until(lambda: asking._asking.is_closed)
        assert server.ended == []
        server.answer("OK")
        closing.result(HANGS)
    assert server.ended == ["OK"]


def test_a_request_goes_on_when_its_process_ends(server: Server) -> None:
    code = f"""
import sys
from florence2_client import Florence2Client, connection
connection.GRACE = {HANGS}
asking = Florence2Client({server.url!r})
asked = asking._start(asking._asking.caption(b"x"))
sys.stdin.readline()
print(asked.cancel(), flush=True)
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stderr is not None
        wait_until(lambda: server.timeouts)
        child.stdin.write("\n")
        child.stdin.flush()
        assert child.stdout.readline() == "True\n"
        time.sleep(0.2)
        server.answer("OK")
        assert (child.wait(HANGS), child.stderr.read()) == (0, "")
    wait_until(lambda: server.ended)
    assert server.ended == ["OK"]
