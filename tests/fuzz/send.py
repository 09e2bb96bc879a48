"""Sending inputs, and what becomes of each."""

import http.client
import io
import queue
import re
import socket
import struct
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from fuzz.kinds import make
from fuzz.messages import INFER, Input

ANSWERED, REFUSED = "answered", "refused"
"""By the server: with a good status, with another."""
CLOSED = "closed"
"""The server ended the connection, of what need not be HTTP."""
LEFT = "left"
"""We went away, as was meant."""
LOST = "lost"
"""The connection ended without an answer."""
SILENT = "silent"
"""No answer within the input's time."""
UNREACHED = "unreached"
"""Nothing listens: to be sent again."""
OUTCOMES = (ANSWERED, REFUSED, CLOSED, LEFT, LOST, SILENT)

THREADS = 4
"""Of each process that sends."""
CONNECT = 5
"""Seconds."""
_CHANNEL = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.use_local_subchannel_pool", 1),
)
# gRPC itself says UNAVAILABLE where there is no server.
_UNREACHED = re.compile(r"failed to connect|connection refused", re.IGNORECASE)
_BROKEN = re.compile(
    r"socket closed|connection reset|recvmsg|broken pipe|goaway|stream|transport|connection", re.IGNORECASE
)


@dataclass(frozen=True)
class Ending:
    """Of one input."""

    kind: str
    number: int
    outcome: str
    status: str = ""
    """HTTP's, or gRPC's name."""
    seconds: float = 0.0
    detail: str = ""
    """What the server said, shortened."""
    size: int = 0
    """Bytes that were sent."""


class Sender:
    """One after the other; over gRPC on one connection, over HTTP on one each."""

    def __init__(self, http_port: int, grpc_port: int) -> None:
        self._http_port = http_port
        self._channel = grpc.insecure_channel(f"127.0.0.1:{grpc_port}", options=_CHANNEL)
        self._infer = self._channel.unary_unary(INFER)

    def send(self, one: Input) -> tuple[str, str, str]:
        """-> outcome, status, detail."""
        return self._grpc(one) if one.protocol == "grpc" else self._http(one)

    def _grpc(self, one: Input) -> tuple[str, str, str]:
        way, after = one.leave or ("", 0.0)
        call = self._infer.future(one.data, timeout=after if way == "deadline" else one.seconds)
        if way == "cancel":
            time.sleep(after)
            call.cancel()
        try:
            call.result()
            return ANSWERED, "OK", ""
        except grpc.FutureCancelledError:
            return LEFT, "CANCELLED", ""
        except grpc.RpcError as error:
            status, detail = error.code().name, str(error.details())
        if status == "DEADLINE_EXCEEDED":
            return (LEFT if way else SILENT), status, detail
        if status == "UNAVAILABLE" and _UNREACHED.search(detail):
            return UNREACHED, status, detail
        if status == "UNAVAILABLE" and _BROKEN.search(detail):
            return LOST, status, detail
        return REFUSED, status, detail

    def _http(self, one: Input) -> tuple[str, str, str]:
        try:
            connection = socket.create_connection(("127.0.0.1", self._http_port), CONNECT)
        except OSError as error:
            return UNREACHED, "", repr(error)
        with connection:
            until = time.monotonic() + one.seconds
            if one.leave:
                return _leave(connection, one.data, *one.leave)
            try:
                connection.settimeout(one.seconds)
                sending: OSError | None = None
                try:
                    connection.sendall(one.data)
                    if one.half:
                        connection.shutdown(socket.SHUT_WR)
                except OSError as error:
                    # It may have answered before it has read all.
                    sending = error
                connection.settimeout(max(0.01, until - time.monotonic()))
                return _answers(connection, one.answers)
            except TimeoutError as error:
                return SILENT, "", repr(sending or error)
            except (OSError, http.client.HTTPException) as error:
                return (CLOSED if one.may_close else LOST), "", repr(sending or error)

    def close(self) -> None:
        self._channel.close()


def _leave(connection: socket.socket, data: bytes, way: str, after: float) -> tuple[str, str, str]:
    if way == "reset":
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.settimeout(CONNECT)
    try:
        connection.sendall(data)
    except OSError as error:
        return LOST, "", repr(error)
    time.sleep(after)
    return LEFT, way, ""


class _Shared:
    """What HTTPResponse takes for a socket: several read from one buffer."""

    def __init__(self, connection: socket.socket) -> None:
        self._file = connection.makefile("rb")
        self._file.close = lambda: None  # type: ignore[method-assign]

    def makefile(self, mode: str) -> io.BufferedReader:
        return self._file


def _answers(connection: socket.socket, count: int) -> tuple[str, str, str]:
    """The first that is no 200, or the last."""
    shared, status, detail = _Shared(connection), 0, b""
    for _ in range(count):
        response = http.client.HTTPResponse(shared)  # type: ignore[arg-type]
        response.begin()
        status, detail = response.status, response.read()
        if status != 200:
            return REFUSED, str(status), detail[:300].decode("utf-8", "replace")
    return ANSWERED, str(status), ""


def send_all(
    ports: tuple[int, int], seed: int, order: Sequence[tuple[str, int]], endings: Any, up: Any, stop: Any
) -> None:
    """In a process of its own: `order`'s inputs by THREADS, each of which tells `endings`, a queue, what it sends next,
    as (kind, number), and what came of it, as Ending. `up` and `stop` are events."""
    left: queue.SimpleQueue[tuple[str, int]] = queue.SimpleQueue()
    for one in order:
        left.put(one)

    def work() -> None:
        sender = Sender(*ports)
        while not stop.is_set():
            try:
                kind, number = left.get_nowait()
            except queue.Empty:
                break
            endings.put((kind, number))
            endings.put(ending(sender, kind, seed, number, up, stop))
        sender.close()

    threads = [threading.Thread(target=work) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    endings.put(None)


def ending(sender: Sender, kind: str, seed: int, number: int, up: Any, stop: Any) -> Ending:
    """Of one input, sent again where no server was reached."""
    one = make(kind, seed, number)
    for _ in range(20):
        while not up.wait(1) and not stop.is_set():
            pass
        began = time.monotonic()
        outcome, status, detail = sender.send(one)
        if outcome != UNREACHED or stop.is_set():
            return Ending(kind, number, outcome, status, time.monotonic() - began, detail[:300], len(one.data))
        time.sleep(0.5)
    return Ending(kind, number, LOST, status, 0.0, detail[:300])
