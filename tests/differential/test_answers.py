"""Answers against transformers' post-processor, Microsoft's answers and their scores; texts against tokenizers."""

import json
import random
import re
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from florence2_export.checkpoint import Checkpoint, load_checkpoint
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import Florence2Processor
from transformers.convert_slow_tokenizer import bytes_to_unicode

from florence2.answers import AnswerParser, Decoded, Detokenizer
from florence2.tasks import TASKS, AnswerKind

# A busy machine is slow now and then.
untimed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

DEMO = ROOT / "demo" / "checkpoint"
MICROSOFT = ROOT.parent / "shared" / "fixtures" / "microsoft_layout"
ONE_TASK_PER_KIND = {task.answer: token for token, task in TASKS.items()}
SIZES = [(640, 480), (1000, 1000), (1223, 699)]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    torch.set_num_threads(1)


@cache
def oracle() -> Florence2Processor:
    return Florence2Processor.from_pretrained(str(DEMO))


@cache
def parser() -> AnswerParser:
    return AnswerParser(sorted(oracle().post_processor.banned_grounding_tokens))


@cache
def microsoft() -> tuple[Checkpoint, list[dict[str, Any]]]:
    if not MICROSOFT.is_dir():
        pytest.skip(f"{MICROSOFT} is not here: Microsoft's answers to compare with")
    return load_checkpoint(str(MICROSOFT / "checkpoint")), json.loads((MICROSOFT / "expected.json").read_text())


def spelled(text: str) -> Decoded:
    """As if every character were a token."""
    return Decoded(text, np.arange(len(text)))


def parsed(task: str, text: str, size: tuple[int, int] = (1000, 1000)) -> Any:
    return parser().parse(TASKS[task], spelled(text), np.zeros(len(text)), size)


def without_scores(answer: Any) -> Any:
    return {key: value for key, value in answer.items() if "scores" not in key} if isinstance(answer, dict) else answer


def in_ascii(label: str) -> str:
    return label.encode("ascii", "ignore").decode()


def numbers(value: Any) -> list[float]:
    return [number for part in value for number in numbers(part)] if isinstance(value, list) else [value]


def shape(value: Any) -> Any:
    return [shape(part) for part in value] if isinstance(value, list) else None


def is_hfs(task: str, text: str, size: tuple[int, int]) -> Any:
    """Our answer, after a comparison with HF's that allows the differences listed in answers.py and no other."""
    theirs = oracle().post_process_generation(text=text, task=task, image_size=size)[task]
    answer = parsed(task, text, size)
    if isinstance(theirs, str):
        assert answer == theirs
        return answer
    ours = without_scores(answer)
    assert ours.keys() == theirs.keys()
    # HF filters the labels of boxes only.
    filtered = {"bboxes_labels"} | ({"labels"} if "bboxes" in ours else set())
    for key, value in ours.items():
        if key.endswith("labels"):
            assert [in_ascii(label) if key in filtered else label for label in value] == theirs[key]
            continue
        assert shape(value) == shape(theirs[key])
        for mine, truncated in zip(numbers(value), numbers(theirs[key]), strict=True):
            # Theirs is truncated from float32.
            error = 1e-6 * (1 + mine)
            assert truncated - error <= mine < truncated + 1 + error
    for shapes, scores in (("bboxes", "scores"), ("quad_boxes", "scores"), ("polygons", "scores")):
        if shapes in answer:
            key = "polygons_scores" if shapes == "polygons" and "polygons_scores" in answer else scores
            assert answer[key] == [1.0] * len(answer[shapes])
    return answer


# Strings like a model's

LABELS = ["car", " door handle ", "the image", "The image", "it", "a", "I\tt", "a.b", "x > y", "1/2", "  "]
LABELS += ["Déjà vu", "日本語", "é"]
STRAY = [
    *("<", ">", "<loc_", "loc_5>", "<loc_x>", "<loc_-1>", "<loc_1000>", "<loc_1234>", "<loc_007>", "<loc_٣>"),
    *("<s>", "</s>", "<pad>", "<unk>", "<image>", "<sep>", "<poly>", "</poly>", "<and>", "<ground>", "<obj>"),
    *("<od>", "</od>", "<box>", "</box>", "<bbox>", "</bbox>", "<tag>", "<po<s>ly>", "<<pad>loc_1>"),
    *("\n", "a\nb", "\ncar", "car\n", "\r", " ", " ", "\u2028", "\ufffd", ""),
]


def locations(rng: random.Random, count: int) -> str:
    return "".join(f"<loc_{rng.randrange(1000)}>" for _ in range(count))


def polygons(rng: random.Random) -> str:
    return "<sep>".join(locations(rng, rng.choice([1, 2, 5, 6, 8])) for _ in range(rng.randint(1, 3)))


def instance(kind: AnswerKind, rng: random.Random) -> str:
    label = rng.choice(LABELS)
    if kind is AnswerKind.PURE_TEXT:
        return label
    if kind is AnswerKind.OCR:
        return label + locations(rng, 8)
    if kind is AnswerKind.BBOXES:
        return locations(rng, 4 * rng.randint(1, 3))
    boxes = kind in (AnswerKind.DESCRIPTION_WITH_BBOXES, AnswerKind.PHRASE_GROUNDING)
    if boxes or (kind is AnswerKind.DESCRIPTION_WITH_BBOXES_OR_POLYGONS and rng.random() < 0.5):
        return label + locations(rng, rng.choice([4, 4, 8, 13]))
    name = "" if kind is AnswerKind.POLYGONS else label
    if rng.random() < 0.4:
        return name + polygons(rng)
    return name + "".join(f"<poly>{polygons(rng)}</poly>" for _ in range(rng.randint(1, 3)))


def well_formed(kind: AnswerKind, rng: random.Random) -> str:
    return "</s><s>" + "".join(instance(kind, rng) for _ in range(rng.randint(0, 4))) + "</s>"


def mangled(kind: AnswerKind, rng: random.Random) -> str:
    pieces = re.findall(r"<\w+>|</\w+>|[^<]+|<", well_formed(kind, rng))
    for _ in range(rng.randint(1, 6)):
        place = rng.randrange(len(pieces) + 1)
        change = rng.random()
        if change < 0.5:
            pieces.insert(place, rng.choice(STRAY))
        elif change < 0.75:
            del pieces[place : place + rng.randint(1, 3)]
        else:
            pieces[place:place] = pieces[rng.randrange(len(pieces) + 1) :][:5]
    return "".join(pieces)


@pytest.mark.parametrize("kind", AnswerKind)
@pytest.mark.parametrize("write", [well_formed, mangled])
def test_answers_are_hfs(kind: AnswerKind, write: Any) -> None:
    rng = random.Random(f"{kind} {write.__name__}")
    filled = 0
    for _ in range(400):
        answer = is_hfs(ONE_TASK_PER_KIND[kind], write(kind, rng), rng.choice(SIZES))
        filled += any(answer.values()) if isinstance(answer, dict) else bool(answer)
    assert filled > 200


@pytest.mark.parametrize("kind", [kind for kind in AnswerKind if kind is not AnswerKind.PURE_TEXT])
def test_answers_of_another_kind_are_hfs(kind: AnswerKind) -> None:
    rng = random.Random(0)
    for other in AnswerKind:
        for _ in range(50):
            is_hfs(ONE_TASK_PER_KIND[kind], mangled(other, rng), (640, 480))


pieces = st.one_of(
    st.sampled_from(LABELS),
    st.sampled_from(STRAY),
    st.text(max_size=4),
    st.lists(st.integers(0, 1100).map("<loc_{}>".format), min_size=1, max_size=13).map("".join),
)


@settings(untimed, max_examples=300)
@given(st.sampled_from(sorted(TASKS)), st.lists(pieces, max_size=8).map("".join))
@example("<OPEN_VOCABULARY_DETECTION>", "car<po<s>ly><loc_1><loc_2><loc_3><loc_4></poly>")
@example("<REGION_TO_SEGMENTATION>", "<loc_1><loc_2><loc_3><loc_4><sep><loc_5>")
@example("<OD>", "a\nb<loc_1><loc_2><loc_3><loc_4>")
def test_any_string_is_parsed_as_hf_parses_it(task: str, text: str) -> None:
    is_hfs(task, text, (640, 480))


@pytest.mark.parametrize(
    ("task", "text", "wanted"),
    [
        (
            "<OD>",
            "</s><s>car<loc_53><loc_333><loc_933><loc_774>wheel<loc_709><loc_576><loc_865><loc_772>"
            "<loc_150><loc_584><loc_309><loc_773></s>",
            {
                "bboxes": [
                    [34.24, 160.08, 597.44, 371.76],
                    [454.08, 276.72, 553.92, 370.8],
                    [96.32, 280.56, 198.08, 371.28],
                ],
                "labels": ["car", "wheel", "wheel"],
            },
        ),
        (
            "<OCR_WITH_REGION>",
            "</s><s>STOP<loc_0><loc_0><loc_999><loc_0><loc_999><loc_999><loc_0><loc_999></s>",
            {"quad_boxes": [[0.32, 0.24, 639.68, 0.24, 639.68, 479.76, 0.32, 479.76]], "labels": ["STOP"]},
        ),
        (
            "<CAPTION_TO_PHRASE_GROUNDING>",
            "the image<loc_1><loc_2><loc_3><loc_4>a car<loc_1><loc_2><loc_3><loc_4><loc_1000>",
            {"bboxes": [[0.96, 1.2, 2.24, 2.16]], "labels": ["a car"]},
        ),
        (
            "<REGION_TO_SEGMENTATION>",
            "<poly><loc_0><loc_0><loc_1><loc_1><loc_2><sep><loc_3><loc_3></poly><poly><loc_4><loc_4></poly>",
            {"polygons": [[[0.32, 0.24, 0.96, 0.72], [2.24, 1.68]], [[2.88, 2.16]]], "labels": ["", ""]},
        ),
        ("<REGION_TO_SEGMENTATION>", "<poly><loc_1></poly><sep><sep>", {"polygons": [[[]]], "labels": [""]}),
        (
            "<OPEN_VOCABULARY_DETECTION>",
            "é car<loc_0><loc_0><loc_1><loc_1000>",
            {
                "bboxes": [[0.32, 0.24, 0.96, 480.24]],
                "bboxes_labels": ["é car"],
                "polygons": [],
                "polygons_labels": [],
            },
        ),
        ("<OD>", "</s><s></s>", {"bboxes": [], "labels": []}),
        ("<CAPTION>", "</s><s> a car. </s>", "a car."),
        ("<CAPTION>", "<s><loc_1><pad>", "<loc_1><pad>"),
    ],
)
def test_answers_by_hand(task: str, text: str, wanted: Any) -> None:
    answer = without_scores(parsed(task, text, (640, 480)))
    if isinstance(wanted, str):
        assert answer == wanted
        return
    assert answer.keys() == wanted.keys()
    for key, value in wanted.items():
        if key.endswith("labels"):
            assert answer[key] == value
        else:
            assert shape(answer[key]) == shape(value)
            assert numbers(answer[key]) == pytest.approx(numbers(value))


def test_other_prompts_have_texts() -> None:
    text = "</s><s>42<loc_1><loc_2><loc_3><loc_4></s>"
    answer = parser().parse(None, spelled(text), np.zeros(len(text)), (10, 10))
    theirs = oracle().post_process_generation(text=text, task="<DocVQA>what?", image_size=(10, 10))
    assert answer == theirs["<DocVQA>what?"] == "42<loc_1><loc_2><loc_3><loc_4>"


def test_without_a_list_no_phrase_is_banned() -> None:
    text = "the image<loc_1><loc_2><loc_3><loc_4>"
    task = TASKS["<CAPTION_TO_PHRASE_GROUNDING>"]
    assert AnswerParser().parse(task, spelled(text), np.zeros(len(text)), (10, 10))["labels"] == ["the image"]
    banned = AnswerParser(["the image"])
    assert banned.parse(task, spelled(text), np.zeros(len(text)), (10, 10))["labels"] == []


def test_bins_are_the_checkpoints() -> None:
    text = "a<loc_0><loc_9><loc_5><loc_5>"
    answer = AnswerParser(location_bins=10).parse(TASKS["<OD>"], spelled(text), np.zeros(len(text)), (10, 20))
    assert answer["bboxes"] == [[0.5, 19.0, 5.5, 11.0]]


# Texts


@cache
def byte_level(name: str) -> Tokenizer:
    if name == "Microsoft's fixture":
        return microsoft()[0].tokenizer
    if name == "demo":
        return Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    # Tokens that no byte-level BPE writes: outside the alphabet, and added ones inside it.
    tokenizer = Tokenizer(models.BPE({"a": 0, "日": 1, "Ġb": 2, "é": 3, "a b": 4}, []))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken("日本"), AddedToken("Ġx"), AddedToken("ü"), AddedToken("c d")])
    return tokenizer


TOKENIZERS = ["demo", "Microsoft's fixture", "odd"]


def decodes(name: str, ids: list[int]) -> Decoded:
    tokenizer = byte_level(name)
    decoded = detokenizer(name)(ids)
    assert decoded.text == tokenizer.decode(ids, skip_special_tokens=False)
    assert decoded.tokens.shape == (len(decoded.text),)
    assert (np.diff(decoded.tokens) >= 0).all()
    assert all(0 <= token < len(ids) for token in decoded.tokens)
    return decoded


@cache
def detokenizer(name: str) -> Detokenizer:
    return Detokenizer(byte_level(name))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_texts_are_tokenizers(name: str) -> None:
    tokenizer = byte_level(name)
    rng = random.Random(0)
    every = list(range(tokenizer.get_vocab_size() + 20))
    # Parts of characters, and what stands beside them.
    vocabulary = tokenizer.get_vocab()
    parts = [index for token, index in vocabulary.items() if len(token) == 1 and not token.isascii()]
    special = [index for token, index in vocabulary.items() if token.startswith("<")]
    for _ in range(1000):
        pool = rng.choice([every, parts, parts + special[-20:], special + every]) or every
        decodes(name, rng.choices(pool, k=rng.randint(0, 30)))


@untimed
@given(st.binary(max_size=30) | st.text().map(str.encode))
def test_any_bytes_become_the_text_that_tokenizers_makes_of_them(data: bytes) -> None:
    tokenizer = byte_level("demo")
    alphabet = bytes_to_unicode()
    decoded = decodes("demo", [tokenizer.token_to_id(alphabet[byte]) for byte in data])
    assert decoded.text == data.decode(errors="replace")


def test_ids_beyond_the_vocabulary_are_nothing() -> None:
    tokenizer = byte_level("demo")
    ids = [tokenizer.token_to_id("<loc_1>"), 10**6, tokenizer.token_to_id("<loc_2>"), 10**6]
    decoded = decodes("demo", ids)
    assert decoded.text == "<loc_1><loc_2>"
    assert set(decoded.tokens) == {0, 2}


def test_no_tokens_are_no_text() -> None:
    decoded = decodes("demo", [])
    assert (decoded.text, decoded.tokens.tolist()) == ("", [])
    assert parser().parse(TASKS["<OD>"], decoded, [], (10, 10)) == {"bboxes": [], "labels": [], "scores": []}


def test_a_character_of_several_tokens_is_the_last_ones() -> None:
    tokenizer = byte_level("demo")
    ids = tokenizer.encode("a😀", add_special_tokens=False).ids
    decoded = decodes("demo", [*ids, tokenizer.token_to_id("<loc_7>")])
    assert decoded.text == "a😀<loc_7>"
    assert decoded.tokens.tolist() == [0, len(ids) - 1] + [len(ids)] * 7
    half = decodes("demo", [*ids[:-1], tokenizer.token_to_id("<loc_7>")])
    assert half.text == "a\ufffd<loc_7>"


@untimed
@given(st.text("<s>/lo", max_size=30), st.sampled_from(["<s>", "</s>", "oo", "sls"]))
def test_what_is_taken_out_takes_its_tokens_along(text: str, literal: str) -> None:
    decoded = spelled(text).without(literal)
    assert decoded.text == text.replace(literal, "")
    assert [text[token] for token in decoded.tokens] == list(decoded.text)


# Scores


def scored(task: str, tokens: list[tuple[str, float]]) -> Any:
    """Of a text given as its tokens with their probabilities."""
    text = "".join(token for token, _ in tokens)
    owners = [index for index, (token, _) in enumerate(tokens) for _ in token]
    logprobs = np.log([probability for _, probability in tokens])
    return parser().parse(TASKS[task], Decoded(text, np.array(owners)), logprobs, (1000, 1000))


def spots(*probabilities: float) -> list[tuple[str, float]]:
    return [(f"<loc_{place}>", probability) for place, probability in enumerate(probabilities)]


@pytest.mark.parametrize(
    ("task", "tokens", "scores"),
    [
        ("<OD>", [("car", 0.1), *spots(0.5, 0.5, 0.5, 0.5)], [0.5]),
        ("<OD>", [("</s>", 0.1), ("<s>", 0.1), ("car", 0.1), *spots(0.4, 0.1, 0.1, 0.4), ("</s>", 0.1)], [0.2]),
        (
            "<OD>",
            [("car", 0.1), *spots(*[0.5] * 4, *[0.25] * 4, 0.01), ("cat", 0.1), *spots(*[1.0] * 4)],
            [0.5, 0.25, 1],
        ),
        ("<OD>", [("<", 0.9), ("loc", 0.9), ("stray ", 0.3), ("car", 0.1), *spots(0.5, 0.5, 0.5, 0.5)], [0.5]),
        ("<REGION_PROPOSAL>", spots(*[0.5] * 4, *[0.25] * 4), [0.5, 0.25]),
        ("<OCR_WITH_REGION>", [("STOP", 0.1), *spots(*[0.4] * 4, *[0.1] * 4)], [0.2]),
        ("<CAPTION_TO_PHRASE_GROUNDING>", [("a", 0.9), *spots(*[0.9] * 4), ("a cat", 0.1), *spots(*[0.5] * 4)], [0.5]),
        (
            "<REGION_TO_SEGMENTATION>",
            [("<poly>", 0.1), *spots(0.4, 0.4), ("<sep>", 0.1), *spots(0.1, 0.1), ("</poly>", 0.1)],
            [0.2],
        ),
    ],
)
def test_scores_are_of_the_location_tokens(task: str, tokens: list[tuple[str, float]], scores: list[float]) -> None:
    assert scored(task, tokens)["scores"] == pytest.approx(scores)


def test_open_vocabulary_scores_stand_beside_their_shapes() -> None:
    boxes = scored("<OPEN_VOCABULARY_DETECTION>", [("car", 0.1), *spots(*[0.5] * 4)])
    assert (boxes["scores"], boxes["polygons_scores"]) == (pytest.approx([0.5]), [])
    shapes = [("car", 0.1), ("<poly>", 0.1), *spots(*[0.25] * 6), ("</poly>", 0.1)]
    outlines = scored("<OPEN_VOCABULARY_DETECTION>", shapes)
    assert (outlines["scores"], outlines["polygons_scores"]) == ([], pytest.approx([0.25]))


# Microsoft's own answers


def ours(case: dict[str, Any]) -> Any:
    checkpoint, _ = microsoft()
    decoded = Detokenizer(checkpoint.tokenizer)(case["beam3_ids"])
    assert decoded.text == case["beam3_text"]
    logprobs = [0.0, *case["beam3_transition_scores"]]
    answer = AnswerParser(checkpoint.banned_grounding_phrases).parse(
        TASKS[case["task"]], decoded, logprobs, tuple(case["image_size"])
    )
    json.dumps(answer, allow_nan=False)
    return answer


def test_answers_are_microsofts() -> None:
    _, expected = microsoft()
    assert len(expected) == 24
    for case in expected:
        answer, wanted = ours(case), case["answer_with_scores"][case["task"]]
        if isinstance(wanted, str):
            assert answer == wanted
            continue
        for key in wanted.keys() - {"scores"}:
            if key.endswith("labels"):
                assert [in_ascii(label) for label in answer[key]] == wanted[key]
            else:
                assert shape(answer[key]) == shape(wanted[key])
                assert numbers(answer[key]) == pytest.approx(numbers(wanted[key]), abs=1e-3)


def microsofts_walk(case: dict[str, Any]) -> tuple[list[float], list[bool]]:
    """Scores as Microsoft's processing_florence2.py finds them, and whether text was skipped before each."""
    checkpoint, _ = microsoft()
    pieces = [checkpoint.tokenizer.decode([index], skip_special_tokens=False) for index in case["beam3_ids"][1:]]
    ends = np.cumsum([len(piece) for piece in pieces])
    spans = list(zip([0, *ends[:-1]], ends, strict=True))
    text = "".join(pieces)
    position = lead = 3 if text.startswith("<s>") else 0
    text = text.replace("<s>", "").replace("</s>", "").replace("<pad>", "")
    scores, skipped = [], []
    for phrase in re.finditer(r"([^<]+(?:<loc_\d+>){4,})", text):
        true = phrase.start() + lead
        for box in re.finditer(r"<loc_\d+>" * 4, phrase.group()):
            start, end = box.start() + position, box.end() + position
            owners = [index for index, (first, last) in enumerate(spans) if not (last <= start or first >= end)]
            scores.append(float(np.exp(np.mean([case["beam3_transition_scores"][index] for index in owners]))))
            skipped.append(position != true)
        position += len(phrase.group())
    return scores, skipped


def test_scores_are_microsofts_where_no_text_was_skipped() -> None:
    _, expected = microsoft()
    same, others = 0, 0
    for case in expected:
        if case["task"] not in ("<OD>", "<DENSE_REGION_CAPTION>"):
            continue
        answer, wanted = ours(case)["scores"], case["answer_with_scores"][case["task"]].get("scores", [])
        walked, skipped = microsofts_walk(case)
        assert walked == pytest.approx(wanted, abs=1e-5)
        for mine, theirs, after_a_gap in zip(answer, wanted, skipped, strict=True):
            if after_a_gap:
                others += 1
            else:
                assert mine == pytest.approx(theirs, abs=1e-5)
                same += 1
    assert same
    assert others


def test_a_location_that_no_number_holds() -> None:
    """The model's own tokens for locations are short; its letters can spell anything."""
    text = "car" + "<loc_1>" * 3 + "<loc_" + "9" * 301 + ">"
    with pytest.raises(OverflowError, match="a location of 301 digits"):
        parser().parse(TASKS["<OD>"], spelled(text), np.zeros(len(text)), (10, 10))
