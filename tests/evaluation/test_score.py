"""Metrics against values worked out by hand, and against the libraries called in another way."""

import contextlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from florence2_data.record import Example
from florence2_evaluation import captions, detection, vqa
from florence2_evaluation import score as scores_of
from florence2_evaluation.group import groups
from florence2_evaluation.prediction import Prediction, read_predictions, write_predictions
from florence2_evaluation.question import questions
from florence2_evaluation.score import METRICS, notes, score, score_group
from pycocoevalcap.cider.cider import Cider
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from florence2.prompts import parse

SIZE = (1000, 1000)
"""A pixel is a bin."""
HAS_JAVA = captions.has_ptb_tokenizer()


def boxes(*rows: tuple[str, Sequence[int]]) -> str:
    """As the model writes them."""
    return "".join(label + "".join(f"<loc_{number}>" for number in box) for label, box in rows)


def answered(prompt: str, reference: str | list[str], value: Any, text: str = "", size: Any = SIZE) -> Prediction:
    references = [reference] if isinstance(reference, str) else reference
    return Prediction("a.png", size, prompt, references, text, {parse(prompt).key: value})


def detected(
    reference: str, *rows: tuple[str, Sequence[float]], scores: Sequence[float] = (), prompt: str = "<OD>"
) -> Prediction:
    """The centre of the bins is where a box lies: + 0.5."""
    value = {
        "bboxes": [[number + 0.5 for number in box] for _, box in rows],
        "labels": [label for label, _ in rows],
        "scores": list(scores) or [0.9] * len(rows),
    }
    return answered(prompt, reference, value)


def values(predictions: list[Prediction], **options: Any) -> dict[str, float]:
    """By metric, of one task; COCO's precision of 1 is a little less."""
    scores = score(predictions, **options)
    assert len({one.task for one in scores}) <= 1
    return {one.metric: round(one.value, 9) for one in scores}


A, B = (100, 100, 300, 300), (500, 500, 700, 700)
TWO = boxes(("car", A), ("dog", B))


def test_a_perfect_detection() -> None:
    found = values([detected(TWO, ("car", A), ("dog", B))])
    assert found == {
        "AP": 1,
        "AP50": 1,
        "AP75": 1,
        "precision@0.5": 1,
        "recall@0.5": 1,
        "F1@0.5": 1,
        "page_exact@0.5": 1,
        "unknown_labels": 0,
        "AP50[car]": 1,
        "AP50[dog]": 1,
    }


def test_nothing_found_where_something_is_wanted() -> None:
    found = values([detected(TWO)])
    assert found == dict.fromkeys(
        ["AP", "AP50", "AP75", "precision@0.5", "recall@0.5", "F1@0.5", "page_exact@0.5", "AP50[car]", "AP50[dog]"], 0
    )


def test_one_label_has_a_score_of_its_own() -> None:
    assert values([detected(boxes(("car", A)), ("car", A))])["AP50[car]"] == 1


def test_too_many_labels_have_no_ap_and_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detection, "MOST_LABELS", 1)
    monkeypatch.setattr(scores_of, "MOST_LABELS", 1)
    by_task = groups([detected(TWO, ("car", A), ("dog", B))], 0.5)
    scores = score_group(by_task[0])
    assert {one.metric: one.value for one in scores} == {
        "precision@0.5": 1,
        "recall@0.5": 1,
        "F1@0.5": 1,
        "page_exact@0.5": 1,
        "unknown_labels": 0,
    }
    assert notes(by_task, scores) == ["<OD>: 2 labels, AP is for at most 1"]
    monkeypatch.undo()
    assert notes(by_task, scores) == []
    assert detection.MOST_LABELS == 1000


def test_a_box_within_one_bin_can_be_found() -> None:
    # 640 x 480: bins of 0.64 x 0.48 pixels. The answer is at the bins' centres, as the model writes it.
    wanted = boxes(("line", (100, 200, 100, 400)), ("dot", (5, 5, 5, 5)))
    centre = [number * side for number, side in zip((100.5, 200.5, 100.5, 400.5), (0.64, 0.48) * 2, strict=True)]
    dot = [5.5 * 0.64, 5.5 * 0.48] * 2
    value = {"bboxes": [centre, dot], "labels": ["line", "dot"], "scores": [0.5] * 2}
    found = values([answered("<OD>", wanted, value, size=(640, 480))])
    assert (found["AP"], found["recall@0.5"], found["page_exact@0.5"]) == (1, 1, 1)
    beside = {"bboxes": [[edge + 0.64 * (at % 2 == 0) for at, edge in enumerate(dot)]], "labels": ["dot"]}
    assert values([answered("<OD>", wanted, beside | {"scores": [0.5]}, size=(640, 480))])["recall@0.5"] == 0


def test_nothing_wanted() -> None:
    assert values([detected("")]) == {"page_exact@0.5": 1}
    assert values([detected("", ("car", A))]) == {
        "precision@0.5": 0,
        "F1@0.5": 0,
        "page_exact@0.5": 0,
        "unknown_labels": 1,
    }


def test_a_box_answers_once() -> None:
    found = values([detected(TWO, ("car", A), ("car", A), ("dog", B))])
    assert found["precision@0.5"] == pytest.approx(2 / 3)
    assert found["recall@0.5"] == 1
    assert found["F1@0.5"] == pytest.approx(0.8)
    assert found["page_exact@0.5"] == 0


def test_a_label_must_be_equal() -> None:
    found = values([detected(TWO, ("Car", A), ("dog", B))])
    assert found["recall@0.5"] == 0.5
    assert found["unknown_labels"] == 0.5
    assert found["AP50"] == 0.5


@pytest.mark.parametrize(("scores", "right"), [((0.1, 0.9), 1), ((0.9, 0.1), 2)])
def test_the_surer_box_chooses_first_and_the_best_there_is(scores: tuple[float, float], right: int) -> None:
    # `other` overlaps the first car only; the exact box overlaps both, the first more. Choosing first it leaves `other`
    # nothing; choosing second it still has the second car.
    wanted = boxes(("car", A), ("car", (100, 160, 300, 360)))
    other = (100, 80, 300, 280)
    found = values([detected(wanted, ("car", other), ("car", A), scores=scores)])
    assert found["recall@0.5"] == right / 2


@pytest.mark.parametrize(("scores", "ap"), [((0.9, 0.1), 1.0), ((0.1, 0.9), 0.5)])
def test_average_precision_depends_on_the_order_of_the_scores(scores: tuple[float, float], ap: float) -> None:
    # One box right, one wrong: sure of the wrong one, the right one comes at precision 1/2.
    found = values([detected(boxes(("car", A)), ("car", A), ("car", B), scores=scores)])
    assert found["AP50"] == pytest.approx(ap)
    assert found["precision@0.5"] == 0.5


def test_unknown_labels_leave_ap_alone() -> None:
    found = values([detected(boxes(("car", A)), ("car", A), ("ghost", B), scores=[0.5, 0.9])])
    assert found["AP"] == 1
    assert found["unknown_labels"] == 0.5
    assert found["precision@0.5"] == 0.5


def test_the_threshold_is_that_of_the_name() -> None:
    # 200 x 200 against 200 x 120 within it: IoU 0.6.
    predictions = [detected(boxes(("car", A)), ("car", (100, 100, 300, 220)))]
    assert values(predictions)["recall@0.5"] == 1
    assert values(predictions)["AP50"] == 1
    assert values(predictions)["AP75"] == 0
    # 0.5, 0.55 and 0.6 of ten thresholds.
    assert values(predictions)["AP"] == pytest.approx(0.3)
    assert values(predictions, iou=0.7)["recall@0.7"] == 0
    with pytest.raises(ValueError, match="IoU"):
        score(predictions, iou=50)


def test_average_precision_is_that_of_cocos_files() -> None:
    """Random boxes through COCO's files and its summary."""
    rng = np.random.default_rng(0)
    predictions, truth, found = [], [], []
    for image in range(12):
        wanted = [(str(rng.choice(["a", "b", "c"])), _random_box(rng)) for _ in range(rng.integers(0, 6))]
        given = [(label, np.clip(np.array(box) + rng.integers(-20, 20, 4), 0, 999)) for label, box in wanted[1:]]
        given += [(str(rng.choice(["a", "b", "c"])), np.array(_random_box(rng))) for _ in range(rng.integers(0, 4))]
        given = [(label, box.tolist()) for label, box in given if box[0] < box[2] and box[1] < box[3]]
        scores = rng.random(len(given)).tolist()
        predictions.append(detected(boxes(*wanted), *given, scores=scores))
        truth += [{"image_id": image, "category_id": ord(label), **_coco_box(box)} for label, box in wanted]
        found += [
            {"image_id": image, "category_id": ord(label), "score": one, **_coco_box(box)}
            for (label, box), one in zip(given, scores, strict=True)
        ]
    truth = [{**entry, "id": number, "iscrowd": 0} for number, entry in enumerate(truth, start=1)]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        categories = [{"id": ord(label), "name": label} for label in "abc"]
        coco.dataset = {"images": [{"id": i} for i in range(12)], "categories": categories, "annotations": truth}
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(found), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    ours = values(predictions)
    assert [ours["AP"], ours["AP50"], ours["AP75"]] == pytest.approx(evaluation.stats[:3].tolist())
    assert 0.1 < ours["AP"] < ours["AP50"] < 0.9


def _random_box(rng: np.random.Generator) -> list[int]:
    x, y = rng.integers(0, 600, 2)
    width, height = rng.integers(50, 300, 2)
    return [int(x), int(y), int(x + width), int(y + height)]


def _coco_box(box: Sequence[float]) -> dict[str, Any]:
    x1, y1, x2, y2 = (float(number) for number in box)
    return {"bbox": [x1 + 0.5, y1 + 0.5, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)}


def test_boxes_without_an_area_match_nothing_and_are_still_wrong() -> None:
    turned = detected(boxes(("car", A)), ("car", (300, 100, 100, 300)), ("car", A), scores=[0.9, 0.5])
    found = values([turned])
    assert found["AP50"] == pytest.approx(0.5)
    assert found["precision@0.5"] == 0.5


def test_region_proposals_have_no_labels() -> None:
    both = boxes(("", A), ("", B))
    found = values(
        [detected(both, ("", A), ("", (0, 0, 50, 50)), ("", (900, 900, 950, 950)), prompt="<REGION_PROPOSAL>")]
    )
    assert found == {
        "precision@0.5": pytest.approx(1 / 3),
        "recall@0.5": 0.5,
        "F1@0.5": pytest.approx(0.4),
    }
    assert values([detected("", prompt="<REGION_PROPOSAL>")] * 2 + [detected(both, prompt="<REGION_PROPOSAL>")]) == {
        "precision@0.5": 0,
        "recall@0.5": 0,
        "F1@0.5": 0,
    }


GROUNDING = "<CAPTION_TO_PHRASE_GROUNDING>a car"


def test_grounding_counts_the_best_scored_box_of_the_phrase() -> None:
    one = boxes(("a car", A))
    right = detected(one, ("a car", B), ("a car", A), scores=[0.2, 0.7], prompt=GROUNDING)
    wrong = detected(one, ("a car", B), ("a car", A), scores=[0.7, 0.2], prompt=GROUNDING)
    other_phrase = detected(one, ("a dog", A), prompt=GROUNDING)
    silent = detected(one, prompt=GROUNDING)
    two = detected(one + boxes(("a dog", B)), ("a dog", B), ("a dog", B), prompt=GROUNDING)
    scores = {s.metric: s for s in score([right, wrong, other_phrase, silent, two])}
    # RefCOCO asks where, not what it is called.
    assert scores["accuracy@0.5"].value == 0.5
    assert scores["accuracy@0.5"].count == 4
    # Of six wanted boxes three are covered: twice the car, once the dog.
    assert scores["found@0.5"].value == 0.5
    assert scores["found@0.5"].count == 5
    assert set(values([detected("", prompt=GROUNDING)])) == set()


def test_masks() -> None:
    prompt = "<REFERRING_EXPRESSION_SEGMENTATION>a car"
    size = (100, 200)

    def masked(reference: str, *polygons: list[float]) -> Prediction:
        value = {"polygons": [list(polygons)], "labels": [""], "scores": [0.5]} if polygons else {"polygons": []}
        return answered(prompt, reference, {"labels": [], "scores": []} | value, size=size)

    # Bins of 0.1 x 0.2 pixels; 20 x 20 pixels are wanted.
    wanted = "<loc_100><loc_50><loc_300><loc_50><loc_300><loc_150><loc_100><loc_150>"
    same = masked(wanted, [10, 10, 30, 10, 30, 30, 10, 30])
    half = masked(wanted, [10, 10, 30, 10, 30, 20, 10, 20])
    beside = masked(wanted, [50, 50, 60, 50, 60, 60, 50, 60])
    silent = masked(wanted)
    assert values([same]) == {"mIoU": 1, "cIoU": 1}
    assert values([half])["mIoU"] == pytest.approx(0.5)
    assert values([silent]) == {"mIoU": 0, "cIoU": 0}
    assert values([beside]) == {"mIoU": 0, "cIoU": 0}
    assert values([same, half, silent, beside])["mIoU"] == pytest.approx(1.5 / 4)
    # Unions: 400, 400, 400 and 400 + 100; intersections: 400, 200.
    assert values([same, half, silent, beside])["cIoU"] == pytest.approx(600 / 1700)
    # Overlapping polygons are one area; a line and a point are none.
    twice = masked(wanted, [1, 1, 99, 199], [5, 5], [10, 10, 30, 10, 30, 30, 10, 30], [10, 10, 30, 10, 30, 20, 10, 20])
    assert values([twice])["mIoU"] == 1
    assert values([masked("")]) == {"mIoU": 1}
    assert values([masked("", [10, 10, 30, 10, 30, 30, 10, 30])]) == {"mIoU": 0, "cIoU": 0}


CAPTIONS = [
    ("a red car on a street", ["a red car on the street", "a car in a street"]),
    ("two dogs play", ["two dogs are playing in the snow"]),
    ("", ["a man's hat isn't blue"]),
]


def captioned(pairs: Sequence[tuple[str, list[str]]]) -> list[Prediction]:
    return [answered("<CAPTION>", references, text) for text, references in pairs]


@pytest.mark.parametrize("java", [pytest.param(True, marks=pytest.mark.skipif(not HAS_JAVA, reason="no java")), False])
def test_captions(java: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captions, "has_ptb_tokenizer", lambda: java)
    ending = "" if java else "-nojava"
    perfect = values(captioned([(references[0], references) for _, references in CAPTIONS]))
    assert perfect[f"BLEU4{ending}"] == pytest.approx(1)
    assert perfect["exact"] == 1
    found = values(captioned(CAPTIONS))
    assert set(found) == {f"CIDEr{ending}", f"BLEU4{ending}", "exact"}
    # These have no punctuation but an apostrophe, which both tokenizers split alike.
    words = [text.replace("man's", "man 's").replace("isn't", "is n't") for _, own in CAPTIONS for text in own]
    references = {0: words[:2], 1: words[2:3], 2: words[3:]}
    expected, _ = Cider().compute_score(references, {i: [text] for i, (text, _) in enumerate(CAPTIONS)})
    assert found[f"CIDEr{ending}"] == pytest.approx(float(expected))
    assert 0.5 < found[f"CIDEr{ending}"] < perfect[f"CIDEr{ending}"]
    assert found["exact"] == 0


def test_captions_of_one_picture_and_empty_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captions, "has_ptb_tokenizer", lambda: False)
    assert values(captioned([("a red car drives", ["a red car drives"])])) == {
        "CIDEr-nojava": 0,
        "BLEU4-nojava": pytest.approx(1),
        "exact": 1,
    }
    assert values(captioned([("", [""])])) == {"exact": 1}
    assert values(captioned([("", ["a car"])])) == {"CIDEr-nojava": 0, "BLEU4-nojava": 0, "exact": 0}
    assert "not comparable" in METRICS["CIDEr-nojava"].source


@pytest.mark.skipif(not HAS_JAVA, reason="no java")
def test_both_tokenizers_agree_on_plain_english(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [
        "A man's dog, (isn't) well-known: 3.5 kg & $5!",
        "",
        "He can't; they'll come.\r\nI've \u2028 2,000 -- things...",
        "A sign that says 'STOP'",
    ]
    pairs = [(text, [text, ""]) for text in texts]
    words = captions.tokenized(pairs)
    assert words.ptb
    monkeypatch.setattr(captions, "has_ptb_tokenizer", lambda: False)
    assert captions.tokenized(pairs).answers == words.answers


def read(*pairs: tuple[str, str], prompt: str = "<OCR>") -> dict[str, float]:
    return values([answered(prompt, wanted, text) for text, wanted in pairs])


def test_reading() -> None:
    assert read(("STOP", "STOP")) == {"CER": 0, "WER": 0, "NED": 0, "exact": 1}
    found = read(("STOP", "STOP"), ("one twoo", "one two"), ("", "abcd"))
    # 1 + 4 edits over 4 + 7 + 4 characters; 1 + 1 wrong words of 4.
    assert found["CER"] == pytest.approx(5 / 15)
    assert found["WER"] == pytest.approx(2 / 4)
    assert found["NED"] == pytest.approx((0 + 1 / 8 + 1) / 3)
    assert found["exact"] == pytest.approx(1 / 3)
    assert read(("", "")) == {"NED": 0, "exact": 1}
    assert read(("ab", "")) == {"NED": 1, "exact": 0}
    assert read(("ab", ""), ("ab", "ab"))["CER"] == 1
    assert read(("cat", "cat"), prompt="<REGION_TO_OCR><loc_1><loc_1><loc_9><loc_9>")["CER"] == 0
    assert read(("cat", "dog"), prompt="<REGION_TO_CATEGORY><loc_1><loc_1><loc_9><loc_9>") == {"exact": 0}


def test_words_end_at_any_white_space() -> None:
    assert read(("one two\tthree", "one\ntwo three"))["WER"] == 0
    assert read(("one\nten", "one\ntwo"))["WER"] == 0.5


def test_reading_takes_the_nearest_reference() -> None:
    found = values([answered("<OCR>", ["something else", "stop"], "stop")])
    assert found == {"CER": 0, "WER": 0, "NED": 0, "exact": 1}


def test_reading_in_place() -> None:
    def quad(x: int, y: int, width: int) -> list[int]:
        return [x, y, x + width, y, x + width, y + 50, x, y + 50]

    size = (500, 2000)
    wanted = boxes(("STOP", quad(100, 100, 200)), ("GO", quad(500, 500, 200)), ("NO", quad(500, 800, 200)))

    def placed(*rows: tuple[str, list[int]]) -> Prediction:
        pixels = [[(number + 0.5) * (0.5, 2.0)[at % 2] for at, number in enumerate(points)] for _, points in rows]
        value = {"quad_boxes": pixels, "labels": [label for label, _ in rows], "scores": [0.5] * len(rows)}
        return answered("<OCR_WITH_REGION>", wanted, value, size=size)

    good = ("STOP", quad(100, 100, 200))
    found = values([placed(good, ("G0", quad(520, 500, 200)), ("NO", quad(100, 800, 200)))])
    assert found == {
        "found_quads@0.5": pytest.approx(2 / 3),
        "read_in_place@0.5": pytest.approx(1 / 3),
        "CER_in_place@0.5": pytest.approx(1 / 6),
    }
    assert values([placed(good, good)])["found_quads@0.5"] == pytest.approx(1 / 3)
    assert values([placed()]) == {"found_quads@0.5": 0, "read_in_place@0.5": 0}
    # Crossed diagonals: the boxes around them are the same, what they cover is not.
    rising, falling = [100, 300, 300, 100, 310, 110, 110, 310], [100, 110, 110, 100, 310, 300, 300, 310]
    crossed = {"quad_boxes": [[float(number) for number in falling]], "labels": ["X"], "scores": [0.5]}
    assert values([answered("<OCR_WITH_REGION>", boxes(("X", rising)), crossed)])["found_quads@0.5"] == 0


def asked(*pairs: tuple[str, list[str]], prompt: str = "<VQA>what is it?") -> dict[str, float]:
    return values([answered(prompt, wanted, text) for text, wanted in pairs])


def test_vqa_accuracy_leaves_each_person_out_once() -> None:
    people = ["cat"] * 3 + ["dog"] * 7
    # Three people are left with two who agree, seven with three.
    assert asked(("cat", people))["VQA accuracy"] == pytest.approx((3 * 2 / 3 + 7 * 1) / 10)
    assert asked(("dog", people))["VQA accuracy"] == 1
    assert asked(("cow", people))["VQA accuracy"] == 0
    assert asked(("cat", ["cat"] + ["dog"] * 9))["VQA accuracy"] == pytest.approx(9 / 30)
    assert "VQA accuracy" not in asked(("cat", ["cat"]))
    scores = score([answered("what?", ["cat"] * count, "cat") for count in (10, 1, 10)])
    assert {s.metric: s.count for s in scores} == {"VQA accuracy": 2, "ANLS": 3, "exact": 3}


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Cat", "cat"),
        ("an apple and a pear", "apple and pear"),
        ("two", "2"),
        ("None", "0"),
        ("dont know", "don't know"),
        ("yes.", "yes"),
        ("3.5", "3.5"),
        ("yes, it is", "yes it is"),
        ("black/white", "black white"),
        ("1,000", "1000"),
        ("one\ntwo", "1 2"),
        ("", ""),
    ],
)
def test_vqa_normal_form(text: str, normal: str) -> None:
    assert vqa.normalize(text) == normal


def test_anls() -> None:
    # Two of ten letters wrong; half of four; case does not count.
    assert asked(("abcdefghxx", ["abcdefghij"]))["ANLS"] == pytest.approx(0.8)
    assert asked(("abxx", ["abcd"]))["ANLS"] == 0
    assert asked(("ABC", ["xyz", "abc"]))["ANLS"] == 1
    assert asked(("", [""])) == {"ANLS": 1, "exact": 1}
    assert asked(("", ["abc"])) == {"ANLS": 0, "exact": 0}
    assert asked(("abc", ["ABC"]))["exact"] == 0


def test_prompts_of_ones_own_go_by_their_tag() -> None:
    predictions = [
        answered("<DocVQA>what is the total?", ["5"], "5"),
        answered("<DocVQA>who signed?", ["Ann"], "Bob"),
        answered("what colour?", ["red"], "red"),
        answered("<loc_1>?", ["red"], "red"),
    ]
    assert [(s.name, s.value, s.count) for s in score(predictions)] == [
        ("<DocVQA> ANLS", 0.5, 2),
        ("<DocVQA> exact", 0.5, 2),
        ("text ANLS", 1, 2),
        ("text exact", 1, 2),
    ]


def test_boxes_that_answer_a_prompt_of_ones_own_have_scores() -> None:
    def own(prompt: str, reference: str, regions: dict[str, Any] | None, text: str) -> Prediction:
        return Prediction("a.png", SIZE, prompt, [reference], f"</s><s>{text}</s>", {prompt: text}, regions)

    wanted, text = boxes(("car", A)), boxes(("car", B), ("car", A))
    regions = {"bboxes": [list(B), list(A)], "labels": ["car", "car"], "scores": [0.2, 0.8]}
    scored = own("find cars", wanted, regions, text)
    assert values([scored])["AP50"] == 1
    # Without scores the order in which they were written counts.
    assert values([own("find cars", wanted, None, text)])["AP50"] == pytest.approx(0.5)
    # A page without any is asked the same.
    empty = own("find cars", "", None, "")
    scores = score([empty, scored, answered("what?", "red", "red")])
    assert {(s.task, s.count) for s in scores} == {("boxes", 2), ("text", 1)}
    assert score([own("<Cars>now", "", None, ""), own("<Cars>", wanted, regions, text)])[0].name == "<Cars> AP"


def test_open_vocabulary_detection_is_boxes_or_masks() -> None:
    prompt = "<OPEN_VOCABULARY_DETECTION>a car"
    box = {"bboxes": [[100.5, 100.5, 300.5, 300.5]], "bboxes_labels": ["a car"], "scores": [0.5]}
    none: dict[str, list] = {"polygons": [], "polygons_labels": [], "polygons_scores": []}
    assert values([answered(prompt, boxes(("a car", A)), box | none)])["AP"] == 1
    reference = "a car<poly>" + boxes(("", (100, 100, 300, 100, 300, 300))) + "</poly>"
    mask = {"polygons": [[[100.5, 100.5, 300.5, 100.5, 300.5, 300.5]]], "polygons_labels": ["a car"]}
    value = {"bboxes": [], "bboxes_labels": [], "scores": []} | mask | {"polygons_scores": [0.5]}
    assert values([answered(prompt, reference, value)]) == {"mIoU": 1, "cIoU": 1}
    both = score([answered(prompt, boxes(("a car", A)), box | none), answered(prompt, reference, value)])
    assert {s.task for s in both} == {"<OPEN_VOCABULARY_DETECTION>", "<OPEN_VOCABULARY_DETECTION> segmentation"}
    # The other kind of shape has found nothing.
    assert values([answered(prompt, reference, box | none)]) == {"mIoU": 0, "cIoU": 0}
    outlined = values([answered(prompt, boxes(("a car", A)), value)])
    assert (outlined["AP"], outlined["precision@0.5"], outlined["recall@0.5"]) == (0, 0, 0)


def test_bare_locations_answer_a_prompt_of_ones_own() -> None:
    def own(prompt: str, reference: str, text: str, regions: dict[str, Any] | None = None) -> Prediction:
        return Prediction("a.png", SIZE, prompt, [reference], f"</s><s>{text}</s>", {prompt: text}, regions)

    one, both = boxes(("", A)), boxes(("", A), ("", B))
    sure = {"bboxes": [list(B), list(A)], "labels": ["that", "this"], "scores": [0.2, 0.8]}
    found = {
        s.name: (s.value, s.count)
        for s in score(
            [
                # What the answer calls the box is not asked.
                own("Find the car", one, "that" + boxes(("", B)) + "this" + one, sure),
                own("Find the dog", one, boxes(("", B))),
                own("Find the cat", one, "no cat"),
                own("Find the cars", both, both),
            ]
        )
    }
    # Of five wanted boxes three are found, by five.
    assert found == {
        "locations precision@0.5": (pytest.approx(3 / 5), 4),
        "locations recall@0.5": (pytest.approx(3 / 5), 4),
        "locations F1@0.5": (pytest.approx(3 / 5), 4),
        "locations accuracy@0.5": (pytest.approx(1 / 3), 3),
    }
    # Two locations are a point, and text.
    assert values([own("Point at it", "<loc_1><loc_2>", "<loc_1><loc_2>")]) == {"ANLS": 1, "exact": 1}
    assert score([own("<Find>a", "", "", None), own("<Find>b", one, one)])[0].name == "<Find> precision@0.5"


def test_every_metric_says_which_way_is_better() -> None:
    lower = {name for name, metric in METRICS.items() if not metric.higher_is_better}
    assert lower == {"unknown_labels", "CER", "WER", "NED", "CER_in_place@{iou}"}
    (ned,) = [s for s in score([answered("<OCR>", "a", "a")]) if s.metric == "NED"]
    assert not ned.higher_is_better


def test_predictions_are_written_and_read(tmp_path: Path) -> None:
    predictions = [detected(TWO, ("car", A)), answered("what?", ["é"], "\u2028é")]
    write_predictions(tmp_path / "p.jsonl", predictions)
    assert list(read_predictions(tmp_path / "p.jsonl")) == predictions
    line = json.loads((tmp_path / "p.jsonl").read_text().splitlines()[0])
    del line["regions"]
    (tmp_path / "p.jsonl").write_text(json.dumps(line) + "\n")
    assert list(read_predictions(tmp_path / "p.jsonl")) == predictions[:1]
    with pytest.raises(ValueError, match="no reference"):
        score([answered("what?", [], "red")])


def test_neighbours_with_the_same_question_are_its_references() -> None:
    a, b = Path("a.png"), Path("b.png")
    rows = [
        (a, "q", "1"),
        (a, "q", "2"),
        (a, "r", "3"),
        (b, "r", "4"),
        (a, "q", "5"),
        (a, "q", "x<loc_1>"),
        (a, "q", "6"),
    ]
    examples = [Example(image, prompt, answer, "") for image, prompt, answer in rows]
    found = [question.references for question in questions(examples)]
    assert found == [["1", "2"], ["3"], ["4"], ["5"], ["x<loc_1>"], ["6"]]
    assert [question.references for question in questions(examples, limit=1)] == [["1", "2"]]
    assert list(questions([])) == []
