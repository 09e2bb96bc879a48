"""8 bits: a scale for each row, or for each picture, so that nobody's answer depends on the company it is in."""

import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import DEMO_CHECKPOINT
from florence2_export.int8 import LEVELS, WEIGHT_LEVELS, quantize, quantized_weight
from numpy.typing import NDArray
from onnx import numpy_helper
from onnx.parser import parse_model
from onnxruntime import InferenceSession, SessionOptions
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument
from onnxscript import ir
from tokenizers import Tokenizer

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

PRODUCTS = {
    "matmul": """<ir_version: 10, opset_import: ["" : 20]>
g (float[B, M, K] x) => (float[B, M, N] y) { m = MatMul(x, w)  y = Add(m, b) }""",
    "gemm": """<ir_version: 10, opset_import: ["" : 20]>
g (float[M, K] x) => (float[M, N] y) { y = Gemm <transB = 1> (x, w, b) }""",
}
F32 = NDArray[np.float32]


def product(kind: str, weight: F32, bias: F32, one_picture: bool = False) -> InferenceSession:
    options = SessionOptions()
    options.intra_op_num_threads = 1
    model = quantized(kind, weight, bias, one_picture)
    return InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def quantized(kind: str, weight: F32, bias: F32, one_picture: bool) -> onnx.ModelProto:
    """`weight` [K, N] in 8 bits."""
    model = parse_model(PRODUCTS[kind])
    stored = weight.T if kind == "gemm" else weight
    model.graph.initializer.extend(
        numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in (("w", stored), ("b", bias))
    )
    quantize(model, one_picture)
    return model


def run(graph: InferenceSession, rows: F32) -> F32:
    """[M, K] -> [M, N]"""
    batched = len(graph.get_inputs()[0].shape) == 3
    (found,) = graph.run(None, {"x": rows[None] if batched else rows})
    return found[0] if batched else found


def by_hand(rows: F32, weight: F32, bias: F32) -> F32:
    """The same with whole numbers in numpy."""
    largest = np.abs(rows).max(axis=1, keepdims=True)
    whole = np.round(np.divide(rows, largest, where=largest > 0, out=np.zeros_like(rows)) * LEVELS).astype(np.int64)
    weights, scale = quantized_weight(weight)
    return (whole @ weights.astype(np.int64)).astype(np.float32) * (scale / LEVELS) * largest + bias


@pytest.mark.parametrize("kind", PRODUCTS)
@pytest.mark.parametrize("extreme", [False, True])
def test_a_product_has_no_error_but_rounding_to_steps(kind: str, extreme: bool) -> None:
    """Where every pair of products is the largest there is, kernels that add it up in 16 bits must not overflow."""
    rng = np.random.default_rng(0)
    rows, weight = rng.normal(size=(96, 512)).astype(np.float32), rng.normal(size=(512, 80)).astype(np.float32)
    if extreme:
        rows, weight = np.sign(rows), np.sign(weight)
        rows[0], weight[:, 0] = 1, 1
    bias = rng.normal(size=80).astype(np.float32)
    np.testing.assert_allclose(
        run(product(kind, weight, bias), rows), by_hand(rows, weight, bias), rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize("kind", PRODUCTS)
def test_a_row_is_the_same_alone_and_in_company(kind: str) -> None:
    """To the last bit, whichever kernels ONNX Runtime has for so many rows, and however loud the others are."""
    rng = np.random.default_rng(1)
    weight, bias = rng.normal(size=(192, 72)).astype(np.float32), rng.normal(size=72).astype(np.float32)
    rows = (rng.normal(size=(96, 192)) * 10.0 ** rng.integers(-3, 4, (96, 1))).astype(np.float32)
    graph = product(kind, weight, bias)
    alone = np.concatenate([run(graph, row[None]) for row in rows])
    for count in range(1, 97):
        np.testing.assert_array_equal(run(graph, rows[:count]), alone[:count])


def test_a_picture_has_one_scale_and_its_biases() -> None:
    """uint8 from the least to the largest value, 0 among them, as DynamicQuantizeLinear has it."""
    rng = np.random.default_rng(2)
    rows, weight = rng.normal(size=(96, 192)).astype(np.float32), rng.normal(size=(192, 72)).astype(np.float32)
    bias = rng.normal(size=72).astype(np.float32)
    (node,) = quantized("matmul", weight, bias, one_picture=True).graph.node
    assert node.op_type == "DynamicQuantizeMatMul"
    graph = product("matmul", weight, bias, one_picture=True)
    step = (rows.max() - rows.min()) / np.float32(255)
    zero = np.round(-rows.min() / step)
    whole = np.clip(np.round(rows / step) + zero, 0, 255).astype(np.int64) - int(zero)
    weights, scale = quantized_weight(weight)
    wanted = (whole @ weights.astype(np.int64)).astype(np.float32) * scale * step + bias
    np.testing.assert_allclose(run(graph, rows), wanted, rtol=1e-5, atol=1e-4)


def test_rows_and_channels_of_zeros_give_the_bias() -> None:
    rows, weight = np.ones((3, 16), np.float32), np.ones((16, 4), np.float32)
    rows[1], weight[:, 2], bias = 0, 0, np.arange(4, dtype=np.float32)
    found = run(product("matmul", weight, bias), rows)
    np.testing.assert_allclose(found, [[16, 17, 2, 19], [0, 1, 2, 3], [16, 17, 2, 19]], rtol=1e-6)


def test_steps_of_a_weight() -> None:
    weight = np.array([[1.0, 0.0, -3.0], [-0.5, 0.0, 0.02], [0.26, 0.0, 1.5]], np.float32)
    whole, scale = quantized_weight(weight)
    assert whole.dtype == np.int8
    assert whole.tolist() == [[64, 0, -64], [-32, 0, 0], [17, 0, 32]]
    np.testing.assert_array_equal(scale[[0, 2]], np.array([1, 3], np.float32) / WEIGHT_LEVELS)


# --- graphs -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(demo_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo checkpoint's export in 8 bits, made of the one in float32."""
    folder = tmp_path_factory.mktemp("int8")
    shutil.copytree(demo_export, folder, dirs_exist_ok=True)
    for name in ("vision_encoder", "encoder", "decoder"):
        model = onnx.load(demo_export / f"{name}.onnx")
        quantize(model, one_picture=name == "vision_encoder")
        ir.save(ir.from_proto(model), folder / f"{name}.onnx", external_data=f"{name}.onnx.data")
    return folder


@pytest.fixture(scope="module")
def pixels(folder: Path) -> NDArray[np.uint8]:
    resize = Resizer(read_json(folder / "preprocessor_config.json"))
    files = sorted((DEMO_CHECKPOINT.parent / "pictures").glob("*.[jp][pn]g"))
    return np.stack([resize(decode(file.read_bytes())) for file in files])


def test_the_vision_encoder_takes_one_picture_a_run(folder: Path, pixels: NDArray[np.uint8]) -> None:
    graph = session(folder / "vision_encoder.onnx", threads=1)
    assert graph.run(None, {"pixels": pixels[:1]})[0].shape[0] == 1
    with pytest.raises(InvalidArgument, match=r"index: 0 Got: 2 Expected: 1"):
        graph.run(None, {"pixels": pixels[:2]})


# --- answers ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """A request, and what it is answered when nobody else asks."""

    features: F32
    prompt: NDArray[np.int64]
    settings: GenerationSettings
    expected: Generation

    def same(self, found: Any) -> bool:
        assert isinstance(found, Generation), found
        return found.token_ids.tolist() == self.expected.token_ids.tolist()


SETTINGS = 2
"""Random ones, of every prompt for every picture."""
PROMPTS = ("<OD>", "<CAPTION>", "<OCR>", "<DENSE_REGION_CAPTION>", "<CAPTION_TO_PHRASE_GROUNDING>a green car, a star")


@pytest.fixture(scope="module")
def questions(folder: Path, pixels: NDArray[np.uint8]) -> list[Question]:
    sizes = Manifest.read(folder).sizes
    config = read_json(folder / "generation_config.json")
    settings = GenerationSettings.from_config(config, sizes.max_position_embeddings)
    encoder = PromptEncoder(Tokenizer.from_file(str(folder / "tokenizer.json")), sizes)
    graph = session(folder / "vision_encoder.onnx", threads=1)
    features = [graph.run(None, {"pixels": picture[None]})[0][0] for picture in pixels]
    runner, choose = GraphRunner(folder, CacheSizes.of(sizes, rows=8), threads=1), random.Random(0)
    made = []
    for picture in features:
        for prompt in SETTINGS * PROMPTS:
            asked = settings.override(num_beams=choose.choice([1, 1, 2, 3, 3, 8]), max_new_tokens=choose.randint(1, 60))
            answers: list[Any] = []
            engine = Engine(runner, Scheduler(runner.caches, max_waiting=1, encoder_batch=1))
            engine.submit(Request(picture, encoder.encode(prompt), asked, answers.append))
            engine.finish()
            made.append(Question(picture, encoder.encode(prompt), asked, answers[0]))
    return made


def arrivals(choose: random.Random, requests: int) -> Iterator[int]:
    """How many come before each step."""
    while requests:
        count = min(requests, choose.choice([0, 0, 0, 0, 1, 2, 5]))
        requests -= count
        yield count


@pytest.mark.parametrize("requests", [60, pytest.param(1000, marks=pytest.mark.soak)])
def test_an_answer_is_the_same_alone_and_in_company(folder: Path, questions: list[Question], requests: int) -> None:
    choose = random.Random(requests)
    runner = GraphRunner(folder, CacheSizes.of(Manifest.read(folder).sizes, rows=24), threads=1)
    engine = Engine(runner, Scheduler(runner.caches, max_waiting=requests, encoder_batch=3))
    answered: list[tuple[Question, Any]] = []
    for count in arrivals(choose, requests):
        for question in choose.choices(questions, k=count):
            request = Request(
                question.features,
                question.prompt,
                question.settings,
                respond=lambda answer, question=question: answered.append((question, answer)),
            )
            engine.submit(request)
        engine.step()
    engine.finish()
    assert len(answered) == requests
    assert engine.counters.tokens > 3 * engine.counters.steps
    assert [question for question, answer in answered if not question.same(answer)] == []
