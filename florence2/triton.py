"""Between Triton's Python backend and us: what every model.py of the model repository needs of its requests."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

# Triton puts this module on the path of its Python stubs; tests put a fake there.
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from florence2.errors import InvalidRequest


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


def respond(answer: Callable[[Any], Mapping[str, NDArray[Any]]], request: Any) -> Any:
    """What `answer` returns for the request, or its error, as a response: one bad request never hurts another."""
    try:
        tensors = [pb_utils.Tensor(name, value) for name, value in answer(request).items()]
        return pb_utils.InferenceResponse(output_tensors=tensors)
    except InvalidRequest as error:
        return _error(str(error), pb_utils.TritonError.INVALID_ARG)
    except Exception as error:
        pb_utils.Logger.log_error(f"request {request.request_id()!r} failed: {error!r}")
        return _error(f"{type(error).__name__}: {error}", pb_utils.TritonError.INTERNAL)


def _error(message: str, code: Any) -> Any:
    return pb_utils.InferenceResponse(output_tensors=[], error=pb_utils.TritonError(message, code))
