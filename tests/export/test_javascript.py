"""Exports for transformers.js: their files, run in Python as it runs them, and by the real library on Node."""

import hashlib
import json
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import checkpoints as make
import florence2_cli as cli
import florence2_export.javascript as exporting
import numpy as np
import pytest
import torch
from conftest import DEMO_CHECKPOINT, ROOT
from florence2_export.checkpoint import Checkpoint, load_checkpoint
from florence2_export.export import export, sizes_of
from florence2_export.javascript import FILE_NAME, SUFFIXES, export_javascript
from florence2_export.javascript_graphs import GRAPHS
from florence2_export.javascript_parity import GreedyRunner, pixel_values
from florence2_export.onnx_files import quiet
from florence2_export.parity import reference_features, reference_generate
from PIL import Image

from florence2.answers import AnswerParser, Detokenizer
from florence2.generation.sessions import session
from florence2.generation.settings import GenerationSettings
from florence2.images import Resizer
from florence2.manifest import Manifest
from florence2.prompts import PromptEncoder
from florence2.tasks import TASKS, Takes

SETTINGS = {
    *("config.json", "generation_config.json", "preprocessor_config.json"),
    *("tokenizer.json", "tokenizer_config.json"),
}
ASKED = (
    ("scene-1.png", "<OD>"),
    ("scene-2.jpg", "<CAPTION>"),
    ("scene-1.png", "<CAPTION_TO_PHRASE_GROUNDING>a red star"),
    ("word-1.png", "<OCR>"),
    ("page-1.png", "<DENSE_REGION_CAPTION>"),
)
NEW_TOKENS = 24
DTYPES = {"fp32": "fp32", "fp16": "fp16", "int8": "q8"}
"""What transformers.js calls the precisions."""


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo checkpoint's export; not to change."""
    output = tmp_path_factory.mktemp("javascript") / "demo"
    export_javascript(str(DEMO_CHECKPOINT), output)
    return output


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return load_checkpoint(str(DEMO_CHECKPOINT))


@pytest.fixture(scope="module")
def settings(checkpoint: Checkpoint) -> GenerationSettings:
    positions = sizes_of(checkpoint).max_position_embeddings
    return GenerationSettings.from_config(checkpoint.generation, positions).override(
        num_beams=1, max_new_tokens=NEW_TOKENS
    )


@pytest.fixture(scope="module")
def pictures(checkpoint: Checkpoint) -> np.ndarray:
    """u8 [5, H, W, 3], of the model's own size: what ASKED is about."""
    resize = Resizer(checkpoint.preprocessor)
    folder = DEMO_CHECKPOINT.parent / "pictures"
    return np.stack([resize(Image.open(folder / name).convert("RGB")) for name, _ in ASKED])


@pytest.fixture(scope="module")
def prompts(checkpoint: Checkpoint) -> list[np.ndarray]:
    encoder = PromptEncoder(checkpoint.tokenizer, sizes_of(checkpoint))
    return [encoder.encode(prompt) for _, prompt in ASKED]


@pytest.fixture(scope="module")
def expected(checkpoint: Checkpoint, pictures: np.ndarray, prompts: list[np.ndarray]) -> list[list[int]]:
    """transformers' greedy tokens."""
    with quiet("transformers"):
        answers = [
            reference_generate(checkpoint.model, features, prompt, num_beams=1, max_new_tokens=NEW_TOKENS)
            for features, prompt in zip(reference_features(checkpoint, pictures), prompts, strict=True)
        ]
    return [answer.sequences[0].tolist() for answer in answers]


def padded(prompts: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    length = max(map(len, prompts))
    ids = np.stack([np.pad(prompt, (0, length - len(prompt)), constant_values=1) for prompt in prompts])
    mask = np.stack([np.pad(np.ones_like(prompt), (0, length - len(prompt))) for prompt in prompts])
    return ids, mask


# --- files --------------------------------------------------------------------------------------------------


def test_files(done: Path) -> None:
    graphs = {f"onnx/{graph.name}{suffix}.onnx" for graph in GRAPHS for suffix in ("", "_fp16", "_quantized")}
    manifest = Manifest.read(done, FILE_NAME)
    found = {path.relative_to(done).as_posix() for path in done.rglob("*") if path.is_file()}
    assert found == graphs | SETTINGS | {FILE_NAME}
    assert manifest.files == {
        name: hashlib.sha256((done / name).read_bytes()).hexdigest() for name in graphs | SETTINGS
    }
    assert manifest.sha256 == load_checkpoint(str(DEMO_CHECKPOINT)).sha256
    for precision, most in (("fp32", 1e-5), ("fp16", 2e-3), ("int8", 0.1)):
        assert manifest.parity[precision]["relative"] < most
    for precision in ("fp32", "fp16"):
        assert manifest.parity[precision]["generations_equal"] == manifest.parity[precision]["generations"] == 3


def test_smaller_in_8_bits(done: Path) -> None:
    for graph in GRAPHS:
        size = {suffix: (done / "onnx" / f"{graph.name}{suffix}.onnx").stat().st_size for suffix in SUFFIXES.values()}
        assert size["_fp16"] < 0.6 * size[""]
        assert size["_quantized"] < 0.45 * size[""]


def caches(direction: str, own: str, cross: str) -> list[tuple[str, str, list[Any]]]:
    """By layer; heads and head_dim are numbers, or transformers.js makes empty ones of them."""
    return [
        (f"{direction}.{layer}.{stack}.{part}", "tensor(float)", ["batch_size", 4, length, 32])
        for layer in (0, 1)
        for stack, length in (("decoder", own), ("encoder", cross))
        for part in ("key", "value")
    ]


PAST, LENGTH = "past_decoder_sequence_length", "decoder_sequence_length"
CROSS, SEEN = "past_encoder_sequence_length", "encoder_sequence_length"
TENSORS: dict[str, tuple[list[tuple[str, str, list[Any]]], list[tuple[str, str, list[Any]]]]] = {
    "vision_encoder": (
        [("pixel_values", "tensor(float)", ["batch_size", 3, 96, 96])],
        [("image_features", "tensor(float)", ["batch_size", 145, 128])],
    ),
    "embed_tokens": (
        [("input_ids", "tensor(int64)", ["batch_size", "sequence_length"])],
        [("inputs_embeds", "tensor(float)", ["batch_size", "sequence_length", 128])],
    ),
    "encoder_model": (
        [
            ("attention_mask", "tensor(int64)", ["batch_size", SEEN]),
            ("inputs_embeds", "tensor(float)", ["batch_size", SEEN, 128]),
        ],
        [("last_hidden_state", "tensor(float)", ["batch_size", SEEN, 128])],
    ),
    "decoder_model_merged": (
        [
            ("encoder_attention_mask", "tensor(int64)", ["batch_size", SEEN]),
            ("encoder_hidden_states", "tensor(float)", ["batch_size", SEEN, 128]),
            ("inputs_embeds", "tensor(float)", ["batch_size", LENGTH, 128]),
            *caches("past_key_values", PAST, CROSS),
            ("use_cache_branch", "tensor(bool)", [1]),
        ],
        [
            ("logits", "tensor(float)", ["batch_size", LENGTH, 1536]),
            *caches("present", f"{LENGTH} + {PAST}", f"Max(0, {SEEN} - Min({CROSS}, {SEEN}))"),
        ],
    ),
}


@pytest.mark.parametrize("suffix", SUFFIXES.values())
@pytest.mark.parametrize("graph", TENSORS)
def test_tensors(done: Path, graph: str, suffix: str) -> None:
    opened = session(done / "onnx" / f"{graph}{suffix}.onnx", threads=1)
    one_picture = graph == "vision_encoder" and suffix == SUFFIXES["int8"]
    for found, wanted in zip((opened.get_inputs(), opened.get_outputs()), TENSORS[graph], strict=True):
        if one_picture:
            wanted = [(name, dtype, [1, *shape[1:]]) for name, dtype, shape in wanted]
        assert [(tensor.name, tensor.type, tensor.shape) for tensor in found] == wanted


def test_settings_of_both_layouts_of_checkpoint(tmp_path: Path) -> None:
    model = make.random_model()
    make.write_native(tmp_path / "native", model)
    make.write_microsoft(tmp_path / "microsoft", model)
    contents = []
    for name in ("native", "microsoft"):
        read = load_checkpoint(str(tmp_path / name))
        sizes = sizes_of(read)
        (tmp_path / f"{name}-export").mkdir()
        found = GenerationSettings.from_config(read.generation, sizes.max_position_embeddings)
        exporting._write_settings(read, sizes, found, tmp_path / f"{name}-export")
        contents.append({file: json.loads((tmp_path / f"{name}-export" / file).read_text()) for file in SETTINGS})
    for content in contents:
        config = content["config.json"]
        assert (config["model_type"], config["is_encoder_decoder"]) == ("florence2", True)
        assert config["text_config"]["model_type"] == "bart"
        assert (config["text_config"]["decoder_layers"], config["text_config"]["d_model"]) == (1, 16)
        # Neither file gives a length, and transformers.js stops after 20 tokens then.
        own = {"max_length": 64, "num_beams": 1, "do_sample": False, "length_penalty": 1.0}
        assert content["generation_config.json"] == make.GENERATION | own
        assert content["preprocessor_config.json"]["processor_class"] == "Florence2Processor"


# --- in Python, fed as transformers.js feeds it -------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_greedy_tokens_are_the_checkpoints(
    done: Path,
    checkpoint: Checkpoint,
    settings: GenerationSettings,
    pictures: np.ndarray,
    prompts: list[np.ndarray],
    expected: list[list[int]],
    precision: str,
) -> None:
    runner = GreedyRunner(done, SUFFIXES[precision], threads=1)
    values = pixel_values(pictures, checkpoint.preprocessor)
    for value, prompt, tokens in zip(values, prompts, expected, strict=True):
        (alone,) = runner.generate(value[None], prompt[None], np.ones_like(prompt)[None], settings)
        assert alone.token_ids == tokens
    # All of them at once, the shorter prompts padded.
    together = runner.generate(values, *padded(prompts), settings)
    assert [answer.token_ids for answer in together] == expected


def test_caches_grow_by_what_is_new(done: Path) -> None:
    """Steps of one token, all tokens at once, and empty encoder caches fed back: the same logits."""
    runner = GreedyRunner(done, "", threads=1)
    rng = np.random.default_rng(0)
    hidden, embeds = (rng.standard_normal((2, length, 128)).astype(np.float32) for length in (9, 5))
    mask = np.array([[1] * 9, [1] * 7 + [0] * 2])
    start = {"encoder_attention_mask": mask, "encoder_hidden_states": hidden, **runner._no_past(2)}
    assert (
        start["past_key_values.0.decoder.key"].shape == start["past_key_values.1.encoder.value"].shape == (2, 4, 0, 32)
    )
    (at_once,) = runner.decoder.run(["logits"], {**start, "inputs_embeds": embeds})

    names = [output.name for output in runner.decoder.get_outputs()]
    fed_back, kept = dict(start), dict(start)
    for step in range(5):
        one = {"inputs_embeds": embeds[:, step : step + 1]}
        outputs = dict(zip(names, runner.decoder.run(names, {**fed_back, **one}), strict=True))
        np.testing.assert_allclose(outputs["logits"][:, 0], at_once[:, step], atol=1e-4)
        fed_back |= {name.replace("present", "past_key_values"): outputs[name] for name in names[1:]}
        kept_logits = runner._step(feeds := {**kept, **one})
        np.testing.assert_allclose(kept_logits, at_once[:, step], atol=1e-4)
        kept = feeds
        assert kept["past_key_values.1.decoder.key"].shape == (2, 4, step + 1, 32)
        assert kept["past_key_values.1.encoder.key"].shape == (2, 4, 9, 32)


# --- on Node ------------------------------------------------------------------------------------------------


# The packages' own scripts download what the CPU doesn't need.
NPM_CI = ["npm", "ci", "--ignore-scripts"]
EXAMPLE = ROOT / "client" / "examples" / "transformers_js"


class Node:
    """@huggingface/transformers as the example's package-lock.json pins it, with the scripts beside it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, script: str, *arguments: str, stdin: Any = None) -> Any:
        done = subprocess.run(
            ["node", script, *arguments],
            input=json.dumps(stdin),
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


@pytest.fixture(scope="module")
def node() -> Node:
    missing = [name for name in ("node", "npm") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"{' and '.join(missing)} missing: transformers.js runs on Node")
    version = subprocess.run(["node", "--version"], capture_output=True, text=True, check=True).stdout.strip()
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < (20, 9):
        pytest.skip(f"node is {version}; transformers.js needs 20.9")
    pinned = [EXAMPLE / name for name in ("package.json", "package-lock.json")]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in pinned)).hexdigest()[:12]
    folder = ROOT / "var" / f"transformers.js-{digest}"
    if not folder.exists():
        folder.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            packages = Path(scratch) / folder.name
            packages.mkdir()
            for path in pinned:
                shutil.copy(path, packages)
            quietly = [*NPM_CI, "--no-audit", "--no-fund"]
            done = subprocess.run(quietly, cwd=packages, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stderr
            packages.rename(folder)
    # Node looks for packages beside the script.
    for script in (ROOT / "tests" / "javascript" / "run.mjs", EXAMPLE / "index.mjs"):
        shutil.copy(script, folder)
    return Node(folder)


@pytest.fixture(scope="module")
def generations(
    checkpoint: Checkpoint,
    pictures: np.ndarray,
    prompts: list[np.ndarray],
    tmp_path_factory: pytest.TempPathFactory,
) -> list[dict[str, Any]]:
    """What run.mjs is asked: each of ASKED alone, then all together."""
    folder = tmp_path_factory.mktemp("pixels")
    values = pixel_values(pictures, checkpoint.preprocessor)
    asked = [
        (value[None], prompt[None], np.ones_like(prompt)[None]) for value, prompt in zip(values, prompts, strict=True)
    ]
    asked.append((values, *padded(prompts)))
    requests = []
    for index, (pixels, ids, mask) in enumerate(asked):
        pixels.tofile(folder / f"{index}.f32")
        requests.append(
            {
                "pixels": str(folder / f"{index}.f32"),
                "shape": pixels.shape,
                "ids": ids.tolist(),
                "mask": mask.tolist(),
                "settings": {"max_new_tokens": NEW_TOKENS},
            }
        )
    return requests


def cut(tokens: list[int]) -> list[int]:
    """transformers.js goes on with a row that has ended until all have."""
    return tokens[: tokens.index(2, 1) + 1]


def tokens_on_node(
    node: Node, done: Path, generations: list[dict[str, Any]], precision: str, wasm: bool
) -> list[list[int]]:
    """One after the other."""
    request = {"folder": str(done), "dtype": DTYPES[precision], "wasm": wasm, "generations": generations, "prompts": []}
    return [cut(row) for batch in node("run.mjs", stdin=request)["generations"] for row in batch]


@pytest.mark.parametrize("wasm", [False, True], ids=["native", "wasm"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_transformers_js_gives_the_checkpoints_tokens(
    done: Path,
    node: Node,
    expected: list[list[int]],
    generations: list[dict[str, Any]],
    precision: str,
    wasm: bool,
) -> None:
    assert tokens_on_node(node, done, generations, precision, wasm) == 2 * expected


def test_transformers_js_in_8_bits(
    done: Path,
    node: Node,
    checkpoint: Checkpoint,
    settings: GenerationSettings,
    pictures: np.ndarray,
    prompts: list[np.ndarray],
    generations: list[dict[str, Any]],
) -> None:
    """The tokens that the same files give in Python."""
    runner = GreedyRunner(done, SUFFIXES["int8"], threads=1)
    values = pixel_values(pictures, checkpoint.preprocessor)
    answers = [
        runner.generate(value[None], prompt[None], np.ones_like(prompt)[None], settings)[0]
        for value, prompt in zip(values, prompts, strict=True)
    ]
    wanted = [answer.token_ids for answer in answers]
    assert tokens_on_node(node, done, generations[:-1], "int8", wasm=False) == wanted


def test_transformers_js_in_8_bits_on_webassembly(
    done: Path, node: Node, expected: list[list[int]], generations: list[dict[str, Any]]
) -> None:
    """Other kernels, other rounding: near ties fall another way."""
    found = tokens_on_node(node, done, generations[:-1], "int8", wasm=True)
    assert [row[:3] for row in found] == [row[:3] for row in expected]
    assert sum(row == wanted for row, wanted in zip(found, expected, strict=True)) >= 3


def test_transformers_js_reads_prompts_as_we_do(done: Path, node: Node, checkpoint: Checkpoint) -> None:
    texts = {Takes.NOTHING: "", Takes.TEXT: "a green car, left", Takes.REGION: "<loc_52><loc_332><loc_932><loc_774>"}
    asked = [task.token + texts[task.takes] for task in TASKS.values()] + ["What does the sign say?"]
    encoder = PromptEncoder(checkpoint.tokenizer, sizes_of(checkpoint))
    request = {"folder": str(done), "dtype": "fp32", "wasm": False, "generations": [], "prompts": asked}
    assert node("run.mjs", stdin=request)["prompts"] == [encoder.encode(prompt).tolist() for prompt in asked]


def test_the_example_answers_as_we_do(
    done: Path,
    node: Node,
    checkpoint: Checkpoint,
    pictures: np.ndarray,
    expected: list[list[int]],
    tmp_path: Path,
) -> None:
    """Picture file to boxes, with a picture of the model's own size, which neither side resizes."""
    Image.fromarray(pictures[0]).save(tmp_path / "scene.png")
    answer = node("index.mjs", str(done), str(tmp_path / "scene.png"), "<OD>")["<OD>"]
    tokens = expected[0]
    decoded = Detokenizer(checkpoint.tokenizer)(tokens[1:])
    ours = AnswerParser().parse(TASKS["<OD>"], decoded, np.zeros(len(tokens) - 1), (96, 96))
    assert answer["labels"] == ours["labels"]
    assert len(answer["labels"]) >= 2
    np.testing.assert_allclose(answer["bboxes"], ours["bboxes"], atol=1e-3)


def test_the_pages_commands(done: Path, node: Node, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "export.md").read_text().split("## For JavaScript")[1].split("\n## ")[0]
    export_it, ask_it = (block.strip() for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL))
    assert " --layout transformers.js " in export_it
    enter, install, ask = ask_it.splitlines()
    assert ROOT / enter.removeprefix("cd ") == EXAMPLE
    assert install.startswith(" ".join(NPM_CI))
    output = export_it.split("--output ")[1]
    assert Path(ask.split()[2]) == Path("../../..") / output
    shutil.copy(DEMO_CHECKPOINT.parent / "pictures" / "scene-2.jpg", tmp_path / "photo.jpg")
    script, *arguments = shlex.split(ask)[1:]
    arguments[:2] = str(done), str(tmp_path / "photo.jpg")
    assert node(script, *arguments)["<OD>"]["labels"]


# --- when it is made, and refusals --------------------------------------------------------------------------


@pytest.fixture
def no_tracing(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are copied from the demo checkpoint's export."""

    def copy(graph: Any, _checkpoint: Any, _sizes: Any, folder: Path) -> None:
        for suffix in SUFFIXES.values():
            shutil.copy(done / "onnx" / f"{graph.name}{suffix}.onnx", folder / "onnx")

    monkeypatch.setattr(exporting, "_write_graph", copy)


@pytest.mark.usefixtures("no_tracing")
def test_the_command(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "exports" / "demo"
    command = ["export", str(DEMO_CHECKPOINT), "--layout", "transformers.js", "--output", str(output)]
    assert cli.main(command) == 0
    out, err = capfd.readouterr()
    told = out.splitlines()[-1]
    assert told.startswith(
        f"{output}: transformers.js files, greedy generations equal to the checkpoint's: fp32 3 of 3, "
    )
    assert re.search(r"; fp16 3 of 3, largest difference \d\.\de-04; int8 [0-3] of 3, ", told)
    assert err == ""
    # Done already, it says so at once; a damaged file is replaced.
    with monkeypatch.context() as patched:
        patched.setattr(exporting, "load_checkpoint", None)
        assert cli.main(command) == 0
        assert capfd.readouterr().out == told + "\n"
    (output / "onnx" / "embed_tokens.onnx").write_bytes(b"")
    assert cli.main(command) == 0
    assert (
        Manifest.read(output, FILE_NAME).files["onnx/embed_tokens.onnx"]
        == hashlib.sha256((output / "onnx" / "embed_tokens.onnx").read_bytes()).hexdigest()
    )
    assert list(output.parent.iterdir()) == [output]


@pytest.mark.usefixtures("no_tracing")
def test_graphs_of_other_weights_are_refused_and_nothing_changes(tmp_path: Path) -> None:
    shutil.copytree(DEMO_CHECKPOINT, tmp_path / "checkpoint")
    state = load_checkpoint(str(DEMO_CHECKPOINT)).model.state_dict()
    name = "model.language_model.decoder.layers.1.fc2.weight"
    state = {key: value.clone() for key, value in state.items() if not key.endswith(make.TIED)}
    state[name] = state[name] * 1.1
    make.write_safetensors(tmp_path / "checkpoint", state)
    with pytest.raises(
        ValueError, match=r"in fp32 the graphs' logits differ .* by \d\.\d\de-\d\d of .* 1e-03 is allowed"
    ):
        export_javascript(str(tmp_path / "checkpoint"), tmp_path / "exports" / "demo")
    assert list((tmp_path / "exports").iterdir()) == []


def test_precision_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = ["export", str(DEMO_CHECKPOINT), "--layout", "transformers.js", "--precision", "fp16"]
    assert cli.main([*command, "--output", str(tmp_path / "demo")]) == 1
    assert "leave --precision out" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_two_layouts_do_not_replace_each_other(done: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="exists and is not an export"):
        export(str(DEMO_CHECKPOINT), done)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match="exists and is not an export"):
        export_javascript(str(DEMO_CHECKPOINT), tmp_path)
