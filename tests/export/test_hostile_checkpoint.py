"""Checkpoints whose settings hold nonsense: refused in one line that names the field, before a tensor is read.

Whoever hangs or fills the memory here fails by not ending."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import checkpoints as make
import pytest
from florence2_export import checkpoint as reading
from florence2_export.checkpoint import CheckpointError, load_checkpoint
from florence2_export.export import sizes_of
from hostile import mutated, put, refused
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from florence2.generation.settings import GenerationSettings

NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, model = tmp_path_factory.mktemp("originals"), make.random_model()
    make.write_microsoft(root / "microsoft", model)
    make.write_native(root / "native", model)
    return root


@pytest.fixture
def folder(originals: Path, tmp_path: Path) -> Path:
    return make.copy_of(originals / "microsoft", tmp_path / "checkpoint")


@pytest.fixture
def native(originals: Path, tmp_path: Path) -> Path:
    return make.copy_of(originals / "native", tmp_path / "checkpoint")


@pytest.fixture
def _no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fields are looked at before the first tensor."""

    def never(*_: Any) -> None:
        raise AssertionError("the weights were read")

    monkeypatch.setattr(reading, "open_weights", never)


# Fields

NO_SIZE: tuple[Any, ...] = (10**9, -1, 0, 16.0, True, "16", [16], {}, NAN, INF, 10**400)
NO_LIST: tuple[Any, ...] = (4, "1111", [], [1] * 9, [0] * 4, [-1] * 4, [10**5] * 4, [1.0] * 4, [None] * 4, [NAN] * 4)
NO_SHARE: tuple[Any, ...] = (NAN, INF, -1, "0", [], True)
NO_TOKEN: tuple[Any, ...] = (10**9, -1, 2.0, True, "2", {}, NAN)
TEXT = ("vocab_size", "d_model", "encoder_layers", "decoder_layers", "encoder_attention_heads", "decoder_ffn_dim")
TOKENS = ("bos_token_id", "pad_token_id", "decoder_start_token_id", "forced_bos_token_id", "eos_token_id")

CONFIG: dict[str, tuple[Any, ...]] = {
    **{f"text_config.{name}": NO_SIZE for name in (*TEXT, "max_position_embeddings")},
    **{f"text_config.{name}": (10**6, 10**5) for name in ("d_model", "encoder_layers", "max_position_embeddings")},
    "text_config.dropout": NO_SHARE,
    "text_config.scale_embedding": (1, "x", []),
    "text_config.tie_word_embeddings": (1, "x", []),
    "text_config.eos_token_id": (*NO_TOKEN, [], [10**9]),
    "text_config.no_repeat_ngram_size": (10**9, "3", NAN),
    "text_config": ("x", [], 5),
    "vision_config": ("x", [], 5),
    **{f"vision_config.{name}": NO_SIZE for name in ("window_size", "projection_dim", "in_channels")},
    **{f"vision_config.{name}": NO_LIST for name in ("depths", "dim_embed", "num_heads", "num_groups")},
    **{f"vision_config.{name}": NO_LIST for name in ("patch_size", "patch_stride")},
    "vision_config.patch_padding": ([-1] * 4, [10**5] * 4, "x"),
    "vision_config.patch_prenorm": ([0, 1, 1, 1], True),
    "vision_config.mlp_ratio": (NAN, 0, -4, 10**9, "4"),
    "vision_config.drop_path_rate": NO_SHARE,
    "vision_config.image_pos_embed": ("learned_abs_2d", [], 5),
    "vision_config.image_pos_embed.max_pos_embeddings": NO_SIZE,
    "vision_config.visual_temporal_embedding.max_temporal_embeddings": NO_SIZE,
    "eos_token_id": (*NO_TOKEN, []),
}
GENERATION: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(TOKENS, NO_TOKEN),
    **dict.fromkeys(("eos_token_id", "forced_eos_token_id"), (*NO_TOKEN, [], [-1], [2.0])),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens"), (5, "x", [10**9], [-1], [2.0], [None], [5] * 10**5)),
    **dict.fromkeys(("num_beams", "max_length", "max_new_tokens"), (*NO_SIZE, 10**5)),
    "no_repeat_ngram_size": (10**9, -1, "3", 3.0, NAN, [3]),
    "length_penalty": (NAN, INF, -INF, 10**9, "1", True, []),
    "early_stopping": (1, "always", [], NAN),
    "do_sample": (1, "x"),
}
PREPROCESSOR: dict[str, tuple[Any, ...]] = {
    "size": (64, "x", [64, 64], {"shortest_edge": 64}, None),
    "size.height": (10**5, 10**9, 0, -1, 64.0, True, "64", None, NAN, [64]),
    "size.width": (10**5, 0, None),
    "image_mean": (0.5, [0.5] * 2, [NAN] * 3, [INF] * 3, ["x"] * 3, [True] * 3, None),
    "image_std": (0.5, [0.5] * 4, [NAN] * 3, [0] * 3, [-1] * 3, [1e-30] * 3, [None] * 3, None),
    "resample": (99, -1, 3.0, "bicubic", True, NAN),
    "rescale_factor": (NAN, INF, 0, -1, 1e9, "x", []),
    "image_seq_length": NO_SIZE,
    **dict.fromkeys(("do_resize", "do_center_crop", "do_convert_rgb"), (1, "no", [], NAN)),
}
PROCESSOR: dict[str, tuple[Any, ...]] = {
    "image_processor": ("x", [], 5, True),
    **{f"image_processor.{name}": values for name, values in PREPROCESSOR.items()},
    "post_processor_config": ("x", [], 5),
    "post_processor_config.phrase_grounding": ("x", [], 5),
    "post_processor_config.phrase_grounding.banned_grounding_tokens": ("it", [5], {}, [None]),
}


def cases(file: str, table: dict[str, tuple[Any, ...]]) -> list[Any]:
    return [pytest.param(file, name, values, id=f"{file}-{name}") for name, values in table.items()]


FIELDS = [
    *cases("config.json", CONFIG),
    *cases("generation_config.json", GENERATION),
    *cases("preprocessor_config.json", PREPROCESSOR),
]


@pytest.mark.usefixtures("_no_weights")
@pytest.mark.parametrize(("file", "name", "values"), FIELDS)
def test_fields(folder: Path, file: str, name: str, values: tuple[Any, ...]) -> None:
    whole = (folder / file).read_text()
    for value in values:
        put(folder, file, name, value)
        refused(folder, f"{file}: {name}")
        (folder / file).write_text(whole)


@pytest.mark.parametrize(("file", "name", "values"), cases("processor_config.json", PROCESSOR))
def test_fields_of_a_processor(native: Path, file: str, name: str, values: tuple[Any, ...]) -> None:
    whole = (native / file).read_text()
    for value in values:
        put(native, file, name, value)
        refused(native, f"{file}: {name}")
        (native / file).write_text(whole)


@pytest.mark.usefixtures("_no_weights")
@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("text_config", None, ["text_config is missing"]),
        ("vision_config", None, ["vision_config is missing"]),
        ("architectures", 5, ["architectures 5"]),
        ("architectures", {}, ["architectures is {}"]),
        ("text_config.encoder_attention_heads", 3, ["text_config.d_model 16", "encoder_attention_heads 3"]),
        ("vision_config.num_heads", [2, 5, 2, 2], ["vision_config.embed_dim 12", "num_heads 5"]),
        ("vision_config.num_groups", [2, 2, 3, 2], ["vision_config.embed_dim 16", "num_groups 3"]),
        ("vision_config.dim_embed", [8, 12, 16, 21], ["vision_config.embed_dim 21", "num_heads 2"]),
        ("vision_config.projection_dim", 32, ["vision_config.projection_dim 32", "text_config.d_model 16"]),
        ("text_config.activation_function", "x", ["text_config.activation_function is 'x'"]),
        ("vision_config.activation_function", "x", ["vision_config.activation_function is 'x'"]),
        ("vision_config.patch_size", [64] * 4, ["size", "a stage of -29 x -29 places"]),
        ("vision_config.patch_stride", [1] * 4, ["size", "64 x 64 image tokens"]),
    ],
)
def test_fields_that_contradict_others(folder: Path, name: str, value: Any, words: list[str]) -> None:
    put(folder, "config.json", name, value)
    refused(folder, *words)


def test_ids_beyond_the_vocabulary(folder: Path) -> None:
    whole = (folder / "generation_config.json").read_text()
    for name in ("decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id"):
        put(folder, "generation_config.json", name, make.ROWS)
        refused(folder, f"generation_config.json: {name} is {make.ROWS}", f"ids from 0 to {make.ROWS - 1}")
        (folder / "generation_config.json").write_text(whole)
    for name in ("suppress_tokens", "begin_suppress_tokens"):
        put(folder, "generation_config.json", name, [5, make.ROWS])
        refused(folder, f"generation_config.json: {name} is [5, {make.ROWS}]")
        (folder / "generation_config.json").write_text(whole)
    put(folder, "config.json", "text_config.eos_token_id", make.ROWS)
    refused(folder, "eos_token_id", str(make.ROWS))


def test_image_tokens_that_leave_no_room(tmp_path: Path) -> None:
    folder = make.write_microsoft(tmp_path / "checkpoint", make.random_model(positions=5))
    refused(folder, "size", "5 image tokens", "max_position_embeddings 5")


HONEST: list[tuple[str, dict[str, Any]]] = [
    ("config.json", {"mine": {"a": [NAN, None]}, "vocab_size": "any", "quantization_config": None}),
    ("config.json", {"architectures": None, "bos_token_id": None, "tie_word_embeddings": None}),
    ("generation_config.json", {"mine": [[[]]], "max_length": None, "suppress_tokens": None, "length_penalty": 1}),
    ("generation_config.json", {"suppress_tokens": [], "early_stopping": "never", "temperature": NAN}),
    ("preprocessor_config.json", {"resample": None, "rescale_factor": None, "do_pad": None, "image_seq_length": None}),
    ("preprocessor_config.json", {"image_mean": [0, 0, 0], "image_std": [1, 1, 1], "rescale_factor": 1, "mine": []}),
]


@pytest.mark.parametrize(("file", "fields"), HONEST)
def test_what_honest_checkpoints_hold_is_no_reason(folder: Path, file: str, fields: dict[str, Any]) -> None:
    make.edit_json(folder / file, lambda content: content.update(fields))
    load_checkpoint(str(folder))


@pytest.fixture(scope="module")
def scratch(originals: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scratch")
    for layout in ("microsoft", "native"):
        make.copy_of(originals / layout, root / layout)
    return root


@pytest.mark.parametrize(
    ("layout", "file"),
    [
        *(("microsoft", file) for file in ("config.json", "generation_config.json", "preprocessor_config.json")),
        *(("native", file) for file in ("config.json", "processor_config.json")),
    ],
)
@settings(
    max_examples=60,
    deadline=timedelta(seconds=60),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_any_value_anywhere_is_read_or_refused(scratch: Path, layout: str, file: str, data: st.DataObject) -> None:
    folder = scratch / layout
    whole = (folder / file).read_text()
    refusal = None
    try:
        (folder / file).write_text(data.draw(mutated(whole)))
        checkpoint = load_checkpoint(str(folder))
        GenerationSettings.from_config(checkpoint.generation, sizes_of(checkpoint).max_position_embeddings)
    except CheckpointError as error:
        refusal = str(error)
    except ValueError as error:
        refusal = str(error)
        assert refusal.startswith("generation_config.json")
    finally:
        (folder / file).write_text(whole)
    assert refusal is None or refusal.isprintable()
