"""One server over gRPC or HTTP, plain or with TLS: tensors in, tensors out, errors under one set of names."""

import asyncio
import os
import re
import ssl
import time
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException

from florence2_client.errors import ServerRefused, refused

File = str | os.PathLike[str]
Tensor = tuple[str, NDArray[Any]]
"""Triton's name of the type, and the values."""

GRACE = 1.0
"""Seconds that a request has to end by itself after its timeout, or after whoever waited for it has gone. Only then is
it cancelled: Triton before 24.12 crashes of gRPC requests that are cancelled in their first milliseconds."""

OVER = "no answer within the timeout"

_SCHEMES = {"grpc": ("grpc", False), "grpcs": ("grpc", True), "http": ("http", False), "https": ("http", True)}
_OUTPUTS = ("answer", "text", "token_ids", "token_logprobs", "sequence_score", "finish_reason")
# What Triton's HTTP endpoint makes of its codes (server, http_server.cc).
_HTTP_STATUS = {
    "400": "INVALID_ARGUMENT",
    "401": "UNAUTHENTICATED",
    "403": "PERMISSION_DENIED",
    "404": "NOT_FOUND",
    "408": "DEADLINE_EXCEEDED",
    "413": "INVALID_ARGUMENT",
    "429": "UNAVAILABLE",
    "499": "CANCELLED",
    "500": "INTERNAL",
    "501": "UNIMPLEMENTED",
    "502": "UNAVAILABLE",
    "503": "UNAVAILABLE",
    "504": "DEADLINE_EXCEEDED",
}

# gRPC answers in the server's place where it finds none.
_GRPC_ALONE = re.compile(r"failed to connect|connection|socket|name resolution|DNS", re.IGNORECASE)

# What Triton answers, as INTERNAL, to requests in a python model whose process has ended; another is on its way.
_LOST = re.compile(r"Stub process .* is not healthy")

# Given any, tritonclient leaves out its own, of which the first two are. gRPC would let a second and more go by before
# it connects anew, and every try until then fails.
_CHANNEL = {
    "grpc.max_send_message_length": 2**31 - 1,
    "grpc.max_receive_message_length": 2**31 - 1,
    "grpc.initial_reconnect_backoff_ms": 100,
    "grpc.max_reconnect_backoff_ms": 1000,
}

# Where gRPC was used first. A process that is forked from that one crashes in gRPC's C core.
_grpc_in: dict[str, int] = {}


@dataclass(frozen=True)
class Reply:
    model_version: str
    outputs: Mapping[str, NDArray[Any]]
    """Without the batch dimension."""


@dataclass(frozen=True)
class Endpoint:
    """As the clients' arguments say. Raises ValueError, and OSError for a file that can't be read."""

    url: str
    headers: Mapping[str, str] | None = None
    ca: File | None = None
    certificate: File | None = None
    key: File | None = None

    def __post_init__(self) -> None:
        if self.protocol not in _SCHEMES or not self.address:
            raise ValueError(
                f"a server is HOST:PORT for gRPC, or grpcs://, http:// or https:// before it, not {self.url!r}"
            )
        if self._is_grpc and not self.address.rpartition(":")[2].isdecimal():
            raise ValueError(f"{self.url!r} names no port; Triton's for gRPC is 8001 where nothing else was said")
        if not self._has_tls and (self.ca or self.certificate or self.key):
            raise ValueError(f"ca, certificate and key are for TLS: write grpcs:// or https://, not {self.url!r}")
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key belong together")
        if self._has_tls:
            self._context()

    @property
    def protocol(self) -> str:
        return self.url.partition("://")[0].lower() if "://" in self.url else "grpc"

    @property
    def address(self) -> str:
        return self.url.partition("://")[2].rstrip("/") if "://" in self.url else self.url

    @property
    def _is_grpc(self) -> bool:
        return _SCHEMES[self.protocol][0] == "grpc"

    @property
    def _has_tls(self) -> bool:
        return _SCHEMES[self.protocol][1]

    def connect(self) -> "Connection":
        """In the event loop that will use it."""
        return self._grpc() if self._is_grpc else self._http()

    def _grpc(self) -> "Connection":
        import tritonclient.grpc.aio as triton

        if _grpc_in.setdefault("process", os.getpid()) != os.getpid():
            raise RuntimeError("gRPC was used before this process was forked: take http://, or spawn processes")
        client = triton.InferenceServerClient(
            self.address,
            ssl=self._has_tls,
            root_certificates=self.ca,
            private_key=self.key,
            certificate_chain=self.certificate,
            channel_args=list(_CHANNEL.items()),
        )
        return Connection(self, triton, client)

    def _http(self) -> "Connection":
        import tritonclient.http.aio as triton

        client = triton.InferenceServerClient(
            self.address,
            # None of aiohttp's own limits: the server bounds the requests, and `infer` the time.
            conn_limit=0,
            conn_timeout=None,
            ssl=self._has_tls,
            ssl_context=self._context() if self._has_tls else None,
        )
        return Connection(self, triton, client)

    def _context(self) -> ssl.SSLContext:
        try:
            context = ssl.create_default_context(cafile=self.ca)
            if self.certificate is not None:
                context.load_cert_chain(self.certificate, self.key)
        except ssl.SSLError as error:
            raise ValueError(f"ca, certificate and key are PEM files: {error}") from error
        return context


class Connection:
    """Made by `Endpoint.connect`.

    A request is a task of its own, which may outlive its caller by GRACE. Not everywhere: if `asyncio.run` ends before
    `close` did, it cancels all tasks, gRPC's own among them; and a process that ends then cuts its connections.
    """

    def __init__(self, endpoint: Endpoint, triton: ModuleType, client: Any) -> None:
        self._endpoint, self._triton, self._client = endpoint, triton, client
        self._running: set[asyncio.Task[Any]] = set()
        self._closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def infer(self, model: str, tensors: Mapping[str, Tensor], seconds: float) -> Reply:
        """The server is told to give up after `seconds`, and has GRACE to say that it did. Raises ServerRefused."""
        url, over = self._endpoint.url, time.monotonic() + seconds
        asked = self._client.infer(
            model,
            self._inputs(tensors),
            # gRPC takes no others than lower case; HTTP takes any for the same.
            headers={name.lower(): value for name, value in (self._endpoint.headers or {}).items()},
            # Microseconds; 0 is Triton's word for no limit.
            timeout=max(1, int(seconds * 1e6)),
        )
        try:
            result = await self._answer(asked, seconds + GRACE)
        except InferenceServerException as error:
            raise self._refused(error, is_over=time.monotonic() >= over) from error
        except Exception as error:
            # OSError, and what aiohttp makes of connections that end in the middle.
            if isinstance(error, OSError) or type(error).__module__.startswith("aiohttp"):
                raise refused(url, str(error) or type(error).__name__, "UNAVAILABLE", reached=False) from error
            raise
        response = result.get_response()
        version = response["model_version"] if isinstance(response, dict) else response.model_version
        outputs = {name: result.as_numpy(name) for name in _OUTPUTS}
        if missing := [name for name, values in outputs.items() if values is None]:
            raise refused(url, f"an answer without {', '.join(missing)}", "INTERNAL")
        return Reply(version, {name: values[0] for name, values in outputs.items()})

    async def close(self) -> None:
        """Refuses those who wait at once, then gives what is still running GRACE to end; cancelled, it doesn't."""
        self._closed.set_result(None)
        try:
            if running := [task for task in self._running if not task.done()]:
                await asyncio.wait(running, timeout=GRACE)
        finally:
            await self._client.close()

    async def _answer(self, asked: Coroutine[Any, Any, Any], seconds: float) -> Any:
        """What `asked` returns or raises. Whoever stops waiting for that leaves it running, for GRACE."""
        task = asyncio.create_task(asked)
        self._running.add(task)
        task.add_done_callback(self._forget)
        try:
            # Cancels nothing when it is cancelled, unlike `asyncio.timeout` and `wait_for`.
            done, _ = await asyncio.wait((task, self._closed), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            asyncio.get_running_loop().call_later(GRACE, task.cancel)
            raise
        if task in done:
            return task.result()
        if done:
            raise refused(self._endpoint.url, "the client was closed while it waited", "CANCELLED")
        task.cancel()
        raise refused(self._endpoint.url, OVER, "DEADLINE_EXCEEDED")

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            # Else asyncio reports an error that nobody waited for.
            task.exception()

    def _inputs(self, tensors: Mapping[str, Tensor]) -> list[Any]:
        inputs = []
        for name, (datatype, values) in tensors.items():
            inputs.append(self._triton.InferInput(name, list(values.shape), datatype))
            inputs[-1].set_data_from_numpy(values)
        return inputs

    def _refused(self, error: InferenceServerException, is_over: bool) -> ServerRefused:
        status = str(error.status() or "UNKNOWN").removeprefix("StatusCode.")
        status = _HTTP_STATUS.get(status, status)
        message = str(error.message())
        if _LOST.search(message):
            status = "UNAVAILABLE"
        reached = not _GRPC_ALONE.search(message)
        if is_over and reached and status == "UNAVAILABLE":
            message, status = OVER, "DEADLINE_EXCEEDED"
        return refused(self._endpoint.url, message, status, reached)


def tensor(datatype: str, dtype: Any, value: Any) -> Tensor:
    """One value, [1, 1]."""
    return datatype, np.array([[value]], dtype)
