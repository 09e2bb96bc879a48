"""What is sent, as bytes: a request for tensors, over HTTP with Triton's binary extension or over gRPC, and an input of
any kind."""

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from numpy.typing import NDArray
from tritonclient.grpc import service_pb2
from tritonclient.utils import np_to_triton_dtype

INFER = "/inference.GRPCInferenceService/ModelInfer"


@dataclass(frozen=True)
class Input:
    protocol: str
    """http or grpc."""
    data: bytes
    """All that is written to the connection, or the message."""
    seconds: float = 30
    """After which an answer is missing."""
    answers: int = 1
    """Over HTTP, where requests are pipelined."""
    may_close: bool = False
    """What is sent need not be HTTP: the server may end the connection instead of answering."""
    half: bool = False
    """Ours is the last word: our side of the connection ends when all is written."""
    leave: tuple[str, float] | None = None
    """How we go away, and after how many seconds: close or reset over HTTP, cancel or deadline over gRPC."""


@dataclass(frozen=True)
class Tensor:
    name: str
    datatype: str
    shape: tuple[int, ...]
    data: bytes
    """As in Triton's binary extension."""


@dataclass(frozen=True)
class Request:
    tensors: tuple[Tensor, ...]
    model: str = "florence2"
    outputs: Sequence[str] | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def without(self, *names: str) -> "Request":
        return replace(self, tensors=tuple(tensor for tensor in self.tensors if tensor.name not in names))

    def having(self, *tensors: Tensor) -> "Request":
        """These instead of those of their names."""
        rest = self.without(*(tensor.name for tensor in tensors))
        return replace(rest, tensors=(*rest.tensors, *tensors))


def array(name: str, values: NDArray[Any]) -> Tensor:
    return Tensor(name, np_to_triton_dtype(values.dtype), values.shape, values.tobytes())


def text(name: str, *values: bytes) -> Tensor:
    return Tensor(name, "BYTES", (1, len(values)), b"".join(prefixed(value) for value in values))


def prefixed(value: bytes) -> bytes:
    return struct.pack("<I", len(value)) + value


def post(path: str, body: bytes, *headers: str) -> bytes:
    """An HTTP request that is whole."""
    lines = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode("utf-8", "surrogateescape") + b"\r\n\r\n" + body


def infer_path(request: Request) -> str:
    return f"/v2/models/{request.model}/infer"


def head(request: Request) -> dict[str, Any]:
    """The JSON before the tensors' bytes."""
    return {
        "inputs": [
            {
                "name": tensor.name,
                "datatype": tensor.datatype,
                "shape": list(tensor.shape),
                "parameters": {"binary_data_size": len(tensor.data)},
            }
            for tensor in request.tensors
        ],
        **({} if request.outputs is None else {"outputs": [{"name": name} for name in request.outputs]}),
        **({"parameters": dict(request.parameters)} if request.parameters else {}),
    }


def http_body(request: Request) -> tuple[bytes, bytes]:
    """The JSON, and what follows it."""
    return json.dumps(head(request)).encode(), b"".join(tensor.data for tensor in request.tensors)


def http(request: Request, **rest: Any) -> Input:
    start, tail = http_body(request)
    length = f"Inference-Header-Content-Length: {len(start)}"
    return Input("http", post(infer_path(request), start + tail, length), **rest)


def grpc_message(request: Request) -> service_pb2.ModelInferRequest:
    message = service_pb2.ModelInferRequest(model_name=request.model)
    for tensor in request.tensors:
        message.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        message.raw_input_contents.append(tensor.data)
    for name in request.outputs or ():
        message.outputs.add(name=name)
    for name, value in request.parameters.items():
        kinds = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}
        setattr(message.parameters[name], kinds[type(value)], value)
    return message


def grpc(request: Request, **rest: Any) -> Input:
    return Input("grpc", grpc_message(request).SerializeToString(deterministic=True), **rest)
