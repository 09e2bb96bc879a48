"""Plans for TensorRT: what its parser gets, and when one is built. TensorRT itself and a GPU are stood in for."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import checkpoints as make
import florence2_cli as cli
import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import ROOT
from florence2_export import tensorrt
from onnx import TensorProto

from florence2.manifest import Manifest

OPERATORS = (ROOT / "tests" / "fixtures" / "tensorrt_operators.txt").read_text().splitlines()[1:]


@pytest.fixture(scope="module")
def exports(random_exports: Callable[[str, str], Path]) -> dict[str, Path]:
    """By precision."""
    return {precision: random_exports("native", precision) for precision in ("fp32", "fp16", "int8")}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("graph", ["vision_encoder", "encoder"])
def test_tensorrts_parser_knows_every_operator(exports: dict[str, Path], graph: str, precision: str) -> None:
    model = onnx.load(exports[precision] / f"{graph}.onnx", load_external_data=False)
    used = {node.op_type for node in model.graph.node}
    assert used - set(OPERATORS) == set()
    assert {node.domain for node in model.graph.node} == {""}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_pixels_are_cast_before_anything_else(exports: dict[str, Path], precision: str) -> None:
    """TensorRT has no other use for u8."""
    model = tensorrt.for_tensorrt(onnx.load(exports[precision] / "vision_encoder.onnx"))
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node if "pixels" in node.input] == ["Cast"]


def test_norms_are_computed_in_float_and_nothing_else_changes(exports: dict[str, Path], tmp_path: Path) -> None:
    graph = exports["fp16"] / "vision_encoder.onnx"
    model = tensorrt.for_tensorrt(onnx.load(graph))
    onnx.checker.check_model(model, full_check=True)
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    norms = [node for node in model.graph.node if node.op_type == "LayerNormalization"]
    makers = {output: node for node in model.graph.node for output in node.output}
    assert norms
    for norm in norms:
        assert makers[norm.input[0]].op_type == "Cast"
        assert {types[name] for name in norm.input[1:]} == {TensorProto.FLOAT}
    changed = tmp_path / "changed.onnx"
    onnx.save(model, changed)
    pixels = {"pixels": np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)}
    before, after = (onnxruntime.InferenceSession(str(path)).run(None, pixels)[0] for path in (graph, changed))
    np.testing.assert_allclose(after, before, atol=2e-3 * np.abs(before).max())


def test_float_norms_are_left_alone(exports: dict[str, Path]) -> None:
    model = onnx.load(exports["fp32"] / "vision_encoder.onnx")
    before = sorted(node.op_type for node in model.graph.node)
    assert sorted(node.op_type for node in tensorrt.for_tensorrt(model).graph.node) == before


class FakeTensorRT:
    """Notes what it is asked for."""

    __version__ = "11.3.0.99"

    def __init__(self) -> None:
        self.built: list[dict[str, Any]] = []
        self.readable = True
        self.Logger = type("Logger", (), {"WARNING": 2, "__init__": lambda *_: None})
        self.NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=1)
        self.BuilderFlag = SimpleNamespace(TF32="tf32")

    def Builder(self, _: Any) -> Any:
        asked: dict[str, Any] = {}

        def network(flags: int) -> dict[str, Any]:
            asked["flags"] = flags
            return asked

        profile = SimpleNamespace(set_shape=lambda name, *shapes: asked.__setitem__(name, shapes))
        config = SimpleNamespace(
            clear_flag=lambda flag: asked.__setitem__("cleared", flag),
            add_optimization_profile=lambda given: asked.__setitem__("profile", given is profile),
        )

        def build(*_: Any) -> bytes:
            self.built.append(asked)
            return b"plan %d" % len(self.built)

        return SimpleNamespace(
            create_network=network,
            create_builder_config=lambda: config,
            create_optimization_profile=lambda: profile,
            build_serialized_network=build,
        )

    def OnnxParser(self, network: dict[str, Any], _: Any) -> Any:
        def parse(path: str) -> bool:
            onnx.checker.check_model(path)
            return self.readable

        return SimpleNamespace(parse_from_file=parse, num_errors=1, get_error=lambda _: "no such thing")


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch) -> FakeTensorRT:
    """With a plan that gives the graph's own features, on a machine with a GPU."""
    fake = FakeTensorRT()
    monkeypatch.setitem(sys.modules, "tensorrt", fake)
    monkeypatch.setattr(tensorrt, "_gpu", lambda: "NVIDIA H200, 9.0")
    monkeypatch.setattr(tensorrt, "_run", lambda trt, plan, inputs, shape: features(plan, inputs))
    return fake


def features(plan: Path, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """By the graph that the plan was built of, which lies beside it."""
    assert plan.read_bytes().startswith(b"plan ")
    return onnxruntime.InferenceSession(str(plan.with_name("vision_encoder.onnx"))).run(None, inputs)[0]


@pytest.fixture
def whole(exports: dict[str, Path], tmp_path: Path) -> Path:
    return make.copy_of(exports["fp16"], tmp_path / "export")


def test_a_plan_is_built_once_for_a_graph_and_a_machine(
    whole: Path, tmp_path: Path, trt: FakeTensorRT, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    assert tensorrt.build(whole, cache) == whole / "vision_encoder.plan"
    (asked,) = trt.built
    assert asked["flags"] == 1 << 1
    assert asked["cleared"] == "tf32"
    assert asked["profile"]
    assert asked["pixels"] == ((1, 64, 64, 3), (4, 64, 64, 3), (8, 64, 64, 3))
    assert (whole / "vision_encoder.plan").read_bytes() == b"plan 1"
    (whole / "vision_encoder.plan").unlink()
    tensorrt.build(whole, cache)
    assert (whole / "vision_encoder.plan").read_bytes() == b"plan 1"
    trt.__version__ = "11.4.0.106"
    tensorrt.build(whole, cache)
    monkeypatch.setattr(tensorrt, "_gpu", lambda: "NVIDIA L4, 8.9")
    tensorrt.build(whole, cache)
    assert (whole / "vision_encoder.plan").read_bytes() == b"plan 3"
    # Nothing else is left in the cache, and the export is as whole as before.
    assert len(list(cache.iterdir())) == len(trt.built) == 3
    assert Manifest.read(whole).precision == "fp16"


def test_a_plan_with_other_features_is_refused(
    whole: Path, tmp_path: Path, trt: FakeTensorRT, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt, "_run", lambda *given: features(given[1], given[2]) * 1.05)
    with pytest.raises(ValueError, match=r"plan's features differ from the export's by 5\.0.e-02 .* 2e-02 is allowed"):
        tensorrt.build(whole, tmp_path / "cache")
    assert not (whole / "vision_encoder.plan").exists()
    assert list((tmp_path / "cache").iterdir()) == []


def test_what_the_parser_says_is_passed_on(whole: Path, tmp_path: Path, trt: FakeTensorRT) -> None:
    trt.readable = False
    with pytest.raises(ValueError, match=r"TensorRT 11\.3\.0\.99 can't read .*vision_encoder\.onnx: no such thing"):
        tensorrt.build(whole, tmp_path / "cache")


@pytest.mark.parametrize(
    ("precision", "missing", "message"),
    [
        ("int8", "", "is in int8, for CPUs; export with --precision fp16"),
        ("fp16", "tensorrt", "TensorRT's Python package is missing: pip install 'tensorrt'"),
        ("fp16", "gpu", "no GPU here, as nvidia-smi says"),
    ],
)
def test_the_command_says_what_is_missing(
    exports: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    precision: str,
    missing: str,
    message: str,
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None if missing == "tensorrt" else FakeTensorRT())
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.main(["tensorrt", str(exports[precision]), "--cache", str(tmp_path / "cache")]) == 1
    assert message in capsys.readouterr().err
