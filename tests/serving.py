"""What tests of the real server share: start it on an export, ask it and its models, read its figures."""

import json
import os
import re
import signal
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import DEMO_CHECKPOINT
from florence2_client import Florence2Client, Instances, Text
from florence2_export.checkpoint import load_checkpoint
from florence2_export.parity import reference_features, reference_generate
from florence2_release import startup
from florence2_release.install import install
from florence2_release.repository import Repository
from florence2_release.server import TritonServer
from google.protobuf import text_format
from tritonclient import grpc
from tritonclient.grpc.model_config_pb2 import ModelConfig
from tritonclient.utils import np_to_triton_dtype

from florence2.tasks import TASKS, Takes

PICTURES = sorted(path for path in (DEMO_CHECKPOINT.parent / "pictures").iterdir() if path.suffix in (".png", ".jpg"))
_AFTER = {Takes.NOTHING: "", Takes.TEXT: "a red star", Takes.REGION: "<loc_100><loc_200><loc_500><loc_600>"}
PROMPTS = [task.token + _AFTER[task.takes] for task in TASKS.values()]
"""Of all tasks."""
ENDLESS: dict[str, Any] = {"num_beams": 8, "max_new_tokens": 511, "no_repeat_ngram_size": 1}
"""Runs for as many steps as it may: the start token, which is the end token too, must not be repeated."""
HANGS = 60
"""Seconds after which something won't happen."""


@contextmanager
def running(repository: Path, **options: Any) -> Iterator[TritonServer]:
    """A server, ready. Who is through with it does not wait until it has stopped in good order: test_server.py does."""
    with TritonServer(repository, **options) as server:
        server.wait_ready()
        try:
            yield server
        finally:
            if server.is_alive() and server.pid:
                with suppress(ProcessLookupError):
                    os.kill(server.pid, signal.SIGKILL)


@contextmanager
def serve(
    export: Path,
    folder: Path,
    *,
    change: Callable[[Path], None] = lambda repository: None,
    cache_size: int | None = None,
    **parameters: dict[str, object],
) -> Iterator[TritonServer]:
    """A server of the export, ready. `parameters`: by model, what to replace in its config.pbtxt; `change` may do more
    to the repository."""
    repository = folder / "repository"
    install(export, repository)
    for model, replaced in parameters.items():
        path = repository / model / "config.pbtxt"
        config = text_format.Parse(path.read_text(), ModelConfig())
        for key, value in replaced.items():
            assert key in config.parameters
            config.parameters[key].string_value = str(value)
        path.write_text(text_format.MessageToString(config))
    startup.prepare(Repository(repository), response_cache=cache_size is not None)
    change(repository)
    with running(repository, cache_size=cache_size) as server:
        yield server


def client(server: TritonServer, protocol: str = "grpc", timeout: float = HANGS) -> Florence2Client:
    """Sends every request once."""
    url = server.grpc_url if protocol == "grpc" else server.http_url
    return Florence2Client(url, timeout=timeout, retries=0)


def result(answer: dict[str, Any], image: Any = b"", **fields: Any) -> Text | Instances:
    """As a client returns it, of no server."""
    kind = Text if isinstance(next(iter(answer.values())), str) else Instances
    rest = {
        "prompt": next(iter(answer)),
        "text": "",
        "sequence_score": 0.0,
        "finish_reason": "stop",
        "model_version": "1",
    }
    ids, logprobs = np.array([2]), np.zeros(0, np.float32)
    return kind(answer=answer, image=image, token_ids=ids, token_logprobs=logprobs, **rest | fields)


def tensors(module: Any = grpc, **values: Any) -> list[Any]:
    """Inputs of a request, the batch dimension added; `module` is tritonclient's, of the protocol."""
    types = {bytes: np.object_, float: np.float32, int: np.int32, bool: np.bool_}
    found = []
    for name, value in values.items():
        array = value[None] if isinstance(value, np.ndarray) else np.array([[value]], types[type(value)])
        found.append(module.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype)))
        found[-1].set_data_from_numpy(array)
    return found


def prepare(server: TritonServer, picture: Path, prompt: str) -> tuple[np.ndarray, np.ndarray]:
    """The pixels and prompt token ids that preprocess makes."""
    with grpc.InferenceServerClient(server.grpc_url) as connection:
        inputs = tensors(image=picture.read_bytes(), prompt=prompt.encode())
        ready = connection.infer("preprocess", inputs)
    return ready.as_numpy("pixels")[0], ready.as_numpy("input_ids")[0]


Question = tuple[Path, str, dict[str, Any]]
"""A picture, a prompt and settings, max_new_tokens among them."""


def transformers_answers(server: TritonServer, questions: Sequence[Question]) -> list[list[int]]:
    """Token ids of the demo checkpoint, for the very pixels that the server's preprocess makes."""
    checkpoint = load_checkpoint(str(DEMO_CHECKPOINT))
    # With both, generate warns at every call that max_new_tokens holds.
    checkpoint.model.generation_config.max_length = None
    prepared = {(picture, prompt): prepare(server, picture, prompt) for picture, prompt, _ in questions}
    pixels = {picture: found for (picture, _), (found, _) in prepared.items()}
    features = {picture: reference_features(checkpoint, found[None])[0] for picture, found in pixels.items()}
    answers = []
    for picture, prompt, settings in questions:
        input_ids = prepared[picture, prompt][1]
        reference = reference_generate(checkpoint.model, features[picture], input_ids, **settings)
        answers.append(reference.sequences[0].tolist())
    return answers


def figures(metrics_url: str) -> dict[str, float]:
    """florence2_* of version 1 of beam_search, of all its instances together."""
    found: dict[str, float] = {}
    for name, _, value in _figures(metrics_url):
        found[name] = found.get(name, 0) + value
    return found


def figures_by_instance(metrics_url: str, name: str) -> dict[str, float]:
    return {instance: value for one, instance, value in _figures(metrics_url) if one == name}


def _figures(metrics_url: str) -> Iterator[tuple[str, str, float]]:
    with urllib.request.urlopen(metrics_url, timeout=HANGS) as response:
        text = response.read().decode()
    labels = r'\{model="beam_search",model_instance="(beam_search_[\d_]+)",version="1"\}'
    for name, instance, value in re.findall(rf"^(florence2_\w+){labels} (\S+)$", text, re.MULTILINE):
        yield name, instance, float(value)


def counts(server: TritonServer, model: str) -> dict[str, int]:
    """How often the model was asked, how much of it the response cache has answered, and what is left."""
    with urllib.request.urlopen(f"{server.http_url}/v2/models/{model}/stats", timeout=HANGS) as response:
        (stats,) = json.load(response)["model_stats"]
    found = {name: stats["inference_stats"][name]["count"] for name in ("success", "fail", "cache_hit", "cache_miss")}
    return found | {"computed": stats["inference_count"]}


def wait_until(condition: Callable[[], object]) -> None:
    give_up = time.monotonic() + HANGS
    while not condition():
        if time.monotonic() > give_up:
            pytest.fail("it did not happen")
        time.sleep(0.02)
