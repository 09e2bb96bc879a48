"""`florence2 data check`: each finding has data that makes it and data that does not."""

import base64
import io
import json
import random
import re
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from florence2_cli import main
from florence2_data.check import check
from florence2_data.findings import KINDS, LABELS, SHOWN, Report
from florence2_data.formats import open_data
from florence2_data.rounding import Rounding
from florence2_data.sample_page import write_page
from florence2_export.answer_limits import read_answer_limits
from PIL import Image, ImageColor

from florence2.drawing import draw

CHECKPOINT = ROOT / "demo" / "checkpoint"
WIDTH, HEIGHT = 640, 480
GOOD = "a cat<loc_100><loc_200><loc_300><loc_400>"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.new("RGB", (WIDTH, HEIGHT), "white").save(tmp_path / "p.png")
    return tmp_path


def write(folder: Path, *samples: tuple[str, str] | dict[str, Any], name: str = "train") -> Path:
    path = folder / f"{name}.jsonl"
    rows = [row if isinstance(row, dict) else {"image": "p.png", "prefix": row[0], "suffix": row[1]} for row in samples]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def found(path: Path, **options: Any) -> Report:
    return check(open_data(path), **{"images": False, **options})[0]


def test_a_sound_data_set_has_no_finding(folder):
    report = found(write(folder, ("<OD>", GOOD * 2), ("<OD>", ""), ("<CAPTION>", "A cat.")), images=True)
    assert report.counts == {"empty": 1}
    assert report.messages["empty"] == ["train: train.jsonl:2: '<OD>'"]
    assert KINDS["empty"][0] == "note"
    assert report.splits == {"train": 3}
    assert report.tasks == {"train": {"<OD>": 2, "<CAPTION>": 1}}
    assert report.labels == {"a cat": 2}
    assert report.pictures == 1


def test_prompts_of_ones_own_are_counted_by_their_tag(folder):
    report = found(write(folder, ("<DocVQA>What?", "x"), ("<DocVQA>Who?", "y"), ("Find it", GOOD)))
    assert report.tasks == {"train": {"<DocVQA>": 2, "text": 1}}


QUAD = "".join(f"<loc_{n}>" for n in (1, 2, 30, 2, 30, 40, 1, 40))
CLEAN = {
    "several boxes of a label": ("<OD>", GOOD + "<loc_1><loc_2><loc_3><loc_4>"),
    "ocr": ("<OCR_WITH_REGION>", "hello" + QUAD),
    "proposal": ("<REGION_PROPOSAL>", "<loc_1><loc_2><loc_3><loc_4>" * 2),
    "polygon": ("<REFERRING_EXPRESSION_SEGMENTATION>a cat", QUAD + "<sep>" + QUAD),
    "polygons": ("<OPEN_VOCABULARY_DETECTION>a cat", f"a cat<poly>{QUAD}</poly>"),
    "region": ("<REGION_TO_CATEGORY><loc_1><loc_2><loc_3><loc_4>", "cat"),
    "own prompt": ("Find the cat", GOOD),
    "own text": ("Who is it?", "a < b"),
    "own locations": ("Find the cat", "<loc_1><loc_2><loc_3><loc_4> <loc_5><loc_6><loc_7><loc_8>"),
    "own point": ("Point at the cat", "<loc_1><loc_2>"),
    "ocr with <": ("<OCR_WITH_REGION>", "a < b" + QUAD),
}


@pytest.mark.parametrize("sample", CLEAN.values(), ids=CLEAN)
def test_answers_as_they_should_be(folder, sample):
    report = found(write(folder, sample))
    assert not report.counts
    assert "" not in report.labels


def pixels(box: Sequence[float], **changed: Any) -> dict[str, Any]:
    thing = {"bbox": box, "caption": "a cat", **changed}
    return {"query": "<OD>", "response": "<ref-object><bbox>", "images": ["p.png"], "objects": [thing]}


FINDINGS: dict[str, tuple[Any, str]] = {
    "unusable": ({"image": "gone.png", "prefix": "<OD>", "suffix": ""}, "gone.png is missing"),
    "prompt": (("<OD> cats", ""), "<OD> takes no text"),
    "prompt, empty": ((" ", "x"), "the prompt is empty"),
    "outside": (pixels([1, 2, 642, 4]), "[1, 2, 642, 4] in 640 x 480"),
    "outside, left": (pixels([-2, 2, 4, 40]), "[-2, 2, 4, 40] in 640 x 480"),
    "outside, below": (pixels([1, 2, 4, 481]), "[1, 2, 4, 481] in 640 x 480"),
    "degenerate": (pixels([10, 20, 10, 40]), "[10, 20, 10, 40]"),
    "degenerate, turned": (pixels([10, 40, 20, 20]), "[10, 40, 20, 20]"),
    "degenerate, bins": (("<OD>", "a<loc_9><loc_2><loc_3><loc_4>"), "bins [9, 2, 3, 4]"),
    "degenerate, prompt": (("<REGION_TO_OCR><loc_9><loc_2><loc_3><loc_4>", "x"), "bins [9, 2, 3, 4]"),
    "same bin": (pixels([10, 20, 10.1, 40]), "[10, 20, 10.1, 40]"),
    "same bin, bins": (("<OD>", "a<loc_3><loc_2><loc_3><loc_4>"), "bins [3, 2, 3, 4]"),
    "no token": (("<OD>", "a<loc_1><loc_2><loc_1000><loc_4>"), "<loc_1000>"),
    "no token, zeros": (("<OD>", "a<loc_1><loc_2><loc_007><loc_40>"), "<loc_007>"),
    "label": (("<OD>", "a <b" + GOOD[5:]), "'a <b'"),
    "label, empty": (("<OD>", GOOD[5:]), "an empty label"),
    "label, line break": (("<OCR_WITH_REGION>", "two\nlines" + QUAD), r"'two\nlines'"),
    "label, own prompt": (("Find it", "a <b" + GOOD[5:]), "'a <b'"),
    "answer": (("<OD>", "a<loc_1><loc_2><loc_3><loc_4><loc_5>"), "1 shapes from 5 locations"),
    "answer, short": (("<OD>", "a<loc_1><loc_2><loc_3>"), "0 shapes from 3 locations"),
    "answer, quad": (("<OCR_WITH_REGION>", GOOD), "0 shapes from 4 locations"),
    "loose text": (("<OD>", GOOD + " and more"), "' and more'"),
    "loose text, no box": (("<OD>", "nothing"), "'nothing'"),
    "letters": (("<OD>", GOOD.replace("a cat", "чат")), "чат"),
}


@pytest.mark.parametrize("case", FINDINGS)
def test_findings(folder, case):
    sample, words = FINDINGS[case]
    kind = case.split(",")[0]
    path = write(folder, sample)
    report = found(path)
    assert report.counts[kind] == 1, report.as_text()
    (message,) = report.messages[kind]
    assert message.startswith("train: train.jsonl:1: ")
    assert message.endswith(words) or words in message
    assert KINDS[kind][1] in report.as_text()
    serious = any(KINDS[each][0] == "error" for each in report.counts)
    assert main(["data", "check", str(path), "--no-images"]) == int(serious)


def test_findings_have_the_numbers_of_the_file(folder):
    box = "".join(f"<{name}>{edge}</{name}>" for name, edge in zip(EDGES, (1, 2, 642, 4), strict=True))
    xml = f"<annotation><object><name>cat</name><bndbox>{box}</bndbox></object></annotation>"
    (folder / "p.xml").write_text(xml)
    (message,) = found(folder).messages["outside"]
    assert message.endswith("p.xml: xmin 1, ymin 2, xmax 642, ymax 4 in 640 x 480")
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 700, 4]}
    categories = [{"id": 1, "name": "cat"}]
    coco = {"images": [{"id": 1, "file_name": "p.png"}], "annotations": [annotation], "categories": categories}
    (folder / "coco.json").write_text(json.dumps(coco))
    (message,) = found(folder / "coco.json").messages["outside"]
    assert message.endswith("image 1: bbox [1, 2, 700, 4] in 640 x 480")


EDGES = ("xmin", "ymin", "xmax", "ymax")


def test_within_a_bin_of_the_edge_is_inside(folder):
    assert not found(write(folder, pixels([-0.5, -0.4, 640.6, 480.4]))).counts


def test_broken_lines_are_counted_and_the_first_shown(folder, capsys):
    path = write(folder, ("<OD>", GOOD))
    path.write_text(path.read_text() + "{\n" * 25)
    assert main(["data", "check", str(path), "--no-images"]) == 1
    out = capsys.readouterr().out
    assert "error: 25 samples that can't be used" in out
    assert out.count("no JSON") == SHOWN
    assert f"and {25 - SHOWN} more" in out
    assert "train: 1 samples (<OD> 1)" in out


def test_broken_pictures_are_found_by_decoding_once_each(folder):
    data = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)
    Image.fromarray(noise).save(data, "PNG")
    (folder / "cut.png").write_bytes(data.getvalue()[:3000])
    (folder / "text.png").write_text("hello")
    rows = [{"image": name, "prefix": "<OD>", "suffix": ""} for name in ("cut.png", "text.png", "cut.png", "p.png")]
    path = write(folder, *rows)
    report = found(path, images=True)
    assert report.pictures == 3
    assert report.counts == {"picture": 2, "empty": 4}
    assert "cut.png" in report.messages["picture"][0]
    assert "text.png" in report.messages["picture"][1]
    assert found(path).counts == {"empty": 4}


def test_the_same_picture_in_two_splits_is_a_warning(folder):
    (folder / "copy.png").write_bytes((folder / "p.png").read_bytes())
    Image.new("RGB", (5, 5)).save(folder / "other.png")
    write(folder, ("<OD>", GOOD), ("<CAPTION>", "x"), name="train")
    row = {"image": "copy.png", "prefix": "<OD>", "suffix": GOOD}
    write(folder, row, {**row, "image": "other.png"}, name="valid")
    (copied,) = found(folder, images=True).messages["leak"]
    assert re.fullmatch(r".*copy\.png is in valid and in train", copied)
    # Without reading files, only the same path is seen.
    assert not found(folder).counts
    write(folder, ("<OD>", GOOD), name="valid")
    assert found(folder).counts == {"leak": 1}
    assert main(["data", "check", str(folder), "--no-images"]) == 0
    assert main(["data", "check", str(folder), "--no-images", "--strict"]) == 1


def test_data_sets_are_told_apart_and_added(folder):
    for name in ("one", "two"):
        (folder / name).mkdir()
        Image.new("RGB", (5, 5), (len(name), 0, ord(name[0]))).save(folder / name / "p.png")
        write(folder / name, ("<OD>", GOOD))
    splits = [split for name in ("one", "two") for split in open_data(folder / name)]
    report, _ = check(splits)
    assert sorted(report.splits) == [f"train of {folder / name / 'train.jsonl'}" for name in ("one", "two")]
    assert report.labels == {"a cat": 2}
    assert not report.counts


def test_lengths_are_counted_with_the_checkpoints_tokenizer(folder, capsys):
    lengths = read_answer_limits(str(CHECKPOINT))
    box = "cat<loc_1><loc_2><loc_3><loc_4>"
    tokens = len(lengths.tokens(box))
    assert tokens == len(lengths.tokens("cat")) + 4
    path = write(folder, ("<OD>", box), ("<OD>", box * 300))
    report = found(path, limits=lengths)
    assert report.lengths is not None
    assert sorted(report.lengths)[0] == tokens
    assert report.counts == {"length": 1, "repeated": 1}
    assert f"tokens of at most {lengths.limit}" in report.messages["length"][0]
    assert main(["data", "check", str(path), "--no-images"]) == 0
    assert "answer lengths: not checked; --checkpoint" in capsys.readouterr().out
    assert main(["data", "check", str(path), "--no-images", "--checkpoint", str(CHECKPOINT)]) == 1
    assert f"limit {lengths.limit}" in capsys.readouterr().out


def test_a_folder_that_is_no_checkpoint_is_refused(folder, capsys):
    path = write(folder, ("<OD>", GOOD))
    assert main(["data", "check", str(path), "--checkpoint", str(folder)]) == 1
    assert "no tokenizer" in capsys.readouterr().err


RULES = {
    "floor": lambda pixel, length: min(pixel * 1000 // length, 999),
    "round": lambda pixel, length: round(pixel * 1000 / length),
    "x999": lambda pixel, length: int(pixel / length * 999),
}
NAMES = {"round": "round(p * 1000 / size)", "x999": "int(p / size * 999)"}


@pytest.mark.parametrize("size", [(640, 480), (480, 320), (333, 777)])
@pytest.mark.parametrize("rule", RULES)
def test_the_rule_that_made_the_tokens_is_recognised(rule, size):
    dice, rounding = random.Random(1), Rounding()
    for _ in range(100):
        box = [dice.randrange(size[i % 2]) for i in range(4)]
        text = "".join(f"<loc_{RULES[rule](pixel, size[i % 2])}>" for i, pixel in enumerate(box))
        rounding.add("cat" + text, size)
    if rule == "floor":
        assert rounding.warning() == ""
    else:
        assert rounding.warning().startswith(NAMES[rule] + " explains 100% of 400 coordinates")


def test_fractions_of_pixels_and_few_boxes_say_nothing_about_the_rule():
    dice, fractions, few = random.Random(1), Rounding(), Rounding()
    for _ in range(500):
        fractions.add("".join(f"<loc_{dice.randrange(1000)}>" for _ in range(4)), (640, 480))
    assert fractions.seen == 2000
    assert fractions.warning() == ""
    for _ in range(24):
        few.add("<loc_2><loc_2><loc_2><loc_2>".replace("2", str(round(dice.randrange(640) / 0.64))), (640, 640))
    assert few.warning() == ""


def test_rounded_tokens_are_a_warning_and_pixels_never(folder):
    dice = random.Random(1)
    texts, boxes = [], []
    for _ in range(60):
        x1, y1 = dice.randrange(300), dice.randrange(200)
        box = [x1, y1, x1 + dice.randrange(10, 300), y1 + dice.randrange(10, 200)]
        bins = [round(pixel * 1000 / (WIDTH, HEIGHT)[i % 2]) for i, pixel in enumerate(box)]
        texts.append(("<OD>", "cat" + "".join(f"<loc_{number}>" for number in bins)))
        boxes.append(pixels(box))
    assert found(write(folder, *texts)).counts == {"rounding": 1}
    assert not found(write(folder, *boxes)).counts


def test_a_long_file_takes_no_more_memory_than_a_short_one(folder):
    path = write(folder)
    row = json.dumps({"image": "p.png", "prefix": "Find", "suffix": "cat %d<loc_9><loc_2><loc_3><loc_4>"})
    peaks = []
    for count in (2_000, 20_000):
        path.write_text("".join(row % (i % 700) + "\n" for i in range(count)))
        tracemalloc.start()
        report, shown = check(open_data(path), images=False, samples=24)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert report.splits == {"train": count}
        assert report.counts == {"degenerate": count}
        assert len(shown) == 24
    assert peaks[1] < peaks[0] * 1.2 + 50_000


def test_the_table_of_labels_has_an_end():
    report = Report()
    for i in range(LABELS + 50):
        report.add_label(str(i))
    assert len(report.labels) == LABELS + 1
    assert report.labels["(others)"] == 50


def test_the_samples_of_the_page_are_drawn_evenly_and_again_by_the_seed(folder):
    splits = open_data(write(folder, *(("Say", str(i)) for i in range(400))))

    def drawn(seed: int) -> list[int]:
        return [int(shown.example.suffix) for shown in check(splits, images=False, samples=40, seed=seed)[1]]

    assert drawn(3) == drawn(3) != drawn(4)
    assert len(set(drawn(3))) == 40
    assert 120 < np.mean([np.mean(drawn(seed)) for seed in range(5)]) < 280


def picture_of(page: str) -> Image.Image:
    (data,) = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    return Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")


def test_the_page_draws_boxes_from_the_tokens(folder):
    path = write(folder, ("Find <loc_500><loc_500><loc_900><loc_900>", "<b>&<loc_100><loc_200><loc_400><loc_600>"))
    page = folder / "out" / "page.html"
    assert main(["data", "check", str(path), "--html", str(page)]) == 1
    text = page.read_text()
    assert "&lt;b&gt;&amp;&lt;loc_100&gt;" in text
    assert "<b>" not in text
    assert "http" not in text
    picture = picture_of(text)
    assert picture.size == (480, 360)
    white, colour = (255, 255, 255), ImageColor.getrgb("#e6194b")
    for bins in ((100, 200, 400, 600), (500, 500, 900, 900)):
        x1, y1, x2, y2 = ((number + 0.5) * side / 1000 for number, side in zip(bins, (480, 360, 480, 360), strict=True))
        middle = (x1 + x2) / 2, (y1 + y2) / 2
        edges = [(x1, middle[1]), (x2, middle[1]), (middle[0], y1), (middle[0], y2)]
        on_edges = [picture.getpixel((round(x), round(y))) for x, y in edges]
        assert white not in on_edges
        for shift in (-6, 6):
            assert picture.getpixel((round(x2) + shift, round(middle[1]))) == white
    assert colour in {picture.getpixel((round(0.1005 * 480), y)) for y in range(100, 200)}


def test_a_picture_that_cant_be_shown_says_why(folder):
    splits = open_data(write(folder, {"image": "train.jsonl", "prefix": "<OD>", "suffix": ""}))
    report, shown = check(splits, images=False, samples=1)
    write_page(folder / "page.html", report, shown)
    assert "none of JPEG, PNG, WebP" in (folder / "page.html").read_text()


def test_json(folder, capsys):
    path = write(folder, ("<OD>", GOOD), ("<OD>", "nothing"))
    assert main(["data", "check", str(path), "--json", "--checkpoint", str(CHECKPOINT)]) == 0
    out = json.loads(capsys.readouterr().out)
    assert out["splits"] == {"train": {"samples": 2, "tasks": {"<OD>": 2}}}
    assert out["labels"] == {"a cat": 1}
    assert out["errors"] == 0
    assert out["warnings"] == 1
    assert out["findings"]["loose text"]["messages"] == ["train: train.jsonl:2: 'nothing'"]
    assert out["answer_tokens"]["limit"] == read_answer_limits(str(CHECKPOINT)).limit


def test_json_has_every_message(folder, capsys):
    path = write(folder, *[("<OD>", "nothing")] * (SHOWN + 2))
    assert main(["data", "check", str(path), "--no-images", "--json", "--html", str(folder / "page.html")]) == 0
    messages = json.loads(capsys.readouterr().out)["findings"]["loose text"]["messages"]
    assert messages == [f"train: train.jsonl:{number}: 'nothing'" for number in range(1, SHOWN + 3)]
    page = (folder / "page.html").read_text()
    assert page.count("train: train.jsonl:") == SHOWN + len(messages)
    assert "and 2 more" in page


def test_no_score_draws_no_number():
    picture = Image.new("RGB", (100, 100), "white")
    box = {"bboxes": [[10, 40, 90, 90]], "labels": [""]}
    with_score, without = (np.asarray(draw(picture, {"": {**box, "scores": [score]}})) for score in (1.0, None))
    assert (with_score != without).any()
    assert (without[45:85, 15:85] == 255).all()
    assert (without[:36] == 255).all()
