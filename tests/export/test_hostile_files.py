"""Checkpoints whose files are none, or not what they seem: refused in one line that names the file.

Whoever hangs or fills the memory here fails by not ending."""

import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints as make
import exports
import florence2_cli as cli
import pytest
import torch
from florence2_export.checkpoint import CheckpointError, load_checkpoint
from florence2_export.source import open_source
from hostile import pipe, put, refused
from safetensors.torch import load_file
from torch import Tensor

SHARED = "language_model.model.shared.weight"
FC1 = "language_model.model.encoder.layers.0.fc1.weight"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make.write_microsoft(tmp_path_factory.mktemp("original") / "microsoft", make.random_model())


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return make.copy_of(original, tmp_path / "checkpoint")


JSON: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is not valid JSON"),
    "text": (b"hello", "is not valid JSON"),
    "latin-1": (b'{"a": "\xe9"}', "is not valid JSON"),
    "utf-16": ('{"a": 1}'.encode("utf-16"), "is not valid JSON"),
    "brackets": (b"[" * 100_000, "is not valid JSON"),
    "braces": (b'{"a":' * 100_000, "is not valid JSON"),
    "deep": (b'{"a":' * 40 + b"1" + b"}" * 40, "is nested more than 32 levels"),
    "digits": (b'{"a": ' + b"9" * 5000 + b"}", "is not valid JSON"),
    "list": (b"[]", "holds a list where an object is expected"),
    "null": (b"null", "holds a NoneType where an object is expected"),
}
SETTINGS = (
    *("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "added_tokens.json"),
)


@pytest.mark.parametrize("kind", JSON)
@pytest.mark.parametrize("file", SETTINGS)
def test_json(folder: Path, file: str, kind: str) -> None:
    content, words = JSON[kind]
    (folder / file).write_bytes(content)
    refused(folder, f"{file} {words}")


@pytest.mark.parametrize("file", [*SETTINGS, "vocab.json", "merges.txt", "model.safetensors.index.json"])
def test_half_a_gigabyte_where_kilobytes_are_expected(folder: Path, file: str) -> None:
    if file.startswith("model"):
        make.remove_weights(folder)
    if file in ("vocab.json", "merges.txt"):
        make.base_tokenizer().model.save(str(folder))
        (folder / "tokenizer.json").unlink()
    with (folder / file).open("wb") as large:
        large.truncate(500_000_000)
    refused(folder, file, "MB")


@pytest.mark.parametrize("file", [*SETTINGS, "model.safetensors"])
@pytest.mark.parametrize("kind", ["folder", "loop", "broken link", "device"])
def test_files_that_are_none(folder: Path, file: str, kind: str) -> None:
    (folder / file).unlink(missing_ok=True)
    if kind == "folder":
        (folder / file).mkdir()
    else:
        target = {"loop": folder / file, "broken link": folder / "nothing", "device": Path("/dev/zero")}[kind]
        (folder / file).symlink_to(target)
    refused(folder, f"{file} is not a regular file")


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "model.safetensors", "vocab.json"])
def test_pipes_are_not_waited_for(folder: Path, file: str) -> None:
    (folder / file).unlink(missing_ok=True)
    with pipe(folder / file):
        refused(folder, f"{file} is not a regular file")
        # Which an export asks first, where there is one already.
        with pytest.raises(CheckpointError, match=f"{file} is not a regular file"):
            open_source(str(folder)).sha256()


# Weights


def rewritten(folder: Path, **changes: Any) -> None:
    state = load_file(folder / "model.safetensors")
    make.write_safetensors(folder, state | changes)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_weights_that_are_no_numbers(folder: Path, value: float, dtype: torch.dtype) -> None:
    state = load_file(folder / "model.safetensors")
    state[FC1][3, 5] = value
    make.write_safetensors(folder, state | {FC1: state[FC1].to(dtype)})
    refused(folder, f"model.safetensors: {FC1} holds NaN or infinity")


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.int64])
def test_weights_of_other_kinds(folder: Path, dtype: torch.dtype) -> None:
    state = load_file(folder / "model.safetensors")
    make.write_safetensors(folder, state | {FC1: state[FC1].to(dtype)})
    refused(folder, f"model.safetensors: {FC1} is {dtype}", "float32")


HEADERS = {
    "no length": b"\0" * 7,
    "2 ** 63": struct.pack("<Q", 2**63) + b"{}",
    "longer than the file": struct.pack("<Q", 10**6) + b"{}",
    "brackets": struct.pack("<Q", 10**5) + b"[" * 10**5,
    "shape": struct.pack("<Q", 67) + b'{"a":{"dtype":"F32","shape":[4611686018427387904],"data_offsets":[0,0]}}'[:67],
}


@pytest.mark.parametrize("kind", HEADERS)
def test_safetensors_headers(folder: Path, kind: str) -> None:
    (folder / "model.safetensors").write_bytes(HEADERS[kind])
    refused(folder, "model.safetensors is damaged or cut short")


def test_names_of_tensors_are_told_in_one_short_line(folder: Path) -> None:
    rewritten(folder, **{"\n\x1b[31m" + "x" * 5000: torch.zeros(1)})
    refused(folder, "surplus tensor ??[31mxxx", "save without")


OUTSIDE = ("../../etc/passwd", "/etc/passwd", "..", "", "a/b", "\0", "\ud800", "x" * 5000)


@pytest.mark.parametrize("shard", [*OUTSIDE, 1, None, True, ["x"], {}, 1.5])
def test_shards_that_are_no_files_of_the_folder(folder: Path, shard: Any) -> None:
    make.write_sharded(folder, load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    make.edit_json(folder / "model.safetensors.index.json", lambda index: index["weight_map"].update({SHARED: shard}))
    if shard == "..":
        refused(folder, "checkpoint/.. is not a regular file")
    else:
        refused(
            folder, f"model.safetensors.index.json: weight_map['{SHARED}'] is", "no file of the checkpoint's folder"
        )


@pytest.mark.parametrize("weight_map", [None, [], "x", {}, 5, [SHARED]])
def test_weight_maps_that_are_none(folder: Path, weight_map: Any) -> None:
    make.remove_weights(folder)
    make.write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})
    refused(folder, "model.safetensors.index.json has no weight_map")


def saved(folder: Path, tensor: Tensor) -> None:
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state | {FC1: tensor}, folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(1).expand(10**6, 10**6),
        torch.zeros(24, 16).to_sparse(),
        torch.zeros(24, 16, device="meta"),
    ],
    ids=["expanded", "sparse", "meta"],
)
def test_pickled_tensors_that_are_no_arrays(folder: Path, tensor: Tensor) -> None:
    saved(folder, tensor)
    refused(folder, "pytorch_model.bin", "model.safetensors")


def test_packed_pickles(folder: Path) -> None:
    saved(folder, torch.zeros(24, 16))
    path = folder / "pytorch_model.bin"
    with zipfile.ZipFile(path) as stored:
        files = {name: stored.read(name) for name in stored.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in files.items():
            packed.writestr(name, content)
    refused(folder, "pytorch_model.bin is compressed")


# Tokenizers

BACKTRACKS = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
REPLACES = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10**5}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
NAMES_NOTHING = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<x>", "type_id": 0}}],
    "pair": [],
    "special_tokens": {},
}
REPEATS = NAMES_NOTHING | {"single": [{"Sequence": {"id": "A", "type_id": 0}}] * 10**5}


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("model", None, "model is missing"),
        ("model", [], "model is []"),
        *(("model.type", kind, f"model is of type '{kind}'") for kind in ("Unigram", "WordPiece", "WordLevel", "x")),
        ("model.type", 5, "model is of type 5"),
        *(("model.vocab", vocab, f"model.vocab is {vocab}") for vocab in ({}, [], None, 5)),
        *(
            ("model.vocab.xy", index, "for 'xy'; give a whole number")
            for index in (-1, 1.5, "1", True, None, 4 * 10**9)
        ),
        ("model.dropout", 0.5, "model.dropout is 0.5"),
        ("model.unk_token", "<nothing>", "model.unk_token is '<nothing>'"),
        ("model.continuing_subword_prefix", "##", "model.continuing_subword_prefix is '##'"),
        ("model.end_of_word_suffix", "</w>", "model.end_of_word_suffix is '</w>'"),
        ("model.merges", [["a", "nothing"]], "is damaged or no tokenizer"),
        ("model.merges", 5, "is damaged or no tokenizer"),
        ("added_tokens", {}, "added_tokens is {}"),
        ("added_tokens", [5], "added_tokens is [5]"),
        ("normalizer", REPLACES, "normalizer is of type 'Replace'"),
        ("normalizer", "NFC", "normalizer is 'NFC'"),
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA"}, "normalizer is of type 'Precompiled'"),
        ("normalizer", {"type": "Sequence", "normalizers": [REPLACES]}, "normalizer is of type 'Replace'"),
        ("normalizer", {"type": "Sequence", "normalizers": 5}, "normalizer.normalizers is 5"),
        ("pre_tokenizer", BACKTRACKS, "pre_tokenizer is of type 'Split'"),
        (
            "pre_tokenizer",
            {"type": "Sequence", "pretokenizers": [BYTES, BACKTRACKS]},
            "pre_tokenizer is of type 'Split'",
        ),
        (
            "pre_tokenizer",
            {"type": "Sequence", "pretokenizers": [{"type": "Sequence", "pretokenizers": [BYTES]}]},
            "pre_tokenizer holds a Sequence in a Sequence",
        ),
        ("pre_tokenizer", {"type": ["Split"]}, "pre_tokenizer is of type ['Split']"),
        ("pre_tokenizer", {"type": "FixedLength", "length": 0}, "pre_tokenizer is of type 'FixedLength'"),
        ("post_processor", NAMES_NOTHING, "post_processor.special_tokens lacks '<x>'"),
        ("post_processor", REPEATS, "post_processor.single is"),
        ("decoder", REPLACES, "decoder is of type 'Replace'"),
        ("version", "9.9", "is damaged or no tokenizer"),
    ],
)
def test_tokenizers(folder: Path, name: str, value: Any, words: str) -> None:
    put(folder, "tokenizer.json", name, value)
    refused(folder, "tokenizer.json", words)


def test_a_key_that_comes_twice_hides_no_pattern(folder: Path) -> None:
    """tokenizers takes the first that fits, Python the last."""
    put(folder, "tokenizer.json", "decoder", "here")
    text = (folder / "tokenizer.json").read_text()
    twice = json.dumps(REPLACES | {"content": "x"})[:-1] + ', "type": "Fuse"}'
    (folder / "tokenizer.json").write_text(text.replace('"here"', twice))
    refused(folder, "tokenizer.json: decoder is of type 'Replace'")


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["model"].pop("type"),
        lambda content: content.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [BYTES]}),
        lambda content: content.update(normalizer={"type": "NFC"}),
        lambda content: content.update(padding=exports.PADDING),
        lambda content: content.update(post_processor=None),
    ],
)
def test_tokenizers_that_do_no_harm(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    make.edit_json(folder / "tokenizer.json", change)
    assert load_checkpoint(str(folder)).tokenizer.encode("<loc_5> th").ids[:2] == [0, 309]


@pytest.mark.parametrize("vocabulary", ["[]", "{}", '{"<s>": -1}', '{"<s>": 4000000000}', '{"<s>": "x"}'])
def test_vocabularies_without_a_tokenizer(folder: Path, vocabulary: str) -> None:
    make.base_tokenizer().model.save(str(folder))
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(vocabulary)
    refused(folder, "vocab.json")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("added_tokens.json", {"<od>": float("inf")}),
        ("added_tokens.json", {"": 5}),
        ("added_tokens.json", {"<od>": True}),
        ("added_tokens.json", {"<od>": -1}),
        ("tokenizer_config.json", {"added_tokens_decoder": []}),
        ("tokenizer_config.json", {"added_tokens_decoder": [5]}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"5": "<od>"}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"5": {"content": 5}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"9" * 5000: {"content": "<od>"}}}),
    ],
)
def test_added_tokens(folder: Path, file: str, content: dict[str, Any]) -> None:
    make.write_json(folder / file, content)
    if content == {"added_tokens_decoder": []}:
        load_checkpoint(str(folder))
    else:
        refused(folder, file)


# The command


@pytest.mark.parametrize(
    ("file", "name", "value"),
    [
        ("config.json", "text_config.encoder_layers", 10**6),
        ("config.json", "vision_config.patch_stride", [0, 2, 2, 2]),
        ("generation_config.json", "suppress_tokens", [10**9]),
        ("preprocessor_config.json", "size.height", 10**5),
        ("tokenizer.json", "pre_tokenizer", BACKTRACKS),
    ],
)
def test_the_command_says_one_line(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], file: str, name: str, value: Any
) -> None:
    put(folder, file, name, value)
    assert cli.main(["export", str(folder), "--output", str(tmp_path / "export")]) == 1
    err = capfd.readouterr().err
    assert err.startswith(f"florence2: {folder / file}: {name} is ")
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
