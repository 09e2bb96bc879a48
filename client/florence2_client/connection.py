"""One server over gRPC or HTTP, plain or with TLS: tensors in, tensors out, errors under one set of names."""

import asyncio
import os
import re
import ssl
from collections.abc import Mapping
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
    """Made by `Endpoint.connect`."""

    def __init__(self, endpoint: Endpoint, triton: ModuleType, client: Any) -> None:
        self._endpoint, self._triton, self._client = endpoint, triton, client

    async def infer(self, model: str, tensors: Mapping[str, Tensor], seconds: float) -> Reply:
        """The server is told to give up when we do, and the call is cancelled then. Raises ServerRefused."""
        url = self._endpoint.url
        try:
            async with asyncio.timeout(seconds):
                result = await self._client.infer(
                    model,
                    self._inputs(tensors),
                    # gRPC takes no others than lower case; HTTP takes any for the same.
                    headers={name.lower(): value for name, value in (self._endpoint.headers or {}).items()},
                    # Microseconds; 0 is Triton's word for no limit.
                    timeout=max(1, int(seconds * 1e6)),
                )
        except InferenceServerException as error:
            raise self._refused(error) from error
        except TimeoutError as error:
            raise refused(url, "no answer within the timeout", "DEADLINE_EXCEEDED") from error
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # gRPC's word for a channel that was closed under it.
            raise refused(url, "the client was closed while it waited", "CANCELLED") from error
        except Exception as error:
            # OSError, and what aiohttp makes of connections that end in the middle.
            if isinstance(error, OSError) or type(error).__module__.startswith("aiohttp"):
                raise refused(url, str(error) or type(error).__name__, "UNAVAILABLE", reached=False) from error
            raise
        response = result.get_response()
        version = response["model_version"] if isinstance(response, dict) else response.model_version
        outputs = {name: result.as_numpy(name) for name in _OUTPUTS}
        if missing := [name for name, values in outputs.items() if values is None]:
            message = (
                f"an answer without {', '.join(missing)}: the response cache holds what the first of equal requests "
                "named; name all outputs or none in every client, or serve without --response-cache"
            )
            raise refused(url, message, "INTERNAL")
        return Reply(version, {name: values[0] for name, values in outputs.items()})

    async def close(self) -> None:
        await self._client.close()

    def _inputs(self, tensors: Mapping[str, Tensor]) -> list[Any]:
        inputs = []
        for name, (datatype, values) in tensors.items():
            inputs.append(self._triton.InferInput(name, list(values.shape), datatype))
            inputs[-1].set_data_from_numpy(values)
        return inputs

    def _refused(self, error: InferenceServerException) -> ServerRefused:
        status = str(error.status() or "UNKNOWN").removeprefix("StatusCode.")
        status = _HTTP_STATUS.get(status, status)
        message = str(error.message())
        return refused(self._endpoint.url, message, status, reached=not _GRPC_ALONE.search(message))


def tensor(datatype: str, dtype: Any, value: Any) -> Tensor:
    """One value, [1, 1]."""
    return datatype, np.array([[value]], dtype)
