"""Prompts against transformers' `Florence2Processor` and Microsoft's ids, and what is refused with which words."""

import json
from functools import cache
from typing import Any

import pytest
import torch
from conftest import ROOT
from florence2_export.checkpoint import Checkpoint, load_checkpoint
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer
from transformers import Florence2Processor

from florence2.errors import InvalidRequest
from florence2.manifest import Sizes
from florence2.prompts import PromptEncoder, parse, read_prompt
from florence2.tasks import TASKS, Takes

# A busy machine is slow now and then.
untimed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

DEMO = ROOT / "demo" / "checkpoint"
MICROSOFT = ROOT.parent / "shared" / "fixtures" / "microsoft_layout"
REGION = "<loc_52><loc_333><loc_932><loc_774>"
TEXTS = ["a green car", " cars, trees ", "a{b}c {input} %s", "5 < 6 > 4", "<b>bold</b>", "日本語 é 😀", "a\nb", "what?"]
FREE = [
    *TEXTS,
    "<DocVQA>what?",
    "<VQA>",
    "<VQA> what is this?",
    "<OCX>",
    "<OC>",
    "<OOD>",
    "<OD",
    "OD>",
    "< OD >",
    "OD",
    "<>",
    "<CAPTION_OF_A_KIND>",
    "<loc_1><loc_2>",
    "<loc_12>what is here?",
    "<poly>",
    "what does <b>CAPTIO</b> mean?",
    "see <CAPTIONS>",
]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    torch.set_num_threads(1)


@cache
def oracle() -> Florence2Processor:
    return Florence2Processor.from_pretrained(str(DEMO))


def sizes(**changes: int) -> Sizes:
    demo = {
        "image_height": 96,
        "image_width": 96,
        "image_tokens": oracle().num_image_tokens,
        "d_model": 8,
        "vocab_size": json.loads((DEMO / "config.json").read_text())["text_config"]["vocab_size"],
        "decoder_layers": 1,
        "decoder_attention_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "location_bins": 1000,
    }
    return Sizes(**{**demo, **changes})


@cache
def demo_tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(DEMO / "tokenizer.json"))


@cache
def encoder() -> PromptEncoder:
    return PromptEncoder(demo_tokenizer(), sizes())


def with_text(token: str) -> list[str]:
    texts = {Takes.NOTHING: [], Takes.TEXT: TEXTS, Takes.REGION: [REGION, f" {REGION}{REGION} "]}[TASKS[token].takes]
    return [token + text for text in texts] or [token]


ALL_TASKS = [prompt for token in TASKS for prompt in with_text(token)]


# As HF reads them


def test_the_table_is_hfs() -> None:
    theirs = oracle().task_prompts_without_inputs | oracle().task_prompts_with_input
    assert {token: task.prompt for token, task in TASKS.items()} == theirs
    assert {token for token, task in TASKS.items() if task.takes is Takes.NOTHING} == set(
        oracle().task_prompts_without_inputs
    )
    kinds = {token: task.answer.value for token, task in TASKS.items()}
    assert kinds == oracle().tasks_answer_post_processing_type
    assert len(TASKS) == 15


@pytest.mark.parametrize("prompt", [*ALL_TASKS, *FREE])
def test_text_is_hfs(prompt: str) -> None:
    assert [parse(prompt).text] == oracle()._construct_prompts(prompt)


@untimed
@given(st.text(min_size=1), st.sampled_from([token for token, task in TASKS.items() if task.takes is Takes.TEXT]))
def test_any_text_after_a_task_is_hfs(text: str, token: str) -> None:
    assume(text.strip())
    assert [parse(token + text).text] == oracle()._construct_prompts(token + text)


@pytest.mark.parametrize("prompt", [*ALL_TASKS, *FREE])
def test_ids_are_hfs(prompt: str) -> None:
    ids = oracle()(text=prompt, images=Image.new("RGB", (8, 8)))["input_ids"][0]
    assert encoder().encode(prompt).tolist() == ids[oracle().num_image_tokens :]


@pytest.mark.parametrize("prompt", ["<s>", "a</s>b", "<pad>", "<mask> x", "a <mask>", "\x00", "\u200b"])
def test_ids_of_odd_texts_are_hfs(prompt: str) -> None:
    ids = oracle()(text=prompt, images=Image.new("RGB", (8, 8)))["input_ids"][0]
    assert encoder().encode(prompt).tolist() == ids[oracle().num_image_tokens :]


@cache
def microsoft() -> tuple[Checkpoint, list[dict[str, Any]]]:
    if not MICROSOFT.is_dir():
        pytest.skip(f"{MICROSOFT} is not here: Microsoft's answers to compare with")
    return load_checkpoint(str(MICROSOFT / "checkpoint")), json.loads((MICROSOFT / "expected.json").read_text())


def test_ids_are_microsofts() -> None:
    checkpoint, expected = microsoft()
    vocab_size = checkpoint.model.config.text_config.vocab_size
    encode = PromptEncoder(checkpoint.tokenizer, sizes(vocab_size=vocab_size)).encode
    assert len(expected) == 24
    for case in expected:
        assert encode(case["task"] + case["text"]).tolist() == case["prompt_ids"]


def test_the_key_is_the_task_or_the_prompt() -> None:
    assert parse("<CAPTION_TO_PHRASE_GROUNDING>a car").key == "<CAPTION_TO_PHRASE_GROUNDING>"
    assert parse(" <OD> ").key == "<OD>"
    assert parse("<DocVQA> what?").key == "<DocVQA> what?"
    assert parse("<DocVQA> what?").task is None
    assert parse("<OD>").task is TASKS["<OD>"]


# Refused


def is_refused(prompt: str, match: str) -> None:
    with pytest.raises(InvalidRequest, match=match):
        parse(prompt)


@pytest.mark.parametrize("prompt", ["", " ", "\n\t"])
def test_nothing_is_refused(prompt: str) -> None:
    is_refused(prompt, "empty")


@pytest.mark.parametrize("token", [token for token, task in TASKS.items() if task.takes is Takes.NOTHING])
@pytest.mark.parametrize("prompt", ["{}a car", "see {}", "{}{}<CAPTION_TO_PHRASE_GROUNDING>", "{}." + "long" * 100])
def test_text_that_is_not_taken_is_refused(token: str, prompt: str) -> None:
    with pytest.raises(ValueError, match="only content"):
        oracle()._construct_prompts(prompt.format(token, token))
    is_refused(prompt.format(token, token), f"{token} takes no text; send {token} alone")


@pytest.mark.parametrize("token", [token for token, task in TASKS.items() if task.takes is Takes.TEXT])
@pytest.mark.parametrize("rest", ["", "  ", "\n"])
def test_missing_text_is_refused(token: str, rest: str) -> None:
    is_refused(token + rest, f"{token} needs text after it, such as {token}a green car")


@pytest.mark.parametrize("token", [token for token, task in TASKS.items() if task.takes is Takes.REGION])
@pytest.mark.parametrize(
    "region",
    [
        "",
        "a car",
        "<loc_1>",
        "<loc_1><loc_2><loc_3>",
        "<loc_1><loc_2><loc_3><loc_4><loc_5>",
        "<loc_1><loc_2><loc_3><loc_1000>",
        "<loc_1><loc_2><loc_3><loc_99999999999>",
        "<loc_1><loc_2><loc_3><loc_" + "9" * 5000 + ">",
        "<loc_1><loc_2><loc_3><loc_-4>",
        "<loc_1><loc_2><loc_3><loc_4.5>",
        "<loc_1><loc_2><loc_3><loc_04>",
        "<loc_1><loc_2><loc_3><loc_٣>",
        "<loc_1>,<loc_2>,<loc_3>,<loc_4>",
        "[1, 2, 3, 4]",
        REGION + "a car",
    ],
)
def test_what_is_no_region_is_refused(token: str, region: str) -> None:
    is_refused(token + region, f"{token} needs a region after it.*from 0 to 999")


def test_a_polygon_is_a_region() -> None:
    corners = "".join(f"<loc_{i}>" for i in range(10))
    assert parse("<REGION_TO_CATEGORY>" + corners).text == f"What is the region {corners}?"


def test_bins_are_the_checkpoints() -> None:
    text = "<REGION_TO_OCR><loc_0><loc_0><loc_99><loc_99>"
    assert parse(text, location_bins=100).text
    with pytest.raises(InvalidRequest, match="from 0 to 98"):
        parse(text, location_bins=99)


@pytest.mark.parametrize("token", TASKS)
@pytest.mark.parametrize("after", ["", " a car"])
def test_other_case_is_refused_by_name(token: str, after: str) -> None:
    for written in (token.lower(), token.title(), " " + token.swapcase()):
        is_refused(written + after, f"did you mean {token}\\?")


LONG_TASKS = [token for token in TASKS if len(token) >= 8]


@pytest.mark.parametrize("token", LONG_TASKS)
def test_one_letter_off_is_refused_by_name(token: str) -> None:
    name = token.strip("<>")
    for place in range(len(name)):
        left_out = name[:place] + name[place + 1 :]
        added = name[:place] + "Q" + name[place:]
        replaced = name[:place] + "Q" + name[place + 1 :]
        for wrong in (left_out, added, replaced, replaced.lower()):
            is_refused(f"<{wrong}>", f"unknown task <{wrong}>; did you mean {token}\\?")
    is_refused(f"<{name}S>", f"did you mean {token}\\?")
    for place in range(len(name) - 1):
        swapped = name[:place] + name[place + 1] + name[place] + name[place + 2 :]
        if swapped != name:
            is_refused(f"<{swapped}>", f"unknown task <{swapped}>; did you mean {token}\\?")


@pytest.mark.parametrize("token", LONG_TASKS)
def test_two_letters_off_is_another_task(token: str) -> None:
    name = token.strip("<>")
    for wrong in (f"QQ{name}", f"{name}QQ", f"Q{name}Q", f"Q{name[1:-1]}Q", name[1:-1], name[1:] + name[0]):
        assert parse(f"<{wrong}>").task is None


@pytest.mark.parametrize("prompt", FREE)
def test_other_text_is_passed_as_it_stands(prompt: str) -> None:
    assert parse(prompt).text == parse(prompt).key == prompt


def test_a_prompt_at_the_limit_passes() -> None:
    room = 20
    encoder = PromptEncoder(demo_tokenizer(), sizes(image_tokens=100, max_position_embeddings=100 + room))
    word, tokens = "", 0
    while tokens < room:
        word += "<sep>"
        tokens = len(encoder.encode(word))
    assert tokens == room
    with pytest.raises(InvalidRequest, match="21 tokens; this model takes 20 beside its 100 image tokens; shorten"):
        encoder.encode(word + "<sep>")


def test_the_image_token_is_refused() -> None:
    """HF refuses it too; its features would be missing."""
    with pytest.raises(ValueError, match="image"):
        oracle()(text="an <image> here", images=Image.new("RGB", (8, 8)))
    with pytest.raises(InvalidRequest, match="holds <image>; leave it out"):
        encoder().encode("an <image> here")


def test_tokens_without_a_row_are_refused() -> None:
    last = PromptEncoder(demo_tokenizer(), sizes(vocab_size=demo_tokenizer().token_to_id("<loc_999>")))
    assert last.encode("<loc_998>").tolist()
    with pytest.raises(InvalidRequest, match="holds <loc_999>"):
        last.encode("<loc_999>")


@untimed
@given(st.text())
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        ids = encoder().encode(text)
    except InvalidRequest:
        return
    assert ids[0] == 0
    assert ids[-1] == 2


def test_a_prompt_is_bounded_in_bytes_before_it_is_looked_into() -> None:
    assert read_prompt("ü".encode() * 80, 10) == "ü" * 80
    for long in (b"a" * 161, b"\xff" * 6_000_000):
        with pytest.raises(InvalidRequest, match=f"has {len(long)} bytes; this model takes at most 160; shorten it"):
            read_prompt(long, 10)
    with pytest.raises(InvalidRequest, match="is not UTF-8"):
        read_prompt(b"caf\xe9", 10)
