"""Checkpoints of every layout, whole and broken, against the model they hold and Microsoft's own answers."""

import json
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints as make
import huggingface_hub
import numpy as np
import pytest
import torch
from florence2_export.checkpoint import Checkpoint, CheckpointError, load_checkpoint
from florence2_export.checkpoint_settings import MICROSOFT_BANNED_PHRASES
from florence2_export.layouts import name_in
from florence2_export.tokenizer import FLORENCE_TOKENS
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessor, Florence2ForConditionalGeneration, Florence2Processor
from transformers.modeling_outputs import BaseModelOutput

from florence2.tasks import TASKS

SHARED = "language_model.model.shared.weight"
HEAD = "language_model.lm_head.weight"

needs_fixture = pytest.mark.skipif(
    not make.MICROSOFT_FIXTURE.is_dir(),
    reason=f"{make.MICROSOFT_FIXTURE} is not here: Microsoft's answers to compare with",
)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Models this small only lose by sharing their work out, most of all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def model() -> Florence2ForConditionalGeneration:
    return make.random_model()


@pytest.fixture(scope="session")
def wanted(model: Florence2ForConditionalGeneration) -> Tensor:
    return make.logits(model)


@pytest.fixture(scope="session")
def originals(model: Florence2ForConditionalGeneration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("originals")
    make.write_microsoft(root / "microsoft", model)
    make.write_native(root / "native", model)
    return root


@pytest.fixture
def microsoft(originals: Path, tmp_path: Path) -> Path:
    return make.copy_of(originals / "microsoft", tmp_path / "microsoft")


@pytest.fixture
def native(originals: Path, tmp_path: Path) -> Path:
    return make.copy_of(originals / "native", tmp_path / "native")


def same(checkpoint: Checkpoint, wanted: Tensor) -> bool:
    return torch.equal(make.logits(checkpoint.model), wanted)


def load_state(folder: Path) -> make.State:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


# Microsoft's own answers


@pytest.fixture(scope="module")
def oracle() -> tuple[Checkpoint, list[dict[str, Any]]]:
    expected = json.loads((make.MICROSOFT_FIXTURE / "expected.json").read_text())
    return load_checkpoint(str(make.MICROSOFT_FIXTURE / "checkpoint")), expected


def prompt_of(case: dict[str, Any]) -> str:
    return TASKS[case["task"]].prompt.replace("{input}", case["text"])


@needs_fixture
def test_tokenizer_gives_microsofts_prompt_ids(oracle) -> None:
    checkpoint, expected = oracle
    assert len(expected) == 24
    for case in expected:
        assert checkpoint.tokenizer.encode(prompt_of(case)).ids == case["prompt_ids"]


@needs_fixture
@pytest.mark.parametrize("index", [0, 9, 18, 3, 20, 21, 6, 15])
def test_generates_microsofts_ids(oracle, index: int) -> None:
    checkpoint, expected = oracle
    case = expected[index]
    image = Image.open(make.MICROSOFT_FIXTURE / "images" / case["image"]).convert("RGB")
    pixels = pixel_values(image, checkpoint.preprocessor)
    assert pixels.mean().item() == pytest.approx(case["pixel_mean"], abs=1e-5)
    with torch.no_grad():
        features = checkpoint.model.get_image_features(pixels).pooler_output
        prompt = checkpoint.model.get_input_embeddings()(torch.tensor([case["prompt_ids"]]))
        embeds = torch.cat([features, prompt], dim=1)
        encoded = checkpoint.model.get_encoder()(inputs_embeds=embeds).last_hidden_state
        ids = checkpoint.model.generate(
            encoder_outputs=BaseModelOutput(last_hidden_state=encoded),
            attention_mask=torch.ones(encoded.shape[:2], dtype=torch.long),
            max_new_tokens=64,
        )
    assert ids[0].tolist() == case["beam3_ids"]


def pixel_values(image: Image.Image, preprocessor: dict[str, Any]) -> Tensor:
    size = preprocessor["size"]["width"], preprocessor["size"]["height"]
    pixels = np.asarray(image.resize(size, preprocessor["resample"]), dtype=np.float32)
    pixels = pixels * np.float32(preprocessor["rescale_factor"])
    mean, std = (np.array(preprocessor[key], dtype=np.float32) for key in ("image_mean", "image_std"))
    return torch.from_numpy((pixels - mean) / std).permute(2, 0, 1)[None]


@needs_fixture
def test_fixture_names_are_those_the_helpers_write() -> None:
    from safetensors import safe_open

    file = safe_open(make.MICROSOFT_FIXTURE / "checkpoint" / "model.safetensors", "pt")
    expected = set(make.microsoft_names([1, 1, 2, 1], (2, 2)))
    assert set(file.keys()) == {name for name in expected if not name.endswith(make.TIED)}


@needs_fixture
def test_fixture_is_described(oracle) -> None:
    checkpoint, _ = oracle
    assert checkpoint.layout == "microsoft"
    assert checkpoint.repairs == ["config.json: vision_config.model_type is '', read as 'davit'"]
    assert checkpoint.preprocessor["image_seq_length"] == 577
    assert checkpoint.tokenizer.token_to_id("<loc_0>") == 50269
    assert checkpoint.tokenizer.token_to_id("<and>") == 51288
    assert checkpoint.model.config.image_token_id == 51289
    assert checkpoint.model.lm_head.weight.shape == (51289, 32)


# Layouts and variants: they load, answer alike, and nothing is said


def test_microsoft_layout(microsoft: Path, wanted: Tensor, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = load_checkpoint(str(microsoft))
    assert same(checkpoint, wanted)
    assert checkpoint.repairs == []
    assert not caplog.records
    assert checkpoint.layout == "microsoft"
    assert checkpoint.banned_grounding_phrases == list(MICROSOFT_BANNED_PHRASES)
    assert checkpoint.generation == {**make.GENERATION, "length_penalty": 1.0}
    assert checkpoint.revision is None
    assert not checkpoint.model.training
    for _, tensor in [*checkpoint.model.named_parameters(), *checkpoint.model.named_buffers()]:
        assert (tensor.device.type, tensor.dtype, tensor.requires_grad) == ("cpu", torch.float32, False)
    assert checkpoint.model.lm_head.weight is checkpoint.model.get_input_embeddings().weight


@pytest.mark.parametrize("nested", [True, False])
def test_native_layout(model: Florence2ForConditionalGeneration, wanted: Tensor, tmp_path: Path, nested: bool) -> None:
    checkpoint = load_checkpoint(str(make.write_native(tmp_path / "native", model, nested=nested)))
    assert same(checkpoint, wanted)
    assert checkpoint.repairs == []
    assert checkpoint.layout == "native"
    assert checkpoint.banned_grounding_phrases == make.BANNED
    assert checkpoint.preprocessor["size"] == {"height": make.SIDE, "width": make.SIDE}


def test_native_config_with_what_the_converter_left_in_it(
    model: Florence2ForConditionalGeneration, native: Path, wanted: Tensor
) -> None:
    """transformers' converter passes Microsoft's whole dictionaries on."""
    left = make.microsoft_config(model)

    def mix(config: dict[str, Any]) -> None:
        config["torch_dtype"] = "float16"
        for part in ("text_config", "vision_config"):
            config[part] = left[part] | config[part]
        config["vision_config"]["dim_embed"] = [1, 1, 1, 1]

    make.edit_json(native / "config.json", mix)
    checkpoint = load_checkpoint(str(native))
    assert same(checkpoint, wanted)
    assert checkpoint.repairs == []


def test_processor_as_transformers_saves_it(native: Path, wanted: Tensor) -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=make.full_tokenizer(image=True),
        **{"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"},
        extra_special_tokens={"image_token": "<image>"},
    )
    known: dict[str, Any] = {key: value for key, value in make.PREPROCESSOR.items() if key != "image_processor_type"}
    for path in native.glob("*processor_config.json"):
        path.unlink()
    Florence2Processor(CLIPImageProcessor(**known), tokenizer).save_pretrained(native)
    checkpoint = load_checkpoint(str(native))
    assert same(checkpoint, wanted)
    assert checkpoint.repairs == []
    assert checkpoint.banned_grounding_phrases == []
    plain = load_checkpoint_preprocessor(make.PREPROCESSOR)
    assert {key: checkpoint.preprocessor[key] for key in plain} == plain
    assert checkpoint.model.config.image_token_id == make.ROWS


def load_checkpoint_preprocessor(given: dict[str, Any]) -> dict[str, Any]:
    keys = ("size", "resample", "rescale_factor", "image_mean", "image_std", "image_seq_length", "do_resize")
    return {key: given[key] for key in keys}


def test_microsoft_names_and_back(microsoft: Path, model: Florence2ForConditionalGeneration) -> None:
    for name in make.microsoft_names([1, 1, 1, 1], (1, 1)):
        if name != "language_model.final_logits_bias":
            assert name_in("microsoft", make.from_microsoft(name)) == name
    loaded, original = load_checkpoint(str(microsoft)).model.state_dict(), model.state_dict()
    assert list(loaded) == list(original)
    assert all(torch.equal(loaded[name], original[name]) for name in original)


def bin_file(folder: Path, state: make.State) -> None:
    torch.save(state, folder / "pytorch_model.bin")


def bin_file_of_parameters(folder: Path, state: make.State) -> None:
    bin_file(folder, {name: torch.nn.Parameter(tensor) for name, tensor in state.items()})


def legacy_bin_file(folder: Path, state: make.State) -> None:
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def sharded_bin(folder: Path, state: make.State) -> None:
    make.write_sharded(folder, state, "bin")


@pytest.mark.parametrize("write", [make.write_sharded, bin_file, bin_file_of_parameters, legacy_bin_file, sharded_bin])
@pytest.mark.parametrize("layout", ["microsoft", "native"])
@pytest.mark.parametrize("tied_copies", [True, False])
def test_weight_files(
    request: pytest.FixtureRequest,
    model: Florence2ForConditionalGeneration,
    wanted: Tensor,
    layout: str,
    write: Callable[[Path, make.State], None],
    tied_copies: bool,
) -> None:
    folder = request.getfixturevalue(layout)
    make.remove_weights(folder)
    write(folder, getattr(make, f"{layout}_state")(model, tied_copies))
    checkpoint = load_checkpoint(str(folder))
    assert same(checkpoint, wanted)
    assert (checkpoint.layout, checkpoint.repairs) == (layout, [])


@pytest.mark.parametrize("kept", [HEAD, "language_model.model.decoder.embed_tokens.weight"])
def test_only_another_name_of_the_tied_table(microsoft: Path, wanted: Tensor, kept: str) -> None:
    state = load_state(microsoft)
    state[kept] = state.pop(SHARED)
    make.write_safetensors(microsoft, state)
    checkpoint = load_checkpoint(str(microsoft))
    assert same(checkpoint, wanted)
    assert checkpoint.repairs == []


@pytest.mark.parametrize("layout", ["microsoft", "native"])
def test_buffers_may_be_absent(request: pytest.FixtureRequest, layout: str, wanted: Tensor) -> None:
    folder = request.getfixturevalue(layout)
    state = {
        name: tensor
        for name, tensor in load_state(folder).items()
        if not name.endswith(("pos_idx_to_embed", "final_logits_bias"))
    }
    make.write_safetensors(folder, state)
    checkpoint = load_checkpoint(str(folder))
    assert same(checkpoint, wanted)
    assert checkpoint.repairs == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_cast(microsoft: Path, dtype: torch.dtype) -> None:
    state = {name: tensor.to(dtype) for name, tensor in load_state(microsoft).items()}
    make.write_safetensors(microsoft, state)
    checkpoint = load_checkpoint(str(microsoft))
    table = checkpoint.model.model.language_model.shared.weight
    assert table.dtype == torch.float32
    assert torch.equal(table, state[SHARED].float())
    assert checkpoint.repairs == []


@pytest.mark.parametrize("rows", [51289, 51290, 51328])
@pytest.mark.parametrize("layout", ["microsoft", "native"])
def test_vocabularies_of_the_hub(tmp_path: Path, rows: int, layout: str) -> None:
    model = make.random_model(rows)
    folder = getattr(make, f"write_{layout}")(tmp_path / layout, model, words=50265)
    checkpoint = load_checkpoint(str(folder))
    assert same(checkpoint, make.logits(model))
    assert checkpoint.repairs == []
    assert checkpoint.tokenizer.token_to_id("<loc_999>") == 51268
    has_image_token = layout == "native" and rows > 51289
    assert checkpoint.model.config.image_token_id == (51289 if has_image_token else rows)


@pytest.mark.parametrize("positions", [1024, 4096])
def test_positions(tmp_path: Path, positions: int) -> None:
    model = make.random_model(positions=positions)
    checkpoint = load_checkpoint(str(make.write_microsoft(tmp_path / "microsoft", model)))
    assert same(checkpoint, make.logits(model))
    assert checkpoint.model.config.get_text_config().max_position_embeddings == positions
    assert checkpoint.repairs == []


def untied_state(folder: Path) -> tuple[make.State, Tensor]:
    state = load_state(folder)
    torch.manual_seed(1)
    head = state[SHARED] + torch.randn_like(state[SHARED])
    return state | {HEAD: head}, head


def test_untied_head_that_is_declared(microsoft: Path, wanted: Tensor) -> None:
    state, head = untied_state(microsoft)
    make.write_safetensors(microsoft, state)
    make.edit_json(microsoft / "config.json", lambda config: config["text_config"].update(tie_word_embeddings=False))
    checkpoint = load_checkpoint(str(microsoft))
    assert torch.equal(checkpoint.model.lm_head.weight, head)
    assert checkpoint.repairs == []
    assert not same(checkpoint, wanted)


def test_untied_head_under_a_config_that_ties(microsoft: Path, tmp_path: Path) -> None:
    state, head = untied_state(microsoft)
    make.write_safetensors(microsoft, state)
    checkpoint = load_checkpoint(str(microsoft))
    assert checkpoint.repairs == [
        f"config.json: tie_word_embeddings set to false, because {HEAD} differs from the embedding"
    ]
    assert torch.equal(checkpoint.model.lm_head.weight, head)
    assert torch.equal(checkpoint.model.model.language_model.shared.weight, state[SHARED])
    checkpoint.model.save_pretrained(tmp_path / "saved")
    again = Florence2ForConditionalGeneration.from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(make.logits(again), make.logits(checkpoint.model))


# Tokenizers


def only_vocabulary(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    make.base_tokenizer().model.save(str(folder))


def vocabulary_and_added_tokens(folder: Path) -> None:
    only_vocabulary(folder)
    added = {token: make.BASE_TOKENS + index for index, token in enumerate(make.florence_tokens())}
    make.write_json(folder / "added_tokens.json", dict(reversed(added.items())))


def added_tokens_in_the_tokenizer_config(folder: Path) -> None:
    added = {make.BASE_TOKENS + index: {"content": token} for index, token in enumerate(make.florence_tokens())}
    make.write_json(folder / "tokenizer_config.json", {"added_tokens_decoder": added})


def complete(folder: Path) -> None:
    make.full_tokenizer().save(str(folder / "tokenizer.json"))


def truncating_and_padding(folder: Path) -> None:
    tokenizer = make.full_tokenizer()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=20)
    tokenizer.save(str(folder / "tokenizer.json"))


def no_post_processor(folder: Path) -> None:
    make.edit_json(folder / "tokenizer.json", lambda tokenizer: tokenizer.update(post_processor=None))


def location_tokens_only_in_the_vocabulary(folder: Path) -> None:
    def move(tokenizer: dict[str, Any]) -> None:
        moved = [token for token in tokenizer["added_tokens"] if token["id"] >= make.BASE_TOKENS]
        tokenizer["model"]["vocab"] |= {token["content"]: token["id"] for token in moved}
        tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token not in moved]

    complete(folder)
    make.edit_json(folder / "tokenizer.json", move)


@pytest.mark.parametrize(
    "change",
    [
        only_vocabulary,
        vocabulary_and_added_tokens,
        added_tokens_in_the_tokenizer_config,
        complete,
        truncating_and_padding,
        no_post_processor,
        location_tokens_only_in_the_vocabulary,
    ],
)
def test_tokenizers(microsoft: Path, change: Callable[[Path], None]) -> None:
    change(microsoft)
    checkpoint = load_checkpoint(str(microsoft))
    expected = make.full_tokenizer()
    tokenizer = checkpoint.tokenizer
    assert tokenizer.get_vocab() == expected.get_vocab()
    text = " the image at <loc_1><loc_999>, <od>é"
    ids = expected.encode(text, add_special_tokens=False).ids
    assert tokenizer.encode(text, add_special_tokens=False).ids == ids
    assert tokenizer.encode(text).ids == [0, *ids, 2]
    assert tokenizer.decode(ids, skip_special_tokens=False) == expected.decode(ids, skip_special_tokens=False)
    assert tokenizer.truncation is None
    assert tokenizer.padding is None
    assert checkpoint.repairs == []


def test_florence_tokens_are_in_microsofts_order() -> None:
    assert list(FLORENCE_TOKENS) == make.florence_tokens()
    assert len(FLORENCE_TOKENS) == make.FLORENCE_TOKENS


# Breakages: they load, answer as the whole checkpoint, and each repair is named

Change = Callable[[dict[str, Any]], object]


def wrong_ids(content: dict[str, Any]) -> None:
    content.update(bos_token_id=2, eos_token_id=1, pad_token_id=0)


REPLACED = (
    "bos_token_id 2 replaced by 0, eos_token_id 1 replaced by 2, pad_token_id 0 replaced by 1, as text_config says"
)


def vision_type(value: str | None) -> Change:
    def change(config: dict[str, Any]) -> None:
        config["vision_config"]["model_type"] = value
        if value is None:
            del config["vision_config"]["model_type"]

    return change


def auto_map(config: dict[str, Any]) -> None:
    config["auto_map"] = {"AutoConfig": "someone/Florence-2-base-ft--configuration_florence2.Florence2Config"}


def without(key: str) -> Change:
    return lambda content: content.pop(key)


AUTO_MAP = "auto_map points to code in someone/Florence-2-base-ft; ignored, no remote code is run"
VISION = "config.json: vision_config.model_type is"


def text(**values: Any) -> Change:
    return lambda config: config["text_config"].update(values)


@pytest.mark.parametrize(
    ("layout", "file", "change", "repair"),
    [
        ("microsoft", "config.json", auto_map, f"config.json: {AUTO_MAP}"),
        ("native", "config.json", auto_map, f"config.json: {AUTO_MAP}"),
        ("microsoft", "preprocessor_config.json", auto_map, f"preprocessor_config.json: {AUTO_MAP}"),
        ("microsoft", "config.json", vision_type(None), f"{VISION} missing, read as 'davit'"),
        ("microsoft", "config.json", vision_type(""), f"{VISION} '', read as 'davit'"),
        (
            "microsoft",
            "config.json",
            vision_type("florence_vision"),
            f"{VISION} 'florence_vision', read as 'davit'",
        ),
        ("native", "config.json", vision_type(None), f"{VISION} missing, read as 'florence_vision'"),
        ("native", "config.json", vision_type(""), f"{VISION} '', read as 'florence_vision'"),
        ("native", "config.json", vision_type("davit"), f"{VISION} 'davit', read as 'florence_vision'"),
        ("microsoft", "config.json", wrong_ids, f"config.json: {REPLACED}"),
        ("native", "config.json", wrong_ids, f"config.json: {REPLACED}"),
        ("microsoft", "generation_config.json", wrong_ids, f"generation_config.json: {REPLACED}"),
        ("native", "generation_config.json", wrong_ids, f"generation_config.json: {REPLACED}"),
        *(
            (
                layout,
                "generation_config.json",
                without(key),
                f"generation_config.json: {key} is absent, set to {value}",
            )
            for layout in ("microsoft", "native")
            for key, value in (
                ("forced_bos_token_id", 0),
                ("forced_eos_token_id", 2),
                ("decoder_start_token_id", 2),
            )
        ),
        (
            "microsoft",
            "config.json",
            text(vocab_size=1280),
            f"config.json: vocab_size 1280 replaced by {make.ROWS}, the rows of {SHARED}",
        ),
        (
            "native",
            "config.json",
            text(max_position_embeddings=4096),
            "config.json: max_position_embeddings 4096 replaced by 64, "
            "the rows of model.language_model.encoder.embed_positions.weight",
        ),
        (
            "microsoft",
            "config.json",
            lambda config: config.update(model_type="florence"),
            "config.json: model_type 'florence' replaced by 'florence2', as architectures say",
        ),
        (
            "microsoft",
            "preprocessor_config.json",
            lambda config: config.update(image_seq_length=577),
            "preprocessor_config.json: image_seq_length 577 replaced by 5, "
            "which is what {'height': 64, 'width': 64} gives",
        ),
    ],
)
def test_breakage_is_repaired_and_named(
    request: pytest.FixtureRequest,
    caplog: pytest.LogCaptureFixture,
    wanted: Tensor,
    layout: str,
    file: str,
    change: Change,
    repair: str,
) -> None:
    folder = request.getfixturevalue(layout)
    make.edit_json(folder / file, change)
    with caplog.at_level(logging.WARNING, logger="florence2_export.checkpoint"):
        checkpoint = load_checkpoint(str(folder))
    assert checkpoint.repairs == [repair]
    assert [record.getMessage() for record in caplog.records] == [f"{folder}: {repair}"]
    assert same(checkpoint, wanted)
    assert checkpoint.generation == {**make.GENERATION, "length_penalty": 1.0}
    assert checkpoint.preprocessor["image_seq_length"] == 5
    config = checkpoint.model.config
    for part in (config, config.text_config):
        assert {key: getattr(part, key) for key in make.IDS} == make.IDS


def test_auto_map_of_a_tokenizer_is_a_list(microsoft: Path) -> None:
    classes = ["someone/florence--tokenization.Slow", None]
    make.write_json(microsoft / "tokenizer_config.json", {"auto_map": {"AutoTokenizer": classes}})
    expected = "tokenizer_config.json: auto_map points to code in someone/florence; ignored, no remote code is run"
    assert load_checkpoint(str(microsoft)).repairs == [expected]


def test_ids_come_from_the_tokenizer_where_the_text_config_has_none(microsoft: Path, wanted: Tensor) -> None:
    make.edit_json(microsoft / "config.json", lambda config: [config["text_config"].pop(key) for key in make.IDS])
    make.edit_json(microsoft / "generation_config.json", wrong_ids)
    checkpoint = load_checkpoint(str(microsoft))
    assert same(checkpoint, wanted)
    repair = REPLACED.replace("text_config", "the tokenizer")
    assert checkpoint.repairs == [f"generation_config.json: {repair}"]
    assert checkpoint.generation == {**make.GENERATION, "length_penalty": 1.0}


def test_all_of_it_at_once(microsoft: Path, wanted: Tensor) -> None:
    make.edit_json(microsoft / "config.json", auto_map)
    make.edit_json(microsoft / "config.json", vision_type(""))
    make.edit_json(microsoft / "config.json", wrong_ids)
    make.edit_json(microsoft / "generation_config.json", wrong_ids)
    make.edit_json(microsoft / "generation_config.json", without("forced_bos_token_id"))
    checkpoint = load_checkpoint(str(microsoft))
    assert len(checkpoint.repairs) == 5
    assert same(checkpoint, wanted)
    assert checkpoint.generation == {**make.GENERATION, "length_penalty": 1.0}


def test_missing_generation_config_comes_from_the_text_config(microsoft: Path, wanted: Tensor) -> None:
    (microsoft / "generation_config.json").unlink()
    checkpoint = load_checkpoint(str(microsoft))
    assert checkpoint.repairs == [
        "generation_config.json is missing: decoding defaults taken from config.json's text_config"
    ]
    assert checkpoint.generation == {**make.GENERATION, "length_penalty": 1.0}
    assert same(checkpoint, wanted)


def test_generation_config_wins_and_keeps_what_else_it_says(microsoft: Path) -> None:
    own = {
        **make.IDS,
        "eos_token_id": [2, 70],
        "num_beams": 5,
        "max_length": 33,
        "suppress_tokens": [7],
        "mine": "x",
    }
    forced = {"decoder_start_token_id": 2, "forced_bos_token_id": 0, "forced_eos_token_id": 2}
    make.write_json(microsoft / "generation_config.json", own | forced)
    checkpoint = load_checkpoint(str(microsoft))
    unsaid = {"no_repeat_ngram_size": 0, "length_penalty": 1.0, "early_stopping": False}
    assert checkpoint.generation == own | forced | unsaid
    assert checkpoint.model.generation_config.num_beams == 5
    assert checkpoint.repairs == []


# What does not load: one line that names the file and the tensor


def refused(source: Path | str, *words: str, revision: str | None = None) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(str(source), revision)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


PROJECTIONS = {
    "microsoft": "vision_tower.blocks.0.0.channel_block.channel_attn.fn.qkv.weight",
    "native": "model.vision_tower.blocks.0.0.channel_block.channel_attn.qkv.weight",
}


@pytest.mark.parametrize("layout", PROJECTIONS)
@pytest.mark.parametrize("write", [make.write_safetensors, make.write_sharded, bin_file, sharded_bin])
def test_tensors_that_do_not_fit(
    request: pytest.FixtureRequest, layout: str, write: Callable[[Path, make.State], None]
) -> None:
    folder, name = request.getfixturevalue(layout), PROJECTIONS[layout]
    state = load_state(folder)
    make.remove_weights(folder)

    def file_of(tensor: str) -> str:
        index = next(folder.glob("*.index.json"), None)
        if index is None:
            return next(path.name for path in folder.glob("*model*.*") if path.suffix in (".safetensors", ".bin"))
        return json.loads(index.read_text())["weight_map"].get(tensor, index.name)

    write(folder, {key: value for key, value in state.items() if key != name})
    refused(folder, f"tensor {name} is missing", file_of(name))
    write(folder, state | {"extra.lora_A.weight": torch.zeros(2)})
    refused(folder, "surplus tensor extra.lora_A.weight", file_of("extra.lora_A.weight"))
    write(folder, state | {name: torch.zeros(25, 8)})
    refused(folder, f"{name} has shape [25, 8] where config.json gives [24, 8]", file_of(name))
    write(folder, state | {name: torch.zeros(24, 8, dtype=torch.int8)})
    refused(folder, f"{name} is torch.int8", file_of(name))


def test_shape_of_a_transposed_tensor_is_given_as_in_the_file(microsoft: Path) -> None:
    state = load_state(microsoft)
    make.write_safetensors(microsoft, state | {"image_projection": state["image_projection"].T.contiguous()})
    refused(microsoft, "model.safetensors", "image_projection has shape [16, 20] where config.json gives [20, 16]")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        (SHARED, torch.zeros(make.ROWS, 15), f"{SHARED} has shape [{make.ROWS}, 15]"),
        (SHARED, torch.zeros(make.ROWS - 1, 16), f"{SHARED} has shape [{make.ROWS - 1}, 16]"),
        (HEAD, torch.zeros(make.ROWS + 4, 16), f"{HEAD} has shape [{make.ROWS + 4}, 16]"),
        (
            "language_model.model.encoder.embed_positions.weight",
            torch.zeros(70, 16),
            "language_model.model.encoder.embed_positions.weight has shape [70, 16]",
        ),
        (
            "language_model.model.decoder.embed_tokens.weight",
            torch.zeros(make.ROWS, 16),
            f"language_model.model.decoder.embed_tokens.weight differs from {SHARED}",
        ),
        (
            "language_model.final_logits_bias",
            torch.ones(1, make.ROWS),
            "language_model.final_logits_bias is not zero",
        ),
    ],
)
def test_tables_that_do_not_fit(microsoft: Path, name: str, value: Tensor, words: str) -> None:
    make.write_safetensors(microsoft, load_state(microsoft) | {name: value})
    refused(microsoft, "model.safetensors", words)


def test_too_few_rows_for_the_tokens(tmp_path: Path) -> None:
    folder = make.write_microsoft(tmp_path / "microsoft", make.random_model(make.ROWS - 1))
    refused(folder, "model.safetensors", SHARED, f"{make.ROWS - 1} rows", f"id {make.ROWS - 1}")


def test_head_that_is_declared_untied_but_missing(microsoft: Path) -> None:
    make.edit_json(microsoft / "config.json", text(tie_word_embeddings=False))
    refused(microsoft, "model.safetensors", f"tensor {HEAD} is missing")


@pytest.mark.parametrize("write", [make.write_safetensors, make.write_sharded, bin_file, legacy_bin_file, sharded_bin])
@pytest.mark.parametrize("share", [0.001, 0.5, 0.99])
def test_file_cut_short(microsoft: Path, write: Callable[[Path, make.State], None], share: float) -> None:
    state = load_state(microsoft)
    make.remove_weights(microsoft)
    write(microsoft, state)
    file = sorted(path for path in microsoft.glob("*model*.*") if path.suffix in (".safetensors", ".bin"))[0]
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])
    refused(microsoft, file.name, "damaged or cut short")


def test_shard_missing(microsoft: Path) -> None:
    state = load_state(microsoft)
    make.remove_weights(microsoft)
    make.write_sharded(microsoft, state)
    (microsoft / "model-00002-of-00003.safetensors").unlink()
    refused(microsoft, "model-00002-of-00003.safetensors is missing")


def test_index_that_points_outside(microsoft: Path) -> None:
    make.remove_weights(microsoft)
    make.write_json(microsoft / "model.safetensors.index.json", {"weight_map": {SHARED: "../other.safetensors"}})
    refused(microsoft, "model.safetensors.index.json", "../other.safetensors")


class Payload:
    def __reduce__(self):
        return print, ("code ran",)


def test_pickle_with_code_is_refused(microsoft: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make.remove_weights(microsoft)
    torch.save({SHARED: torch.zeros(1), "payload": Payload()}, microsoft / "pytorch_model.bin")
    refused(microsoft, "pytorch_model.bin", "Python objects", "refused", "model.safetensors")
    (microsoft / "pytorch_model.bin").write_bytes(pickle.dumps({"payload": Payload()}, protocol=2))
    refused(microsoft, "pytorch_model.bin")
    assert "code ran" not in capsys.readouterr().out


def test_bin_of_something_else(microsoft: Path) -> None:
    state = load_state(microsoft)
    make.remove_weights(microsoft)
    torch.save({"epoch": 3, "state_dict": state}, microsoft / "pytorch_model.bin")
    refused(microsoft, "pytorch_model.bin", "epoch is a int")
    torch.save([1], microsoft / "pytorch_model.bin")
    refused(microsoft, "pytorch_model.bin", "list")


def test_no_weights(microsoft: Path) -> None:
    make.remove_weights(microsoft)
    refused(microsoft, "no weights", "model.safetensors", "pytorch_model.bin")


@pytest.mark.parametrize("with_config", [True, False])
def test_adapter_must_be_merged(microsoft: Path, with_config: bool) -> None:
    make.remove_weights(microsoft)
    if not with_config:
        (microsoft / "config.json").unlink()
    adapter = {"base_model_name_or_path": "microsoft/Florence-2-base-ft"}
    make.write_json(microsoft / "adapter_config.json", adapter)
    refused(microsoft, "adapter_config.json", "merge it into microsoft/Florence-2-base-ft")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda config: config.update(model_type="paligemma", architectures=["PaliGemmaForConditionalGeneration"]),
            ["'paligemma'", "PaliGemmaForConditionalGeneration", "not Florence-2"],
        ),
        (lambda config: config.update(architectures=["BartModel"]), ["BartModel", "not Florence-2"]),
        (without("vision_config"), ["vision_config is missing"]),
        (without("text_config"), ["text_config is missing"]),
        (lambda config: config["text_config"].pop("d_model"), ["text_config.d_model missing"]),
        (lambda config: config["vision_config"].pop("dim_embed"), ["vision_config.dim_embed missing"]),
        (text(add_final_layer_norm=True), ["text_config.add_final_layer_norm is True"]),
        (text(model_type="llama"), ["text_config.model_type is 'llama'"]),
        (vision_type("swin"), ["vision_config.model_type is 'swin'"]),
        (
            lambda config: config["vision_config"].update(image_feature_source=["last_frame"]),
            ["vision_config.image_feature_source is ['last_frame']"],
        ),
        (lambda config: config.update(quantization_config={"load_in_4bit": True}), ["quantised"]),
        (text(d_model="wide"), ["d_model"]),
        (lambda config: config["vision_config"].update(num_heads=[2, 2]), ["'num_heads': 2", "'depths': 4"]),
        (lambda config: config["vision_config"].update(patch_size=[7, 3, 3]), ["'patch_size': 3"]),
        (lambda config: config["vision_config"].update(image_pos_embed="learned"), ["image_pos_embed"]),
        (text(encoder_attention_heads=3), ["3"]),
    ],
)
def test_config_that_is_not_florence2(microsoft: Path, change: Change, words: list[str]) -> None:
    make.edit_json(microsoft / "config.json", change)
    refused(microsoft, "config.json", *words)


def test_weights_that_are_not_florence2(microsoft: Path) -> None:
    make.write_safetensors(microsoft, {"encoder.layer.0.weight": torch.zeros(1)})
    refused(microsoft, "model.safetensors", "encoder.layer.0.weight", "Florence-2")


@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json"])
def test_settings_missing_or_damaged(microsoft: Path, file: str) -> None:
    (microsoft / file).write_text('{"model_type": "flor')
    refused(microsoft, file, "not valid JSON")
    (microsoft / file).write_text("[]")
    refused(microsoft, file, "list")
    (microsoft / file).unlink()
    refused(microsoft, file, "missing")


def test_tokenizer_missing_or_damaged(microsoft: Path) -> None:
    (microsoft / "tokenizer.json").write_text('{"version": "1.0"')
    refused(microsoft, "tokenizer.json", "not valid JSON")
    (microsoft / "tokenizer.json").unlink()
    refused(microsoft, "no tokenizer", "tokenizer.json", "vocab.json", "merges.txt")


@pytest.mark.parametrize("content", [{"<od>": "first"}, {"<od>": None}])
def test_added_tokens_that_are_none(microsoft: Path, content: dict[str, Any]) -> None:
    make.write_json(microsoft / "added_tokens.json", content)
    refused(microsoft, "added_tokens.json", "added tokens")
    (microsoft / "added_tokens.json").unlink()
    make.write_json(microsoft / "tokenizer_config.json", {"added_tokens_decoder": content})
    refused(microsoft, "tokenizer_config.json", "added tokens")


def test_added_token_with_an_id_that_cannot_be(microsoft: Path) -> None:
    make.write_json(microsoft / "added_tokens.json", {"<od>": 999})
    refused(microsoft, "added_tokens.json", "<od> has id 999", "300")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"size": {"shortest_edge": 64}}, ["size", "height"]),
        ({"size": 64}, ["size"]),
        ({"do_resize": False}, ["do_resize is false"]),
        ({"do_rescale": False}, ["do_rescale is false"]),
        ({"do_normalize": False}, ["do_normalize is false"]),
        ({"do_pad": True}, ["do_pad is true"]),
        ({"do_center_crop": True, "crop_size": {"height": 32, "width": 32}}, ["do_center_crop"]),
        ({"do_center_crop": None, "crop_size": 32}, ["do_center_crop"]),
        ({"resample": 9}, ["resample is 9"]),
        ({"image_mean": None}, ["image_mean is missing"]),
        ({"image_std": [1, 0, 1]}, ["image_std is [1, 0, 1]"]),
        ({"size": {"height": 4096, "width": 4096}}, ["128 x 128 image tokens", "50"]),
    ],
)
def test_preprocessing_that_is_not_done(microsoft: Path, values: dict[str, Any], words: list[str]) -> None:
    make.edit_json(microsoft / "preprocessor_config.json", lambda content: content.update(values))
    refused(microsoft, "preprocessor_config.json", *words)


def test_crop_that_changes_nothing(microsoft: Path) -> None:
    make.edit_json(microsoft / "preprocessor_config.json", lambda content: content.update(do_center_crop=True))
    assert load_checkpoint(str(microsoft)).preprocessor["do_center_crop"] is False


# Sources


def test_sources_that_are_none(microsoft: Path, tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "nowhere", "neither a folder nor a hub id")
    refused("florence", "'florence'", "neither a folder nor a hub id")
    refused(microsoft / "model.safetensors", "is a file", "folder")
    refused(microsoft, "no revision 'main'", revision="main")


def test_hash_is_of_the_files_that_count(microsoft: Path, tmp_path: Path) -> None:
    first = load_checkpoint(str(microsoft)).sha256
    copy = make.copy_of(microsoft, tmp_path / "copy")
    (copy / "README.md").write_text("mine")
    assert load_checkpoint(str(copy)).sha256 == first
    make.edit_json(copy / "generation_config.json", lambda content: content.update(num_beams=4))
    assert load_checkpoint(str(copy)).sha256 != first


class Hub:
    """Gives the files of a folder that match, as snapshot_download does."""

    def __init__(self, origin: Path, snapshot: Path):
        self.origin, self.snapshot = origin, snapshot
        self.asked: list[tuple[str, str | None]] = []

    def __call__(self, hub_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        from fnmatch import fnmatch

        self.asked.append((hub_id, revision))
        self.snapshot.mkdir(parents=True, exist_ok=True)
        for path in self.origin.iterdir():
            if any(fnmatch(path.name, pattern) for pattern in allow_patterns):
                (self.snapshot / path.name).write_bytes(path.read_bytes())
        return str(self.snapshot)


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize("write", [make.write_safetensors, make.write_sharded, bin_file, sharded_bin])
def test_hub_id(
    microsoft: Path,
    tmp_path: Path,
    wanted: Tensor,
    monkeypatch: pytest.MonkeyPatch,
    write: Callable[[Path, make.State], None],
) -> None:
    state = load_state(microsoft)
    make.remove_weights(microsoft)
    write(microsoft, state)
    (microsoft / "modeling_florence2.py").write_text("raise SystemExit")
    (microsoft / "optimizer.bin").write_text("large")
    hub = Hub(microsoft, tmp_path / "snapshots" / COMMIT)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    checkpoint = load_checkpoint("someone/florence", revision="refs/pr/20")
    assert same(checkpoint, wanted)
    assert (checkpoint.source, checkpoint.revision) == ("someone/florence", COMMIT)
    assert hub.asked[0] == ("someone/florence", "refs/pr/20")
    assert set(hub.asked[1:]) == {("someone/florence", COMMIT)}
    fetched = {path.name for path in hub.snapshot.iterdir()}
    assert fetched == {path.name for path in microsoft.iterdir()} - {"modeling_florence2.py", "optimizer.bin"}
    assert checkpoint.sha256 == load_checkpoint(str(microsoft)).sha256


def test_pickles_are_not_downloaded_beside_safetensors(
    microsoft: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (microsoft / "pytorch_model.bin").write_text("large")
    hub = Hub(microsoft, tmp_path / "snapshot")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    load_checkpoint("someone/florence")
    assert not (hub.snapshot / "pytorch_model.bin").exists()


def test_refused_before_the_weights_are_downloaded(
    microsoft: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make.edit_json(microsoft / "config.json", lambda config: config.update(architectures=["BartModel"]))
    hub = Hub(microsoft, tmp_path / "snapshot")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    refused("someone/florence", "not Florence-2")
    assert not (hub.snapshot / "model.safetensors").exists()


@pytest.mark.parametrize(
    "error",
    [
        huggingface_hub.errors.LocalEntryNotFoundError("offline,\nand not in the cache"),
        huggingface_hub.errors.HFValidationError("bad"),
        ConnectionError("no route"),
    ],
)
def test_hub_that_gives_nothing(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*args: object, **kwargs: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    refused("someone/florence", "someone/florence@v1", type(error).__name__, "HF_TOKEN", revision="v1")
