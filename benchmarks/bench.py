"""What benchmarks of many requests share: a server and transformers on the same base-size random weights."""

import io
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tritonclient.grpc as triton
from florence2_client import Florence2Client
from florence2_release.install import install
from florence2_release.server import TritonServer
from one_request import NEW_TOKENS, NUM_BEAMS, TASK, picture, prepare
from PIL import Image
from transformers import Florence2ForConditionalGeneration, Florence2Processor
from transformers.modeling_outputs import BaseModelOutput

from florence2.generation.settings import GenerationSettings
from florence2.manifest import Manifest, read_json

PROMPT_IDS = np.array([0, 500, 600, 700, 800, 900, 1000, 1100, 1200, 2])


class Pictures:
    """Every picture is new, so that nothing is remembered from before."""

    def __init__(self) -> None:
        self._seeds, self._lock = iter(range(10**6)), threading.Lock()

    def take(self) -> bytes:
        with self._lock:
            seed = next(self._seeds)
        return picture(seed)


@dataclass
class Bench:
    """What the sections share."""

    checkpoint: Path
    export: Path
    server: TritonServer
    rounds: int
    pictures: Pictures = field(default_factory=Pictures)

    def __post_init__(self) -> None:
        self.sizes = Manifest.read(self.export).sizes
        positions = self.sizes.max_position_embeddings
        self.settings = GenerationSettings.from_config(read_json(self.export / "generation_config.json"), positions)
        shape = (16, self.sizes.image_tokens, self.sizes.d_model)
        self._features = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        self.processor = Florence2Processor.from_pretrained(self.checkpoint)
        self.model = Florence2ForConditionalGeneration.from_pretrained(self.checkpoint, dtype=torch.float32).eval()

    def ask(self, file: bytes, task: str = TASK, new_tokens: int = NEW_TOKENS) -> list[int]:
        with Florence2Client(self.server.grpc_url) as client:
            return client.run(task, file, num_beams=NUM_BEAMS, max_new_tokens=new_tokens).token_ids.tolist()

    @torch.inference_mode()
    def transformers(self, files: Sequence[bytes]) -> list[list[int]]:
        images = [Image.open(io.BytesIO(file)).convert("RGB") for file in files]
        inputs = self.processor(images=images, text=[TASK] * len(images), return_tensors="pt")
        return self.model.generate(**inputs, num_beams=NUM_BEAMS, max_new_tokens=NEW_TOKENS).tolist()

    @torch.inference_mode()
    def transformers_text(self, batch: int, new_tokens: int) -> None:
        """Decoding alone, from what the encoder made."""
        hidden = BaseModelOutput(torch.randn(batch, self.sizes.image_tokens + len(PROMPT_IDS), self.sizes.d_model))
        self.model.generate(encoder_outputs=hidden, num_beams=NUM_BEAMS, max_new_tokens=new_tokens)

    def metrics(self) -> dict[str, float]:
        """beam_search's own, by name."""
        with urllib.request.urlopen(self.server.metrics_url) as response:
            lines = response.read().decode().splitlines()
        found = (line.rsplit(" ", 1) for line in lines if line.startswith("florence2_"))
        return {name.partition("{")[0]: float(value) for name, value in found}

    def features(self, seed: int) -> np.ndarray:
        """[N, D]"""
        return self._features[seed % len(self._features)]

    def ask_features(self, seed: int, new_tokens: int) -> None:
        """beam_search alone, over gRPC."""
        tensors = {
            "image_features": self.features(seed)[None],
            "input_ids": PROMPT_IDS[None],
            "num_beams": np.array([[NUM_BEAMS]], np.int32),
            "max_new_tokens": np.array([[new_tokens]], np.int32),
        }
        inputs = []
        for name, value in tensors.items():
            inputs.append(triton.InferInput(name, value.shape, triton_type(value)))
            inputs[-1].set_data_from_numpy(value)
        client = triton.InferenceServerClient(self.server.grpc_url)
        ids = client.infer("beam_search", inputs).as_numpy("token_ids")
        client.close()
        assert ids.shape[1] == new_tokens + 1, "random weights were to fill the length"


def triton_type(value: np.ndarray) -> str:
    return {"float32": "FP32", "int64": "INT64", "int32": "INT32"}[value.dtype.name]


def timed(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def in_flight(count: int, work: Sequence[Callable[[], Any]]) -> list[float]:
    """Closed loop: `count` at any time until all is done -> seconds of each, in the order of `work`."""
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(timed, work))


@contextmanager
def benched(work: Path, rounds: int) -> Iterator[Bench]:
    checkpoint, export = prepare(work)
    with tempfile.TemporaryDirectory(dir=work) as repository:
        install(export, Path(repository))
        with TritonServer(repository, cache_size=2**28) as server:
            server.wait_ready()
            bench = Bench(checkpoint, export, server, rounds)
            bench.ask(bench.pictures.take())
            bench.transformers([bench.pictures.take()])
            yield bench
