"""One class for gRPC and HTTP: a picture and a prompt in, an answer out."""

import contextlib
import io
import json
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tritonclient.utils import InferenceServerException

from florence2.images import decode
from florence2.locations import to_text

Picture = str | os.PathLike[str] | bytes | Image.Image
"""A path, an encoded image file's bytes, or a PIL image."""

# Triton's name of the type, and numpy's.
_OPTIONS: dict[str, tuple[str, Any]] = {
    "num_beams": ("INT32", np.int32),
    "max_new_tokens": ("INT32", np.int32),
    "no_repeat_ngram_size": ("INT32", np.int32),
    "length_penalty": ("FP32", np.float32),
    "early_stopping": ("BOOL", np.bool_),
}


_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16")


class ServerRefused(RuntimeError):
    """The server answered with an error, or not at all; `status` is Triton's code, such as INVALID_ARGUMENT or 400."""

    def __init__(self, message: str, status: str | None) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Answer:
    """What the model says of one picture."""

    answer: dict[str, Any]
    """`{task: value}` as HF's `post_process_generation`, with `scores`; coordinates in pixels of the picture sent."""
    text: str
    """The generated text, special tokens kept."""
    token_ids: NDArray[np.int64]
    """[L], decoder start included."""
    token_logprobs: NDArray[np.float32]
    """[L - 1], one per generated token."""
    sequence_score: float
    finish_reason: str
    """"stop", or "length" if the limit on new tokens ended it."""
    model_version: str
    """The release that answered."""

    @property
    def value(self) -> Any:
        """The answer without its key."""
        return next(iter(self.answer.values()))

    def to_json(self) -> str:
        fields = {
            "answer": self.answer,
            "text": self.text,
            "token_ids": self.token_ids.tolist(),
            "token_logprobs": [round(float(value), 6) for value in self.token_logprobs],
            "sequence_score": self.sequence_score,
        }
        return json.dumps(fields, ensure_ascii=False)


class Florence2Client:
    """A connection to one server. One object per thread; close it, or use it in a `with`."""

    def __init__(
        self,
        url: str = "localhost:8001",
        *,
        protocol: str = "grpc",
        model: str = "florence2",
        timeout: float = 300,
        next_share: float = 0.0,
    ) -> None:
        """`url`: HOST:PORT of the endpoint for `protocol`, "grpc" or "http"; `timeout`: seconds per request;
        `next_share`: the share of requests that try the release that is looked at, where there is one, for half of the
        timeout."""
        if not 1e-6 <= timeout <= 1e9:  # whole microseconds, in 64 bits
            raise ValueError(f"a timeout is seconds, finite and more than 0, not {timeout}")
        if not 0 <= next_share <= 1:
            raise ValueError(f"next_share is a part of the requests, from 0 to 1, not {next_share}")
        self.next_share = next_share
        self._triton = _protocol(protocol)
        self._protocol = protocol
        self.url, self.model, self.timeout = url, model, timeout
        options: dict[str, Any] = {}
        if protocol == "http":
            options = {"connection_timeout": timeout, "network_timeout": timeout}
        self._client = self._triton.InferenceServerClient(url, **options)

    def __enter__(self) -> "Florence2Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._client.close()

    def ask(
        self,
        image: Picture,
        prompt: str,
        *,
        region: Sequence[float] | None = None,
        num_beams: int | None = None,
        max_new_tokens: int | None = None,
        no_repeat_ngram_size: int | None = None,
        length_penalty: float | None = None,
        early_stopping: bool | None = None,
    ) -> Answer:
        """Send one request and wait for its answer.

        `region` is a box x1, y1, x2, y2 in pixels of the upright picture, for the tasks that ask about one. The other
        settings are HF's; left out, the checkpoint's own hold. Raises ServerRefused.
        """
        data = _file(image)
        if region is not None:
            prompt += _region(region, data)
        options = {
            "num_beams": num_beams,
            "max_new_tokens": max_new_tokens,
            "no_repeat_ngram_size": no_repeat_ngram_size,
            "length_penalty": length_penalty,
            "early_stopping": early_stopping,
        }
        inputs = [
            self._input("image", "BYTES", np.array([[data]], np.object_)),
            self._input("prompt", "BYTES", np.array([[prompt.encode()]], np.object_)),
            *(
                self._input(name, datatype, np.array([[options[name]]], dtype))
                for name, (datatype, dtype) in _OPTIONS.items()
                if options[name] is not None
            ),
        ]
        seconds = self.timeout
        if random.random() < self.next_share:
            seconds = self.timeout / 2
            # Whatever is wrong with it is no concern of who asks here.
            with contextlib.suppress(InferenceServerException, OSError, ValueError, KeyError, TypeError):
                return self._answer(self._infer(f"{self.model}_next", inputs, seconds))
        try:
            return self._answer(self._infer(self.model, inputs, seconds))
        except InferenceServerException as error:
            raise ServerRefused(f"{self.url}: {error.message()}", error.status()) from error
        except OSError as error:
            raise ServerRefused(f"{self.url}: {error}; is the server running?", None) from error

    def _infer(self, model: str, inputs: list[Any], seconds: float) -> Any:
        # The server is told, in microseconds, to give up when we do. Over HTTP the connection's timeout holds; gRPC has
        # one per call.
        timeout: dict[str, Any] = {"timeout": int(seconds * 1e6)}
        if self._protocol == "grpc":
            timeout["client_timeout"] = seconds
        return self._client.infer(model, inputs, **timeout)

    def _input(self, name: str, datatype: str, value: NDArray[Any]) -> Any:
        tensor = self._triton.InferInput(name, list(value.shape), datatype)
        tensor.set_data_from_numpy(value)
        return tensor

    def _answer(self, result: Any) -> Answer:
        def first(name: str) -> Any:
            return result.as_numpy(name)[0, 0]

        response = result.get_response()
        version = response["model_version"] if isinstance(response, dict) else response.model_version
        return Answer(
            answer=json.loads(first("answer")),
            text=first("text").decode(),
            token_ids=result.as_numpy("token_ids")[0],
            token_logprobs=result.as_numpy("token_logprobs")[0],
            sequence_score=float(first("sequence_score")),
            finish_reason=first("finish_reason").decode(),
            model_version=version,
        )


def _protocol(name: str) -> ModuleType:
    if name == "grpc":
        import tritonclient.grpc as module
    elif name == "http":
        import tritonclient.http as module
    else:
        raise ValueError(f'protocol must be "grpc" or "http", not {name!r}')
    return module


def _region(box: Sequence[float], data: bytes) -> str:
    if len(box) != 4 or not np.isfinite(box).all() or box[0] >= box[2] or box[1] >= box[3]:
        raise ValueError(f"a region is x1, y1, x2, y2 in pixels with x1 < x2 and y1 < y2, not {tuple(box)}")
    return to_text(box, decode(data).size)


def _file(image: Picture) -> bytes:
    if isinstance(image, bytes):
        return image
    if isinstance(image, Image.Image):
        buffer = io.BytesIO()
        # PNG has no CMYK, YCbCr and the like; 16-bit grey must not be clipped by PIL's conversion.
        as_png = image if image.mode in _PNG_MODES else image.convert("RGB")
        as_png.save(buffer, format="PNG")
        return buffer.getvalue()
    with open(image, "rb") as file:
        return file.read()
