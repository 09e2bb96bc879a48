"""A stand-in for `triton_python_backend_utils`, so that every model.py can be run without a server."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from google.protobuf import json_format, text_format
from numpy.typing import NDArray
from tritonclient.grpc.model_config_pb2 import ModelConfig


class Tensor:
    def __init__(self, name: str, value: NDArray[Any]) -> None:
        self._name, self._value = name, value

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> NDArray[Any]:
        return self._value


class TritonError(Exception):
    INVALID_ARG, INTERNAL, UNAVAILABLE = "INVALID_ARG", "INTERNAL", "UNAVAILABLE"

    def __init__(self, message: str, code: str = INTERNAL) -> None:
        super().__init__(message)
        self._code = code

    def message(self) -> str:
        return str(self)

    def code(self) -> str:
        return self._code


class InferenceResponse:
    def __init__(self, output_tensors: list[Tensor], error: TritonError | None = None) -> None:
        self._tensors, self._error = output_tensors, error

    def tensors(self) -> dict[str, NDArray[Any]]:
        assert self._error is None, self._error
        return {tensor.name(): tensor.as_numpy() for tensor in self._tensors}

    def error(self) -> TritonError | None:
        return self._error


class Request:
    """A request as a client sends it: the batch dimension, exactly 1, is added here."""

    def __init__(self, **tensors: Any) -> None:
        self.tensors = {name: Tensor(name, np.asarray(value)[None]) for name, value in tensors.items()}

    def request_id(self) -> str:
        return "test"


class Logger:
    @staticmethod
    def log_error(message: str) -> None:
        print(message, file=sys.stderr)


def get_input_tensor_by_name(request: Request, name: str) -> Tensor | None:
    return request.tensors.get(name)


def install() -> None:
    """Become the module that florence2.triton imports."""
    sys.modules["triton_python_backend_utils"] = sys.modules[__name__]


def load_model(repository: Path, name: str, version: int = 1) -> Any:
    """The `TritonPythonModel` of a model of the repository, initialised as Triton does."""
    install()
    config = text_format.Parse((repository / name / "config.pbtxt").read_text(), ModelConfig())
    module = _module(repository / name / str(version) / "model.py", f"{name}_model")
    model = module.TritonPythonModel()
    model.initialize(
        {
            "model_repository": str(repository / name),
            "model_version": str(version),
            "model_config": json.dumps(json_format.MessageToDict(config, preserving_proto_field_name=True)),
        }
    )
    return model


def _module(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(model: Any, requests: list[Request]) -> list[InferenceResponse]:
    responses = model.execute(requests)
    assert len(responses) == len(requests)
    return responses
