"""Exports that somebody broke, or made to do harm: a release is refused in one line that names the field, and a server
that reads one all the same refuses to load it."""

import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import exports
import florence2_cli as cli
import pytest
from florence2_release.export_check import check_settings
from florence2_release.install import install
from hostile import mutated, pipe, put
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from florence2.manifest import Manifest, ModelSettings

NAN = float("nan")
NO_SIZE: tuple[Any, ...] = (10**9, -1, 0, 16.0, True, "16", [16], {}, NAN, None, 10**400)
NO_TOKEN: tuple[Any, ...] = (10**9, -1, 2.0, True, "2", {}, NAN, 10)
BACKTRACKS = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}


@pytest.fixture
def export(tmp_path: Path) -> Path:
    return exports.write(tmp_path / "export")


def refused(export: Path, *words: str) -> None:
    exports.sign(export)
    with pytest.raises(ValueError, match=re.escape(words[-1])) as caught:
        install(export, export.parent / "repository")
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1000
    for word in words:
        assert word in message
    assert not (export.parent / "repository").exists()


def test_the_export_is_whole(export: Path, tmp_path: Path) -> None:
    assert install(export, tmp_path / "repository").number == 1


MANIFEST: dict[str, tuple[Any, ...]] = {
    **{f"sizes.{name}": NO_SIZE for name in exports.SIZES.__dataclass_fields__},
    "sizes": (None, [], "x", 5),
    "source": (None, 5, []),
    "files": (None, [], "x", {"a": 5}),
    "repairs": ("x", [5]),
    "banned_grounding_phrases": ("it", [5], {}, None),
    "tools": ([], {"torch": 5}),
    "opset": (0, "20"),
}


@pytest.mark.parametrize("name", MANIFEST)
def test_manifest(export: Path, name: str) -> None:
    whole = (export / "manifest.json").read_text()
    for value in MANIFEST[name]:
        put(export, "manifest.json", name, value)
        with pytest.raises(
            ValueError, match=rf"manifest.json can't be read \({name}[. ].*; export the checkpoint again"
        ):
            Manifest.read(export)
        with pytest.raises(ValueError, match=name):
            install(export, export.parent / "repository")
        (export / "manifest.json").write_text(whole)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("sizes.d_model", 16, "sizes.d_model is 16; its heads times head_dim are 8"),
        ("sizes.image_tokens", 32, "sizes.image_tokens is 32, which leaves no room"),
        ("sizes.image_height", 128, "preprocessor_config.json: size is {'height': 64, 'width': 64}"),
        ("sizes.location_bins", 1000, "tokenizer.json: added_tokens has 2 locations; the manifest has 1000"),
        ("sizes.vocab_size", 4, "tokenizer.json: added_tokens gives <loc_1> the id 4; give ids from 0 to 3"),
    ],
)
def test_sizes_that_contradict_the_rest(export: Path, name: str, value: Any, words: str) -> None:
    put(export, "manifest.json", name, value)
    refused(export, words)


GENERATION: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("bos_token_id", "pad_token_id", "decoder_start_token_id", "forced_bos_token_id"), NO_TOKEN),
    **dict.fromkeys(("eos_token_id", "forced_eos_token_id"), (*NO_TOKEN, [], [10])),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens"), (5, [10], [-1], [2.0], [None], "x")),
    **dict.fromkeys(("num_beams", "max_length"), tuple(value for value in NO_SIZE if value is not None)),
    "no_repeat_ngram_size": (10**9, -1, "3", 3.0, NAN),
    "length_penalty": (NAN, 1e9, "1", True),
    "early_stopping": (1, "always", []),
}
PREPROCESSOR: dict[str, tuple[Any, ...]] = {
    "size": (64, "x", [64, 64], {"shortest_edge": 64}, None),
    "size.height": (10**5, 10**9, 0, -1, 64.0, True, "64", None, NAN),
    "image_mean": (0.5, [0.5] * 2, [NAN] * 3),
    "image_std": ([0] * 3, [NAN] * 3),
    "resample": (99, -1, 3.0, "bicubic", None),
    "rescale_factor": (NAN, 0, "x"),
    "image_seq_length": (0, 10**9, "x"),
}
TOKENIZER: dict[str, tuple[Any, ...]] = {
    "model": (None, [], "x"),
    "model.type": ("Unigram", "WordPiece", 5),
    "model.vocab": ({}, [], None),
    "model.dropout": (0.5, NAN),
    "normalizer": ("NFC", BACKTRACKS),
    "pre_tokenizer": (BACKTRACKS, {"type": "Sequence", "pretokenizers": [BACKTRACKS]}),
    "decoder": ({"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""},),
    "padding": (exports.PADDING,),
    "truncation": ({"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 10},),
    "post_processor": ({"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}},),
}
FIELDS = {
    (file, name): values
    for file, table in (
        ("generation_config.json", GENERATION),
        ("preprocessor_config.json", PREPROCESSOR),
        ("tokenizer.json", TOKENIZER),
    )
    for name, values in table.items()
}


@pytest.mark.parametrize(("file", "name"), FIELDS)
def test_fields(export: Path, file: str, name: str) -> None:
    whole = (export / file).read_text()
    for value in FIELDS[file, name]:
        put(export, file, name, value)
        refused(export, file, name.split(".")[0] if file == "tokenizer.json" else name)
        (export / file).write_text(whole)


@pytest.mark.parametrize(
    "file", ["manifest.json", "generation_config.json", "preprocessor_config.json", "tokenizer.json"]
)
@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b"[" * 10**5, b'{"a":' * 40 + b"1" + b"}" * 40, None])
def test_json(export: Path, file: str, content: bytes | None) -> None:
    if content is None:
        with (export / file).open("wb") as large:
            large.truncate(500_000_000)
    else:
        (export / file).write_bytes(content)
    if file != "manifest.json":
        exports.sign(export)
    with pytest.raises(ValueError, match=rf"{file} (is not valid JSON|holds a list|is nested|has 500 MB)"):
        install(export, export.parent / "repository")


@pytest.mark.parametrize("file", ["manifest.json", "tokenizer.json", "decoder.onnx"])
def test_pipes_are_not_waited_for(export: Path, file: str) -> None:
    (export / file).unlink()
    with pipe(export / file), pytest.raises(ValueError, match=rf"{file} is not a regular file|lacks {file}"):
        install(export, export.parent / "repository")


def test_the_command_says_one_line(export: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    put(export, "tokenizer.json", "pre_tokenizer", BACKTRACKS)
    exports.sign(export)
    assert cli.main(["release", str(export), "--repository", str(tmp_path / "repository")]) == 1
    err = capfd.readouterr().err
    assert err.startswith(f"florence2: {export}/tokenizer.json: pre_tokenizer is of type 'Split'")
    assert err.count("\n") == 1


# What a server reads again


@pytest.mark.parametrize("name", [*(f"sizes.{name}" for name in exports.SIZES.__dataclass_fields__), "sizes"])
def test_settings_of_a_served_model(tmp_path: Path, name: str) -> None:
    settings = ModelSettings(exports.SIZES, ["it"])
    settings.write(tmp_path)
    assert ModelSettings.read(tmp_path) == settings
    for value in MANIFEST[name]:
        settings.write(tmp_path)
        put(tmp_path, settings.FILE_NAME, name, value)
        with pytest.raises(ValueError, match=rf"model_settings.json: {name}"):
            ModelSettings.read(tmp_path)
    settings.write(tmp_path)
    put(tmp_path, settings.FILE_NAME, "sizes.mine", 5)
    with pytest.raises(ValueError, match=r"model_settings\.json: 'mine' is unknown to this version"):
        ModelSettings.read(tmp_path)


@pytest.mark.parametrize("file", ["manifest.json", "generation_config.json", "preprocessor_config.json"])
@settings(
    max_examples=200,
    deadline=timedelta(seconds=60),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_any_value_anywhere_is_read_or_refused(export: Path, file: str, data: st.DataObject) -> None:
    whole = {name: (export / name).read_text() for name in (file, "manifest.json")}
    try:
        (export / file).write_text(data.draw(mutated(whole[file])))
        if file != "manifest.json":
            exports.sign(export)
        check_settings(export, Manifest.read(export))
    except ValueError as error:
        refusal = str(error)
    else:
        refusal = ""
    finally:
        for name, content in whole.items():
            (export / name).write_text(content)
    assert "\n" not in refusal
