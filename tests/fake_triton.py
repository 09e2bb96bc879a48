"""A stand-in for `triton_python_backend_utils`, so that every model.py can be run without a server.

It refuses what the server refuses, and checks when a test ends that every request was answered exactly once.
"""

import importlib.util
import itertools
import json
import os
import sys
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Event, Lock, Thread
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
from google.protobuf import json_format, text_format
from numpy.typing import NDArray
from tritonclient.grpc.model_config_pb2 import ModelConfig

from florence2.backend.occupancy import BEAM_SEARCH, SHM_PREFIX, Occupancy

TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1
HANGS = 60
"""Seconds after which an answer won't come."""


class Tensor:
    def __init__(self, name: str, value: NDArray[Any]) -> None:
        self._name, self._value = name, value

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> NDArray[Any]:
        return self._value


class TritonModelException(Exception):
    pass


class TritonError(Exception):
    INVALID_ARG, INTERNAL, UNAVAILABLE, CANCELLED = "INVALID_ARG", "INTERNAL", "UNAVAILABLE", "CANCELLED"

    def __init__(self, message: str, code: str = INTERNAL) -> None:
        super().__init__(message)
        self._code = code

    def message(self) -> str:
        return str(self)

    def code(self) -> str:
        return self._code


class InferenceResponse:
    def __init__(self, output_tensors: Sequence[Tensor], error: TritonError | None = None) -> None:
        self._tensors, self._error = output_tensors, error

    def tensors(self) -> dict[str, NDArray[Any]]:
        assert self._error is None, self._error
        return {tensor.name(): tensor.as_numpy() for tensor in self._tensors}

    def error(self) -> TritonError | None:
        return self._error


class ResponseSender:
    """Of a model that isn't decoupled: one response, which is the final one."""

    def __init__(self) -> None:
        self.cancelled = False
        self.sent: list[tuple[InferenceResponse, int]] = []
        self.place = -1
        """Among all answers, the first of which has place 0."""
        self._answered = Event()

    def send(self, response: InferenceResponse, flags: int = 0) -> None:
        # Kept, not refused: whoever sends may be ready to live with an error.
        self.sent.append((response, flags))
        self.place = next(_places)
        self._answered.set()

    def is_cancelled(self) -> bool:
        return self.cancelled

    def is_answered(self) -> bool:
        return self._answered.is_set()

    def wait(self) -> InferenceResponse:
        assert self._answered.wait(HANGS), "no answer came"
        self.check()
        return self.sent[0][0]

    def check(self) -> None:
        assert [flags for _, flags in self.sent] == [TRITONSERVER_RESPONSE_COMPLETE_FINAL]


class Request:
    """A request as a client sends it: the batch dimension, exactly 1, is added here."""

    def __init__(self, *, timeout_microseconds: int = 0, **tensors: Any) -> None:
        self._timeout = timeout_microseconds
        self.tensors = {name: Tensor(name, np.array(value)[None]) for name, value in tensors.items()}
        self.sender: ResponseSender | None = None

    def request_id(self) -> str:
        return "test"

    def inputs(self) -> list[Tensor]:
        return list(self.tensors.values())

    def timeout(self) -> int:
        return self._timeout

    def get_response_sender(self) -> ResponseSender:
        if self.sender is None:
            self.sender = ResponseSender()
            _senders.append(self.sender)
        return self.sender

    def take_memory_back(self) -> None:
        """As the server does when `execute` has returned."""
        for tensor in self.tensors.values():
            tensor.as_numpy().fill(b"taken back" if tensor.as_numpy().dtype == object else 77)

    def cancel(self) -> None:
        self.get_response_sender().cancelled = True

    def answer(self) -> InferenceResponse:
        assert self.sender
        return self.sender.wait()


class Metric:
    def __init__(self, family: "MetricFamily") -> None:
        self._family, self._kind = weakref.ref(family), family.kind
        self._value, self._lock = 0.0, Lock()

    def increment(self, value: float) -> None:
        self._check(value >= 0 or self._kind != MetricFamily.COUNTER)
        with self._lock:
            self._value += value

    def set(self, value: float) -> None:
        self._check(self._kind == MetricFamily.GAUGE)
        self._value = value

    def value(self) -> float:
        return self._value

    def has_family(self) -> bool:
        return self._family() is not None

    def _check(self, allowed: bool) -> None:
        if not allowed or not self.has_family():
            raise TritonModelException("not possible with this metric, or its family is gone")


class MetricFamily:
    COUNTER, GAUGE = "counter", "gauge"

    def __init__(self, *, name: str, description: str, kind: str) -> None:
        self.name, self.description, self.kind = name, description, kind

    def Metric(self, *, labels: Mapping[str, str]) -> Metric:
        name = self.name + (f" {labels['reason']}" if "reason" in labels else "")
        metrics[name, labels["model"], labels["version"]] = metric = Metric(self)
        return metric


class Logger:
    lines: ClassVar[list[str]] = []

    @classmethod
    def log_error(cls, message: str) -> None:
        cls.lines.append(f"E {message}")

    @classmethod
    def log_info(cls, message: str) -> None:
        cls.lines.append(f"I {message}")


metrics: dict[tuple[str, str, str], Metric] = {}
"""By name (with the reason, where there is one), model and version, as the metrics endpoint shows them."""
_places = itertools.count()
_senders: list[ResponseSender] = []
_models: list[Any] = []
_others: list[Occupancy] = []


def install() -> None:
    """Become the module that florence2.backend imports."""
    sys.modules["triton_python_backend_utils"] = sys.modules[__name__]
    os.environ[SHM_PREFIX] = f"florence2_fake_{os.getpid()}_"


def beam_search_with_room(requests: int = 1000) -> Occupancy:
    """As if one ran beside the models of the test."""
    install()
    _others.append(Occupancy(BEAM_SEARCH))
    _others[-1].hold(0, free=requests)
    return _others[-1]


def load_model(repository: Path, name: str, version: int = 1, **parameters: Any) -> Any:
    """The `TritonPythonModel` of a model of the repository, initialised as Triton does; `parameters` replace some of
    its config.pbtxt. `end` finalizes it."""
    install()
    config = text_format.Parse((repository / name / "config.pbtxt").read_text(), ModelConfig())
    for key, value in parameters.items():
        assert key in config.parameters
        config.parameters[key].string_value = str(value)
    module = _module(repository / name / str(version) / "model.py", f"{name}_model")
    model = module.TritonPythonModel()
    model.initialize(
        {
            "model_name": name,
            "model_repository": str(repository / name),
            "model_version": str(version),
            "model_instance_name": f"{name}_0_0",
            "model_instance_device_id": "0",
            "model_config": json.dumps(json_format.MessageToDict(config, preserving_proto_field_name=True)),
        }
    )
    _models.append(model)
    return model


def _module(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def submit(model: Any, requests: Sequence[Request]) -> None:
    """To a model that answers later, through response senders; what it returns goes the same way."""
    for request, response in zip(requests, model.execute(requests), strict=True):
        request.take_memory_back()
        if response is not None:
            request.get_response_sender().send(response, flags=TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def run(model: Any, requests: Sequence[Request]) -> list[InferenceResponse]:
    """The answers, whether they are returned or sent."""
    submit(model, requests)
    return [request.answer() for request in requests]


def finalize(model: Any) -> None:
    _models.remove(model)
    if hasattr(model, "finalize"):
        thread = Thread(target=model.finalize, daemon=True)
        thread.start()
        thread.join(HANGS)
        assert not thread.is_alive(), "finalize hangs"


def end() -> None:
    """Of a test: no model runs on, and nobody who asked was forgotten or told twice."""
    senders = _senders.copy()
    try:
        for model in _models.copy():
            finalize(model)
        for sender in senders:
            sender.check()
        families = [metric for metric in metrics.values() if metric.has_family()]
        assert not families, "the stub crashes when metrics are freed after finalize"
    finally:
        for other in _others:
            other.close()
        _others.clear()
        _models.clear()
        _senders.clear()
        metrics.clear()
        Logger.lines.clear()
