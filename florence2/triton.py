"""Between Triton's Python backend and us: what every model.py of the model repository needs of its requests."""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

# Triton puts this module on the path of its Python stubs; tests put a fake there.
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from florence2.errors import Cancelled, InvalidRequest, Unavailable

# By name: the stub fills its module in only after this one is imported.
_CODES = {InvalidRequest: "INVALID_ARG", Unavailable: "UNAVAILABLE", Cancelled: "CANCELLED"}


def version_folder(args: Mapping[str, str]) -> Path:
    """The folder of the model version that `initialize` was called for."""
    return Path(args["model_repository"]) / args["model_version"]


def parameters(args: Mapping[str, str]) -> dict[str, str]:
    """`parameters` of config.pbtxt."""
    config = json.loads(args["model_config"])
    return {name: value["string_value"] for name, value in config.get("parameters", {}).items()}


def tensor(request: Any, name: str) -> NDArray[Any]:
    return pb_utils.get_input_tensor_by_name(request, name).as_numpy()


def strings(request: Any, name: str) -> list[bytes]:
    return tensor(request, name).reshape(-1).tolist()


def scalar(request: Any, name: str) -> Any:
    """The value of an optional input with one element, or None."""
    given = pb_utils.get_input_tensor_by_name(request, name)
    return None if given is None else given.as_numpy().reshape(-1)[0].item()


Answer = Mapping[str, NDArray[Any]]
"""Output tensors by name."""


def respond(answer: Callable[[Any], Answer], request: Any) -> Any:
    """What `answer` returns for the request, or its error, as a response: one bad request never hurts another."""
    try:
        return response(answer(request), request.request_id())
    except Exception as error:
        return response(error, request.request_id())


def response(answer: Answer | Exception, request_id: str) -> Any:
    if not isinstance(answer, Exception):
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, value) for name, value in answer.items()])
    if type(answer) in _CODES:
        error = pb_utils.TritonError(str(answer), getattr(pb_utils.TritonError, _CODES[type(answer)]))
    else:
        pb_utils.Logger.log_error(f"request {request_id!r} failed: {answer!r}")
        error = pb_utils.TritonError(f"{type(answer).__name__}: {answer}", pb_utils.TritonError.INTERNAL)
    return pb_utils.InferenceResponse(output_tensors=[], error=error)


class Responder:
    """Answers one request, once, from any thread, after `execute` has returned."""

    def __init__(self, request: Any) -> None:
        self._sender, self._request_id = request.get_response_sender(), request.request_id()

    def __call__(self, answer: Answer | Exception) -> None:
        # Answer and end in one call: Triton's response cache takes nothing else.
        self._sender.send(response(answer, self._request_id), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def is_cancelled(self) -> bool:
        """Asks the server. Always false behind an ensemble, which passes no cancel on."""
        return self._sender.is_cancelled()


class Metrics:
    """Figures on the server's metrics endpoint, labelled with model and version."""

    EVERY = 0.25
    """Seconds between two reports: every figure goes to the server and back."""

    def __init__(self, args: Mapping[str, str], counters: Mapping[str, str], gauges: Mapping[str, str]) -> None:
        """Names with what they mean."""
        self._next = 0.0
        labels = {"model": args["model_name"], "version": args["model_version"]}
        kinds = ((counters, pb_utils.MetricFamily.COUNTER), (gauges, pb_utils.MetricFamily.GAUGE))
        self._metrics, self._counted = {}, dict.fromkeys(counters, 0.0)
        try:
            # The families must live as long as their metrics.
            self._families = {
                name: pb_utils.MetricFamily(name=name, description=description, kind=kind)
                for names, kind in kinds
                for name, description in names.items()
            }
            self._metrics = {name: family.Metric(labels=labels) for name, family in self._families.items()}
        except pb_utils.TritonModelException as error:
            pb_utils.Logger.log_info(f"no metrics of {args['model_name']}: {error}")

    def are_due(self) -> bool:
        return time.monotonic() >= self._next

    def report(self, figures: Mapping[str, float]) -> None:
        """Counters by how much there is of them in all."""
        self._next = time.monotonic() + self.EVERY
        for name, metric in self._metrics.items():
            if name in self._counted:
                metric.increment(figures[name] - self._counted[name])
                self._counted[name] = figures[name]
            else:
                metric.set(figures[name])
