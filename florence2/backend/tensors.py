"""Between Triton's requests and ours: tensors, parameters, deadlines, answers and errors."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

# Triton puts this module on the path of its Python stubs; tests put a fake there.
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from florence2.errors import Cancelled, InvalidRequest, TimeIsOver, Unavailable

Tensors = Mapping[str, NDArray[Any]]
N = TypeVar("N", int, float)

ARRIVAL = "arrival"
"""The tensor, INT64 [2], that preprocess hands on: when the request came, in nanoseconds of CLOCK_MONOTONIC, which all
processes of a machine share, and its number there. With a response cache, whose answers must not depend on that: 0, and
when a model last answered with an error, because Triton (24.10) keeps errors like answers, and gives them as answers
without a tensor."""

# What a failure is counted as, and by what name Triton knows it: the stub fills its module in only after this one is
# imported.
_ERRORS: tuple[tuple[type[Exception], str, str], ...] = (
    (InvalidRequest, "client", "INVALID_ARG"),
    (Cancelled, "client", "CANCELLED"),
    (TimeIsOver, "deadline", "UNAVAILABLE"),
    (Unavailable, "overload", "UNAVAILABLE"),
    (Exception, "server", "INTERNAL"),
)
REASONS = ("client", "overload", "deadline", "server")


def version_folder(args: Mapping[str, str]) -> Path:
    """The folder of the model version that `initialize` was called for."""
    return Path(args["model_repository"]) / args["model_version"]


def parameters(args: Mapping[str, str]) -> dict[str, str]:
    """`parameters` of config.pbtxt."""
    config = json.loads(args["model_config"])
    return {name: value["string_value"] for name, value in config.get("parameters", {}).items()}


def device_id(args: Mapping[str, str]) -> int:
    """Of the instance's own GPU, as `instance_group` says."""
    return int(args["model_instance_device_id"])


def at_least(least: int, given: Mapping[str, str], name: str) -> int:
    """A parameter that counts something. Raises ValueError."""
    return _checked(int, "a whole number", least, given, name)


def amount(given: Mapping[str, str], name: str) -> float:
    """A parameter that measures something, 0 or more. Raises ValueError."""
    return _checked(float, "a number", 0, given, name)


def _checked(kind: type[N], what: str, least: int, given: Mapping[str, str], name: str) -> N:
    try:
        value = kind(given[name])
    except ValueError:
        value = kind(-1)
    # What is no number is not more either.
    if not value >= least:
        raise ValueError(f"{name} is {given[name]} in config.pbtxt; it must be {what}, {least} or more")
    return value


class Inputs(dict[str, NDArray[Any]]):
    """By name. Of a model that has optional inputs Triton only counts those that come."""

    def __missing__(self, name: str) -> NDArray[Any]:
        raise InvalidRequest(f"{name} is missing")


def views(request: Any) -> Inputs:
    """The request's tensors, without the batch dimension, which is 1; optional ones that it leaves out are missing.
    Their memory is the server's again when `execute` returns."""
    return Inputs({tensor.name(): tensor.as_numpy()[0] for tensor in request.inputs()})


def copies(tensors: Tensors) -> Inputs:
    """What lasts."""
    return Inputs({name: value.copy() for name, value in tensors.items()})


@dataclass(frozen=True)
class Arrival:
    """When a request came to the server, and what it is called in logs."""

    nanoseconds: int
    number: int

    @classmethod
    def of(cls, tensors: Tensors) -> "Arrival":
        """As preprocess told it; now, of a request that came here directly."""
        now = time.monotonic_ns()
        if ARRIVAL not in tensors:
            return cls(now, 0)
        nanoseconds, number = tensors[ARRIVAL].tolist()
        if not nanoseconds:
            return cls(now, 0)
        # Nobody comes from the future, and what is long past must not leave the range of a float's whole numbers.
        return cls(min(max(nanoseconds, 0), now), number)

    def deadline(self, request: Any, timeout: float) -> float:
        """When to give up, on `time.monotonic`'s clock. A request may ask for less than `timeout` seconds, not for
        more: as in Triton's own queues."""
        return self.nanoseconds / 1e9 + min(timeout, request.timeout() / 1e6 or timeout)


def response(answer: Tensors | Exception, what: str) -> Any:
    """Output tensors by name, the batch dimension added, or an error, whose log line says `what` failed."""
    if not isinstance(answer, Exception):
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, value[None]) for name, value in answer.items()])
    code = next(code for kind, _, code in _ERRORS if isinstance(answer, kind))
    text = str(answer)
    if code == "INTERNAL":
        pb_utils.Logger.log_error(f"{what} failed: {answer!r}")
        text = f"{type(answer).__name__}: {answer}"
    error = pb_utils.TritonError(text, getattr(pb_utils.TritonError, code))
    return pb_utils.InferenceResponse(output_tensors=[], error=error)


def reason(error: Exception) -> str:
    """One of REASONS."""
    return next(reason for kind, reason, _ in _ERRORS if isinstance(error, kind))


def request_id(request: Any) -> str:
    """As its client called it. Triton's HTTP endpoint takes bytes for it that are no UTF-8."""
    try:
        return request.request_id()
    except UnicodeDecodeError:
        return "?"


class Responder:
    """Answers one request, once: what `execute` returns for it, or from any thread afterwards."""

    def __init__(self, request: Any, failed: Callable[[Exception], None] = lambda error: None) -> None:
        """`failed` is told of an answer that is an error."""
        self._sender, self._failed = request.get_response_sender(), failed
        self._id = request_id(request)
        self.number = 0
        """As `Arrival` has it."""

    def refusal(self, error: Exception) -> Any:
        """To be returned by `execute`, which costs a message less than sending it."""
        self._failed(error)
        return self._response(error)

    def __call__(self, answer: Tensors | Exception) -> None:
        if isinstance(answer, Exception):
            self._failed(answer)
        try:
            self._send(answer)
        except Exception as error:
            # No shared memory for the answer, perhaps; an error needs little. Unanswered, a request waits for ever.
            if not isinstance(answer, Exception):
                self._failed(error)
            self._send(error)

    def _send(self, answer: Tensors | Exception) -> None:
        # Answer and end in one call: Triton's response cache takes nothing else.
        self._sender.send(self._response(answer), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _response(self, answer: Tensors | Exception) -> Any:
        return response(answer, f"request {self.number} {self._id!r}")

    def is_cancelled(self) -> bool:
        """Asks the server."""
        return self._sender.is_cancelled()
