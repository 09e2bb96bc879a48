"""Exports of tiny random checkpoints: what is in them, when they are made, and what is refused."""

import hashlib
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import checkpoints as make
import florence2_cli as cli
import florence2_export.export as exporting
import numpy as np
import onnx
import pytest
import torch
from conftest import ROOT
from florence2_export.checkpoint import Checkpoint, load_checkpoint
from florence2_export.export import export
from florence2_export.graphs import GRAPHS, Graph
from florence2_export.javascript_graphs import ENCODER_MODEL
from florence2_export.onnx_files import write_onnx
from florence2_export.parity import Comparison, Parity, reference_features
from florence2_export.vision_graph import VisionEncoder
from onnx import numpy_helper

from florence2.generation.caches import CacheSizes
from florence2.generation.engine import Engine
from florence2.generation.request import Request
from florence2.generation.runner import GraphRunner
from florence2.generation.scheduler import Scheduler
from florence2.generation.sessions import session
from florence2.generation.settings import GenerationSettings
from florence2.manifest import FILE_NAME, Manifest, Sizes

WEIGHTS = {f"{graph.name}.onnx{suffix}" for graph in GRAPHS for suffix in ("", ".data")} - {"relayout.onnx.data"}
SETTINGS = {"tokenizer.json", "preprocessor_config.json", "generation_config.json"}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small only lose by sharing their work out, most of all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def fp32(random_exports: Callable[[str, str], Path]) -> Path:
    """The native checkpoint's export; not to change."""
    return random_exports("native", "fp32")


@pytest.fixture
def native(random_checkpoints: Path, tmp_path: Path) -> Path:
    """A copy of the native checkpoint, to change."""
    return make.copy_of(random_checkpoints / "native", tmp_path / "checkpoint")


@pytest.fixture
def done(fp32: Path, tmp_path: Path) -> Path:
    """A copy of its export, to change."""
    return make.copy_of(fp32, tmp_path / "exports" / "native")


def trace_only(names: set[str], done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other graphs are copied: tracing takes seconds, and most of what is tested comes after it."""
    traced = exporting._write_graph

    def write(graph: Graph, checkpoint: Checkpoint, sizes: Sizes, folder: Path, precision: str) -> None:
        if graph.name in names:
            traced(graph, checkpoint, sizes, folder, precision)
        else:
            for path in done.glob(f"{graph.name}.onnx*"):
                shutil.copy(path, folder)

    monkeypatch.setattr(exporting, "_write_graph", write)


@pytest.fixture
def no_tracing(fp32: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace_only(set(), fp32, monkeypatch)


def contents(folder: Path) -> dict[str, tuple[str, int]]:
    return {
        path.name: (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns) for path in folder.iterdir()
    }


def test_manifest_tells_all(fp32: Path, random_checkpoints: Path) -> None:
    manifest = Manifest.read(fp32)
    assert {path.name for path in fp32.iterdir()} == WEIGHTS | SETTINGS | {FILE_NAME}
    assert manifest.files == {name: contents(fp32)[name][0] for name in WEIGHTS | SETTINGS}
    assert manifest.source == str(random_checkpoints / "native")
    assert (manifest.revision, manifest.layout, manifest.repairs) == (None, "native", [])
    assert manifest.sha256 == load_checkpoint(str(random_checkpoints / "native")).sha256
    assert (manifest.precision, manifest.opset) == ("fp32", 20)
    assert manifest.banned_grounding_phrases == make.BANNED
    assert manifest.tools["torch"] == version("torch")
    assert manifest.sizes == Sizes(
        image_height=64,
        image_width=64,
        image_tokens=5,
        d_model=16,
        vocab_size=make.ROWS,
        decoder_layers=1,
        decoder_attention_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        location_bins=1000,
    )


def test_graphs_tell_nothing_of_the_machine(fp32: Path) -> None:
    for graph in fp32.glob("*.onnx"):
        content = graph.read_bytes()
        assert b"site-packages" not in content
        assert str(ROOT).encode() not in content


def test_graphs_agree_with_the_checkpoint(fp32: Path) -> None:
    parity = Manifest.read(fp32).parity
    assert set(parity["graphs"]) == {"vision_encoder", "encoder", "decoder"}
    assert all(figures["relative"] < 1e-4 for figures in parity["graphs"].values())
    assert parity["generations_equal"] == parity["generations"] == 6


def test_graphs_have_no_weight_twice(fp32: Path) -> None:
    """The tied embedding and head are one table, in Florence-2's vocabulary a third of the decoder."""
    for graph in GRAPHS:
        model = onnx.load(fp32 / f"{graph.name}.onnx")
        large = [numpy_helper.to_array(weight) for weight in model.graph.initializer if np.prod(weight.dims) > 2000]
        unique = {hashlib.sha256(np.sort(weight, axis=None).tobytes()).digest() for weight in large}
        assert len(unique) == len(large)


@pytest.mark.parametrize("size", [(64, 64), (72, 40), (48, 100)])
def test_vision_encoder_of_any_size(random_checkpoints: Path, size: tuple[int, int]) -> None:
    """Maps that windows of 4 do not fill, and that are not square."""
    checkpoint = load_checkpoint(str(random_checkpoints / "native"))
    pixels = np.random.default_rng(1).integers(0, 256, (2, *size, 3)).astype(np.uint8)
    with torch.inference_mode():
        features = VisionEncoder(checkpoint.model, checkpoint.preprocessor)(torch.tensor(pixels))
    np.testing.assert_allclose(features, reference_features(checkpoint, pixels), atol=1e-5)


def answers(folder: Path) -> tuple[np.ndarray, list[list[int]]]:
    """Image features of a picture, and token ids for each of three prompts."""
    pixels = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3)).astype(np.uint8)
    (features,) = session(folder / "vision_encoder.onnx", threads=1).run(None, {"pixels": pixels})
    settings = GenerationSettings.from_config(make.GENERATION, 64).override(max_new_tokens=20)
    prompts = ([0, 40, 2], [0, 50, 60, 70, 2], [0, 80, 90, 2])
    caches = CacheSizes.of(Manifest.read(folder).sizes, rows=len(prompts) * settings.num_beams)
    runner = GraphRunner(folder, caches, threads=1)
    engine = Engine(runner, Scheduler(caches, max_waiting=len(prompts), encoder_batch=len(prompts)))
    found: list[list[Any]] = [[] for _ in prompts]
    for ids, own in zip(prompts, found, strict=True):
        engine.submit(Request(features[0], np.array(ids), settings, respond=own.append))
    engine.finish()
    return features, [answer.token_ids.tolist() for (answer,) in found]


def test_layouts_give_the_same_graphs(fp32: Path, random_exports: Callable[[str, str], Path]) -> None:
    other = random_exports("microsoft", "fp32")
    assert Manifest.read(other).layout == "microsoft"
    features, tokens = answers(fp32)
    other_features, other_tokens = answers(other)
    np.testing.assert_array_equal(features, other_features)
    assert tokens == other_tokens


def test_untied_head(native: Path, fp32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace_only({"decoder"}, fp32, monkeypatch)
    state = make.native_state(make.random_model(seed=3), tied_copies=True)
    state["lm_head.weight"] = state["lm_head.weight"].flip(0).contiguous()
    make.write_safetensors(native, state)
    make.edit_json(native / "config.json", lambda config: config.update(tie_word_embeddings=False))
    parity = export(str(native), tmp_path / "export").parity
    assert parity["generations_equal"] == parity["generations"]
    assert answers(tmp_path / "export")[1] != answers(fp32)[1]


# --- precisions ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def halved(random_exports: Callable[[str, str], Path]) -> dict[str, Path]:
    """By precision."""
    return {precision: random_exports("native", precision) for precision in ("fp16", "int8")}


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_what_leaves_the_process_is_float32_in_every_precision(halved: dict[str, Path], precision: str) -> None:
    """So that one config.pbtxt serves them all."""
    for name, tensors in (("vision_encoder", ("image_features",)), ("encoder", ("image_features",))):
        model = onnx.load(halved[precision] / f"{name}.onnx", load_external_data=False)
        types = {tensor.name: tensor.type.tensor_type.elem_type for tensor in (*model.graph.input, *model.graph.output)}
        assert {types[tensor] for tensor in tensors} == {onnx.TensorProto.FLOAT}
    graph = session(halved[precision] / "decoder.onnx")
    types = {found.name: found.type for found in (*graph.get_inputs(), *graph.get_outputs())}
    assert types["candidate_logprobs"] == "tensor(float)"
    cache = {"fp16": "tensor(float16)", "int8": "tensor(float)"}[precision]
    assert {kind for name, kind in types.items() if name.startswith(("past_key_values.", "present."))} == {cache}


def test_half_weights_and_norms_in_float32_inside(halved: dict[str, Path]) -> None:
    for name in ("vision_encoder", "encoder", "decoder"):
        model = onnx.load(halved["fp16"] / f"{name}.onnx")
        weights = [tensor for tensor in model.graph.initializer if len(tensor.dims) > 1]
        floats = {tensor.data_type for tensor in weights} - {onnx.TensorProto.INT64, onnx.TensorProto.BOOL}
        assert floats == {onnx.TensorProto.FLOAT16}
        for node in model.graph.node:
            if node.op_type == "LayerNormalization":
                assert [one.i for one in node.attribute if one.name == "stash_type"] in ([], [1])
            if node.op_type == "LogSoftmax":
                assert node.input[0] in {
                    cast.output[0] for cast in model.graph.node if cast.op_type == "Cast" and cast.attribute[0].i == 1
                }


def test_eight_bits_for_what_weights_are_multiplied_with(halved: dict[str, Path]) -> None:
    for name in ("vision_encoder", "encoder", "decoder"):
        model = onnx.load(halved["int8"] / f"{name}.onnx")
        types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
        product = "DynamicQuantizeMatMul" if name == "vision_encoder" else "MatMulIntegerToFloat"
        used = {kind: [] for kind in (product, "MatMul", "Gemm", "Conv", "Gather")}
        for node in model.graph.node:
            if node.op_type in used:
                used[node.op_type] += [types[weight] for weight in node.input if weight in types]
        assert onnx.TensorProto.INT8 in used[product]
        assert used["MatMul"] == used["Gemm"] == []
        assert onnx.TensorProto.INT8 not in used["Conv"] + used["Gather"]


def test_no_graph_has_an_operator_that_cuda_lacks_in_its_opset(fp32: Path) -> None:
    """ONNX Runtime's Equal for CUDA is of another version than opset 20's: on the CPU it would part the graph."""
    for graph in GRAPHS:
        model = onnx.load(fp32 / f"{graph.name}.onnx", load_external_data=False)
        assert "Equal" not in {node.op_type for node in model.graph.node}


def test_no_graph_cuts_at_a_place_that_it_computes(fp32: Path, halved: dict[str, Path]) -> None:
    """On CUDA such a Slice returns its input whole (microsoft/onnxruntime#32083)."""
    slices = 0
    for folder in (fp32, *halved.values()):
        for graph in GRAPHS:
            model = onnx.load(folder / f"{graph.name}.onnx", load_external_data=False)
            known = {tensor.name for tensor in model.graph.initializer}
            assert not model.functions
            for node in model.graph.node:
                assert node.op_type not in ("If", "Loop", "Scan")
                if node.op_type == "Slice":
                    slices += 1
                    assert known.issuperset(node.input[1:])
    assert slices


def test_what_overflows_in_half_is_clamped_as_in_transformers(fp32: Path, tmp_path: Path) -> None:
    model = make.random_model(seed=3)
    layers = model.model.language_model.encoder.layers
    assert len(layers) == 1
    with torch.no_grad():
        layers[0].final_layer_norm.weight[3] = 50_000
    rng = np.random.default_rng(0)
    embeds, mask = rng.normal(size=(2, 9, 16)).astype(np.float32), np.ones((2, 9), np.int64)
    mask[1, 6:] = 0
    signature = ENCODER_MODEL.signature(Manifest.read(fp32).sizes)
    write_onnx(ENCODER_MODEL.build(model, {}), signature, tmp_path / "encoder.onnx", "fp16", external_data=False)
    feeds = {"attention_mask": mask, "inputs_embeds": embeds}
    (found,) = session(tmp_path / "encoder.onnx", threads=1).run(None, feeds)
    encoder = model.half().model.language_model.encoder
    with torch.inference_mode():
        expected = encoder(inputs_embeds=torch.tensor(embeds).half(), attention_mask=torch.tensor(mask))
    wanted = expected.last_hidden_state.float().numpy()
    clamped = np.abs(wanted) == 64512
    assert clamped.sum() > 3
    np.testing.assert_array_equal(found[clamped], wanted[clamped])
    np.testing.assert_allclose(found, wanted, rtol=2e-2, atol=2e-2)


@pytest.mark.usefixtures("no_tracing")
def test_another_precision_is_made_again(halved: dict[str, Path], tmp_path: Path, random_checkpoints: Path) -> None:
    folder = make.copy_of(halved["fp16"], tmp_path / "export")
    assert export(str(random_checkpoints / "native"), folder, precision="fp16").precision == "fp16"
    assert export(str(random_checkpoints / "native"), folder).precision == "fp32"


# --- when it is made ----------------------------------------------------------------------------------------


class Called(Exception):
    pass


@pytest.fixture
def no_export(monkeypatch: pytest.MonkeyPatch) -> None:
    def called(*_: Any) -> None:
        raise Called

    monkeypatch.setattr(exporting, "_export_into", called)


@pytest.mark.usefixtures("no_export")
def test_done_already_it_does_nothing(random_checkpoints: Path, done: Path) -> None:
    before = contents(done)
    assert export(str(random_checkpoints / "native"), done) == Manifest.read(done)
    assert contents(done) == before


@pytest.mark.usefixtures("no_export")
def test_other_files_in_an_export_are_no_change(random_checkpoints: Path, done: Path) -> None:
    (done / "notes.txt").write_text("mine")
    (done / "notes").mkdir()
    export(str(random_checkpoints / "native"), done)
    assert (done / "notes.txt").read_text() == "mine"


def _change_weights(checkpoint: Path, _: Path) -> None:
    make.write_safetensors(checkpoint, make.native_state(make.random_model(seed=4)))


def _change_settings(checkpoint: Path, _: Path) -> None:
    make.edit_json(checkpoint / "generation_config.json", lambda config: config.update(num_beams=2))


def _damage_a_file(_: Path, done: Path) -> None:
    (done / "decoder.onnx.data").write_bytes(b"")


def _remove_a_file(_: Path, done: Path) -> None:
    (done / "tokenizer.json").unlink()


def _other_tools(_: Path, done: Path) -> None:
    make.edit_json(done / FILE_NAME, lambda manifest: manifest["tools"].update(torch="2.0"))


@pytest.mark.usefixtures("no_export")
@pytest.mark.parametrize(
    "change",
    [_change_weights, _change_settings, _damage_a_file, _remove_a_file, _other_tools],
    ids=lambda f: f.__name__,
)
def test_it_is_made_again_after(change: Any, native: Path, done: Path) -> None:
    change(native, done)
    with pytest.raises(Called):
        export(str(native), done)


@pytest.mark.usefixtures("no_tracing")
def test_an_export_is_replaced_whole(native: Path, done: Path) -> None:
    _change_settings(native, done)
    (done / "left over").write_text("")
    manifest = export(str(native), done)
    assert manifest == Manifest.read(done)
    assert {path.name for path in done.iterdir()} == WEIGHTS | SETTINGS | {FILE_NAME}
    assert list(done.parent.iterdir()) == [done]


@pytest.mark.usefixtures("no_tracing")
def test_an_empty_folder_is_no_obstacle(random_checkpoints: Path, tmp_path: Path) -> None:
    export(str(random_checkpoints / "native"), tmp_path)
    assert Manifest.read(tmp_path).parity["generations_equal"] == 6


# --- failures -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_tracing")
def test_graphs_of_other_weights_are_refused_and_nothing_changes(native: Path, done: Path) -> None:
    _change_weights(native, done)
    before = contents(done)
    with pytest.raises(ValueError, match=r"vision_encoder.onnx differs from the checkpoint by .*; 1e-03 is allowed"):
        export(str(native), done)
    assert contents(done) == before
    assert list(done.parent.iterdir()) == [done]


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_a_failure_leaves_nothing(
    random_checkpoints: Path, tmp_path: Path, monkeypatch: Any, interruption: Any
) -> None:
    def interrupted(graph: Graph, _checkpoint: Any, _sizes: Sizes, folder: Path, _precision: str) -> None:
        (folder / f"{graph.name}.onnx").write_text("half")
        if graph.name == "decoder":
            raise interruption

    monkeypatch.setattr(exporting, "_write_graph", interrupted)
    with pytest.raises((KeyboardInterrupt, OSError)):
        export(str(random_checkpoints / "native"), tmp_path / "exports" / "native")
    assert list((tmp_path / "exports").iterdir()) == []


def test_killed_in_the_middle_it_leaves_the_export_before(native: Path, done: Path) -> None:
    _change_settings(native, done)
    before = contents(done)
    program = (
        "import os, signal, sys, florence2_export.export as exporting\n"
        "exporting._write_graph = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "exporting.export(*sys.argv[1:2], exporting.Path(sys.argv[2]))"
    )
    ended = subprocess.run([sys.executable, "-c", program, native, done], capture_output=True)
    assert ended.returncode == -signal.SIGKILL
    assert contents(done) == before


@pytest.mark.parametrize("graph", ["vision_encoder", "encoder", "decoder"])
def test_a_changed_weight_is_found(random_checkpoints: Path, done: Path, graph: str) -> None:
    path = done / f"{graph}.onnx"
    model = onnx.load(path)
    weight = max(model.graph.initializer, key=lambda tensor: np.prod(tensor.dims))
    changed = numpy_helper.to_array(weight) * np.float32(1.1)
    weight.CopyFrom(numpy_helper.from_array(changed, weight.name))
    onnx.save(model, path)
    checkpoint = load_checkpoint(str(random_checkpoints / "native"))
    comparison = Comparison(checkpoint, Manifest.read(done).sizes, done)
    comparison.vision()
    comparison.text()
    with pytest.raises(ValueError, match=rf"{graph}.onnx differs from the checkpoint by \d\.\d\de-\d\d") as raised:
        comparison.parity.check("fp32")
    assert f"{comparison.parity.graphs[graph]['relative']:.2e}" in str(raised.value)


@pytest.mark.parametrize(
    ("parity", "message"),
    [
        (Parity({"encoder": {"relative": 2e-3}}), r"encoder.onnx differs .* by 2.00e-03 of its .*; 1e-03 is allowed"),
        (Parity({"encoder": {"relative": float("nan")}}), "encoder.onnx differs from the checkpoint by nan"),
        (Parity(generations=6, generations_equal=5), "only 5 of 6 generations have the checkpoint's token ids"),
        (Parity(generations=6, generations_equal=4), "only 4 of 6 generations have the checkpoint's token ids"),
    ],
)
def test_missed_tolerances_come_with_their_figures(parity: Parity, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parity.check("fp32")


# --- refusals, and how the command tells them ---------------------------------------------------------------


def _no_weights(checkpoint: Path) -> None:
    make.remove_weights(checkpoint)


def _cut_weights(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def _repetition_penalty(checkpoint: Path) -> None:
    make.edit_json(checkpoint / "generation_config.json", lambda config: config.update(repetition_penalty=1.5))


def _large_pictures(checkpoint: Path) -> None:
    size = {"height": 1632, "width": 64}
    make.edit_json(checkpoint / "processor_config.json", lambda config: config["image_processor"].update(size=size))


@pytest.mark.parametrize(
    ("breaks", "words"),
    [
        (_no_weights, ["model.safetensors"]),
        (_cut_weights, ["model.safetensors"]),
        (_repetition_penalty, ["generation_config.json asks for repetition_penalty", "remove it"]),
        (_large_pictures, ["processor_config.json", "51 x 2 image tokens", "positions for 1 to 50 a side"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_checkpoint_that_is_refused(
    native: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], breaks: Any, words: list[str]
) -> None:
    breaks(native)
    assert cli.main(["export", str(native), "--output", str(tmp_path / "export")]) == 1
    out, err = capfd.readouterr()
    assert out in ("", "reading the checkpoint\n")
    assert err.count("\n") == 1
    assert err.startswith("florence2: ")
    assert all(word in err for word in words), err
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"photo.jpg": "x"}, ["exists and is not an export", "give another --output, or remove it"]),
        ({FILE_NAME: '{"icons": []}'}, [FILE_NAME, "can't be read", "give another --output, or remove"]),
    ],
)
def test_a_folder_that_is_something_else(
    random_checkpoints: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    content: dict[str, str],
    words: list[str],
) -> None:
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    assert cli.main(["export", str(random_checkpoints / "native"), "--output", str(tmp_path)]) == 1
    err = capfd.readouterr().err
    assert err.count("\n") == 1
    assert all(word in err for word in words), err
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == content


def test_the_command_tells_what_it_made(
    random_checkpoints: Path, done: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["export", str(random_checkpoints / "native"), "--output", str(done)]) == 0
    out, err = capfd.readouterr()
    assert out.startswith(f"{done}: native layout, fp32, largest difference ")
    assert out.endswith("6 of 6 generations equal to the checkpoint's\n")
    assert err == ""
