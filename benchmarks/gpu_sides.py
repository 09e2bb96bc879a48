"""What gpu.py compares: transformers, our graphs and engine in this process, and both behind Triton."""

import io
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from florence2_client import Florence2Client
from florence2_release.install import install
from florence2_release.server import TritonServer
from florence2_release.tritonserver import find_tritonserver
from one_request import NUM_BEAMS, TASK
from PIL import Image
from tokenizers import Tokenizer
from transformers import Florence2ForConditionalGeneration, Florence2Processor

from florence2.generation.beam_search import Generation
from florence2.generation.caches import CacheSizes
from florence2.generation.engine import Engine
from florence2.generation.request import Request
from florence2.generation.runner import GraphRunner
from florence2.generation.scheduler import Scheduler
from florence2.generation.sessions import session
from florence2.generation.settings import GenerationSettings
from florence2.images import Resizer, decode
from florence2.manifest import Manifest, read_json
from florence2.prompts import PromptEncoder

LENGTHS = {"caption": 15, "detection": 150}
CUDA_GRAPHS = 64

Answers = list[list[int]]
Side = Callable[[Sequence[bytes], int], Answers]
"""Files that are in flight together, new tokens -> token ids."""


class Transformers:
    """A batch of what is in flight: `generate` has no other way."""

    def __init__(self, checkpoint: Path, device: str, compiled: bool) -> None:
        dtype = torch.float16 if device == "cuda" else torch.float32
        self._device, self._dtype = device, dtype
        self._processor = Florence2Processor.from_pretrained(checkpoint)
        model: Any = Florence2ForConditionalGeneration.from_pretrained(checkpoint, dtype=dtype).eval().to(device)
        if compiled:
            model.model.vision_tower = torch.compile(model.model.vision_tower)
            model.model.language_model.encoder = torch.compile(model.model.language_model.encoder, dynamic=True)
            model.model.language_model.decoder = torch.compile(model.model.language_model.decoder, dynamic=True)
        self._model = model

    @torch.inference_mode()
    def __call__(self, files: Sequence[bytes], new_tokens: int) -> Answers:
        images = [Image.open(io.BytesIO(file)).convert("RGB") for file in files]
        inputs = self._processor(images=images, text=[TASK] * len(images), return_tensors="pt")
        inputs = inputs.to(self._device).to(self._dtype)
        return self._model.generate(**inputs, num_beams=NUM_BEAMS, max_new_tokens=new_tokens).tolist()


class InProcess:
    """The served graphs and engine without a server: what is in flight starts together."""

    def __init__(self, folder: Path, device: str, in_flight: int) -> None:
        self._sizes = Manifest.read(folder).sizes
        config, positions = read_json(folder / "generation_config.json"), self._sizes.max_position_embeddings
        self._settings = GenerationSettings.from_config(config, positions).override(num_beams=NUM_BEAMS)
        self._resize = Resizer(read_json(folder / "preprocessor_config.json"))
        prompts = PromptEncoder(Tokenizer.from_file(str(folder / "tokenizer.json")), self._sizes)
        self._prompt = prompts.encode(TASK)
        self._vision = session(folder / "vision_encoder.onnx", device)
        rows, block = in_flight * NUM_BEAMS, 64 if device == "cuda" else 16
        caches = CacheSizes.of(self._sizes, rows, max(LENGTHS.values()) + 1, in_flight, block)
        runner = GraphRunner(folder, caches, device, cuda_graphs=CUDA_GRAPHS)
        self.engine = Engine(runner, Scheduler(runner.caches, in_flight, min(in_flight, 8)))

    def __call__(self, files: Sequence[bytes], new_tokens: int) -> Answers:
        settings = self._settings.override(max_new_tokens=new_tokens)
        found: dict[int, Generation | Exception] = {}
        for index, file in enumerate(files):
            pixels = self._resize(decode(file))
            features = self._vision.run(None, {"pixels": pixels[None]})[0][0]

            def respond(answer: Generation | Exception, index: int = index) -> None:
                found[index] = answer

            self.engine.submit(Request(features, self._prompt, settings, respond))
        self.engine.finish()
        answers = [found[index] for index in range(len(files))]
        return [answer.token_ids.tolist() for answer in answers if isinstance(answer, Generation)]


def served(url: str) -> Side:
    def ask(file: bytes, new_tokens: int) -> list[int]:
        with Florence2Client(url) as client:
            return client.run(TASK, file, num_beams=NUM_BEAMS, max_new_tokens=new_tokens).token_ids.tolist()

    def answers(files: Sequence[bytes], new_tokens: int) -> Answers:
        with ThreadPoolExecutor(len(files)) as pool:
            return list(pool.map(lambda file: ask(file, new_tokens), files))

    return answers


@contextmanager
def triton(folder: Path, work: Path, profile: str) -> Iterator[Side]:
    with tempfile.TemporaryDirectory(dir=work) as repository:
        install(folder, Path(repository), profile=profile)
        with TritonServer(repository) as server:
            # TensorRT may build engines.
            server.wait_ready(timeout=1800)
            yield served(server.grpc_url)


def profile_of(device: str) -> str:
    if device == "cpu":
        return "cpu"
    # The wheel's server has no onnxruntime backend.
    return "cuda-python" if find_tritonserver().wheel else "cuda"
