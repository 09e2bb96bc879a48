"""Between Triton's Python backend and us: what every model.py of the model repository needs of its requests."""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from queue import Full, Queue
from threading import Lock, Thread
from typing import Any

# Triton puts this module on the path of its Python stubs; tests put a fake there.
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from florence2.errors import Cancelled, InvalidRequest, Unavailable
from florence2.generation.engine import TIMES

Tensors = Mapping[str, NDArray[Any]]

# By name: the stub fills its module in only after this one is imported.
_CODES = {InvalidRequest: "INVALID_ARG", Unavailable: "UNAVAILABLE", Cancelled: "CANCELLED"}


def version_folder(args: Mapping[str, str]) -> Path:
    """The folder of the model version that `initialize` was called for."""
    return Path(args["model_repository"]) / args["model_version"]


def parameters(args: Mapping[str, str]) -> dict[str, str]:
    """`parameters` of config.pbtxt."""
    config = json.loads(args["model_config"])
    return {name: value["string_value"] for name, value in config.get("parameters", {}).items()}


def at_least_one(given: Mapping[str, str], name: str) -> int:
    """A parameter that counts something. Raises ValueError."""
    if int(given[name]) < 1:
        raise ValueError(f"{name} is {given[name]} in config.pbtxt; it must be 1 or more")
    return int(given[name])


def inputs(request: Any) -> dict[str, NDArray[Any]]:
    """The request's tensors by name, without the batch dimension, which is 1; optional ones that it leaves out are
    missing. Copies: a request's memory is the server's again when `execute` returns."""
    return {tensor.name(): tensor.as_numpy()[0].copy() for tensor in request.inputs()}


def deadline(request: Any, timeout: float) -> float:
    """When to give up, on `time.monotonic`'s clock. A request may ask for less than `timeout` seconds, not for more: as
    in Triton's own queues."""
    return time.monotonic() + min(timeout, request.timeout() / 1e6 or timeout)


def respond(answer: Callable[[Tensors], Tensors], request: Any) -> Any:
    """What `answer` returns for the request's inputs, or its error: one bad request never hurts another."""
    try:
        return response(answer(inputs(request)), request.request_id())
    except Exception as error:
        return response(error, request.request_id())


def response(answer: Tensors | Exception, request_id: str) -> Any:
    """Output tensors by name, the batch dimension added, or an error."""
    if not isinstance(answer, Exception):
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, value[None]) for name, value in answer.items()])
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

    def __call__(self, answer: Tensors | Exception) -> None:
        try:
            self._send(answer)
        except Exception as error:
            # No shared memory for the answer, perhaps; an error needs little. Unanswered, a request waits for ever.
            self._send(error)

    def _send(self, answer: Tensors | Exception) -> None:
        # Answer and end in one call: Triton's response cache takes nothing else.
        self._sender.send(response(answer, self._request_id), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def is_cancelled(self) -> bool:
        """Asks the server. Always false behind an ensemble, which passes no cancel on."""
        return self._sender.is_cancelled()


class Worker:
    """Threads that answer one request after the other each, with a bounded list of those that wait.

    Not Triton's own queue policy: with one and with batches of 1, the dynamic batcher misses that an instance became
    idle and sleeps for up to half a second (core, `DynamicBatchScheduler::WaitForPayloadSlotAvailable`): 64 requests at
    once took 6 s instead of 0.5.
    """

    def __init__(
        self,
        answer: Callable[[Tensors], Tensors],
        given: Mapping[str, str],
        at_once: int = 1,
        metrics: "Metrics | None" = None,
    ) -> None:
        """`given`: the model's parameters, of which max_waiting and timeout_seconds are read. `at_once` requests are
        answered at the same time. `metrics`: of TIMES, closed by `stop`."""
        self._answer = answer
        self._metrics, self._figures, self._lock = metrics, dict.fromkeys(TIMES, 0.0), Lock()
        self._timeout = float(given["timeout_seconds"])
        max_waiting = at_least_one(given, "max_waiting")
        self._waiting: Queue[tuple[dict[str, NDArray[Any]], Responder, float, float] | None] = Queue(max_waiting)
        self._threads = [Thread(target=self._run, name="worker", daemon=True) for _ in range(at_once)]
        for thread in self._threads:
            thread.start()

    def submit(self, request: Any) -> None:
        """Never waits. A full list answers UNAVAILABLE."""
        responder = Responder(request)
        try:
            until = deadline(request, self._timeout)
            self._waiting.put_nowait((inputs(request), responder, until, time.monotonic()))
        except Full:
            responder(Unavailable(f"{self._waiting.maxsize} requests are waiting already; try again later"))
        except Exception as error:
            responder(error)

    def stop(self) -> None:
        """After those that wait."""
        for _ in self._threads:
            self._waiting.put(None)
        for thread in self._threads:
            thread.join()
        if self._metrics:
            self._metrics.close()

    def _run(self) -> None:
        while item := self._waiting.get():
            tensors, responder, until, came = item
            began = time.monotonic()
            try:
                if began >= until:
                    raise Unavailable("the request's time was over before its turn; allow more, or try again later")
                answer: Tensors | Exception = self._answer(tensors)
            except Exception as error:
                answer = error
            except BaseException as error:  # a panic of tokenizers, which is in Rust, is no Exception
                answer = RuntimeError(repr(error))
            try:
                responder(answer)
            except Exception as error:
                pb_utils.Logger.log_error(f"an answer could not be delivered: {error!r}")
            self._count(began - came, time.monotonic() - began)

    def _count(self, *seconds: float) -> None:
        """`seconds`: of one request, in the order of TIMES."""
        if not self._metrics:
            return
        with self._lock:
            for name, more in zip(TIMES, seconds, strict=True):
                self._figures[name] += more
            if self._metrics.are_due() or self._waiting.empty():
                self._metrics.try_report(self._figures)


class Metrics:
    """Figures on the server's metrics endpoint, labelled with model and version."""

    EVERY = 0.25
    """Seconds between two reports: every figure goes to the server and back."""

    def __init__(self, args: Mapping[str, str], counters: Mapping[str, str], gauges: Mapping[str, str]) -> None:
        """Names with what they mean."""
        self._next = 0.0
        self._counted = dict.fromkeys(counters, 0.0)
        # The families must live as long as their metrics.
        self._families: dict[str, Any] = {}
        self._metrics: dict[str, Any] = {}
        labels = {"model": args["model_name"], "version": args["model_version"]}
        kinds = ((counters, pb_utils.MetricFamily.COUNTER), (gauges, pb_utils.MetricFamily.GAUGE))
        try:
            for names, kind in kinds:
                for name, description in names.items():
                    self._families[name] = pb_utils.MetricFamily(name=name, description=description, kind=kind)
                    self._metrics[name] = self._families[name].Metric(labels=labels)
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

    def try_report(self, figures: Mapping[str, float]) -> None:
        """Figures that can't be reported stop nothing."""
        try:
            self.report(figures)
        except Exception as error:
            pb_utils.Logger.log_error(f"metrics could not be reported: {error!r}")

    def close(self) -> None:
        """In `finalize`: Triton's stub crashes when they go after what it keeps them in (24.10)."""
        self._metrics.clear()
        self._families.clear()
