"""`florence2 eval` and its report, on the demo checkpoint's pictures."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import DEMO_CHECKPOINT
from florence2_cli import main
from florence2_evaluation import captions
from florence2_evaluation import score as score_module
from florence2_evaluation.gallery import BEST, WORST, exhibits
from florence2_evaluation.group import groups
from florence2_evaluation.prediction import Prediction, read_predictions, write_predictions
from florence2_evaluation.report import write_report
from florence2_evaluation.score import score, score_group
from PIL import Image

SCENE = DEMO_CHECKPOINT.parent / "pictures" / "scene-1.png"
SIZE = (582, 414)
BOX = "<loc_32><loc_285><loc_192><loc_497>"
TRUE, FALSE = [18.9, 118.2, 112.0, 206.0], [300.0, 300.0, 350.0, 350.0]


def detected(*boxes: tuple[str, list[float]], image: Path = SCENE) -> Prediction:
    value = {"bboxes": [b for _, b in boxes], "labels": [label for label, _ in boxes], "scores": [0.5] * len(boxes)}
    return Prediction(str(image), SIZE, "<OD>", [f"star{BOX}"], "</s><s>star</s>", {"<OD>": value})


def captioned(text: str, reference: str = "a red star") -> Prediction:
    return Prediction(str(SCENE), SIZE, "<CAPTION>", [reference], text, {"<CAPTION>": text})


class Page(HTMLParser):
    """The tags and the text; every tag that must be closed is."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def pictures(self) -> list[Image.Image]:
        sources = [attributes["src"] or "" for tag, attributes in self.tags if tag == "img"]
        head = "data:image/jpeg;base64,"
        assert all(source.startswith(head) for source in sources)
        return [Image.open(io.BytesIO(base64.b64decode(source.removeprefix(head)))) for source in sources]


def report(predictions: list[Prediction], folder: Path) -> Page:
    by_task = groups(predictions, 0.5)
    scores = [one for group in by_task for one in score_group(group)]
    write_report(folder / "r.html", by_task, scores, "a <title>")
    return Page((folder / "r.html").read_text())


def test_the_report_holds_scores_curves_and_pictures(tmp_path: Path) -> None:
    page = report([detected(("star", TRUE)), detected(("star", FALSE)), captioned("a <b>red</b> star")], tmp_path)
    assert "a <title>" in page.text
    for one in score([detected(("star", TRUE)), detected(("star", FALSE))]):
        assert re.search(rf"{one.task}\s*{re.escape(one.metric)}\s*{one.value:.4f}", page.text)
    assert "a <b>red</b> star" in page.text
    assert "b" not in {tag for tag, _ in page.tags}
    # One plot with one curve, its legend, and three pictures: two boxes each drawn twice, and the captioned one.
    assert [tag for tag, _ in page.tags].count("svg") == 1
    assert re.search(r"star 0\.5\d\d", page.text)
    pictures = page.pictures()
    assert len(pictures) == 5
    assert all(max(picture.size) == 360 for picture in pictures)
    outside = [a for tag, a in page.tags if tag in ("script", "link") or (a.get("src") or "").startswith("http")]
    assert not outside


def test_the_pictures_show_the_answer_and_the_reference(tmp_path: Path) -> None:
    wrong, right, _ = report([detected(("star", FALSE)), captioned("x")], tmp_path).pictures()
    scale = 360 / SIZE[0]
    for picture, box, other in ((wrong, FALSE, TRUE), (right, TRUE, FALSE)):
        plain = Image.open(SCENE).convert("RGB").resize(picture.size)
        changed = np.abs(np.asarray(picture, np.int64) - np.asarray(plain, np.int64)).sum(axis=2)

        def edge(box: list[float], changed: np.ndarray = changed) -> int:
            x, y = round(box[0] * scale), round((box[1] + box[3]) / 2 * scale)
            return int(changed[y, x - 1 : x + 2].max())

        assert edge(box) > 100 > 50 > edge(other)


def test_the_worst_come_first_and_the_best_are_there() -> None:
    predictions = [captioned("a red star"[:length]) for length in range(11)] * 2
    (group,) = groups(predictions, 0.5)
    shown = exhibits(group)
    assert len(shown) == WORST + BEST < len(predictions)
    assert [one.quality for one in shown] == sorted(one.quality for one in shown)
    assert shown[0].answer == ""
    assert shown[-1].quality == 1


@pytest.mark.parametrize(
    ("prompt", "reference", "value", "quality"),
    [
        ("<OD>", f"star{BOX}", {"bboxes": [TRUE, FALSE], "labels": ["star"] * 2, "scores": [0.5] * 2}, 2 / 3),
        ("<OD>", "", {"bboxes": [], "labels": [], "scores": []}, 1),
        ("<REGION_PROPOSAL>", BOX, {"bboxes": [FALSE], "labels": [""], "scores": [0.5]}, 0),
        ("<OCR_WITH_REGION>", f"GO{BOX}{BOX}", {"quad_boxes": [], "labels": [], "scores": []}, 0),
        ("<REGION_TO_SEGMENTATION>" + BOX, BOX, {"polygons": [], "labels": [], "scores": []}, 1),
        ("<OCR>", "abcd", "abxd", 0.75),
    ],
)
def test_every_kind_of_answer_has_a_quality(prompt: str, reference: str, value: Any, quality: float) -> None:
    token = prompt.removesuffix(BOX)
    (group,) = groups([Prediction(str(SCENE), SIZE, prompt, [reference], "", {token: value})], 0.5)
    (shown,) = exhibits(group)
    assert shown.quality == pytest.approx(quality)


def test_a_picture_that_is_gone_is_left_out(tmp_path: Path) -> None:
    page = report([detected(("star", TRUE), image=tmp_path / "gone.png")], tmp_path)
    assert not page.pictures()
    assert "gone.png" in page.text


def test_many_labels_get_curves_for_some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"$x_{number}" for number in range(12)]
    references = "".join(f"{name}{BOX}" for name in [*names, "_often", "_often"])
    value = {"bboxes": [TRUE], "labels": ["_often"], "scores": [0.5]}
    predictions = [Prediction(str(SCENE), SIZE, "<OD>", [references], "", {"<OD>": value})]
    page = report(predictions, tmp_path)
    assert "10 labels of 13" in page.text
    monkeypatch.setattr(score_module, "MOST_LABELS", 12)
    assert "<OD>: 13 labels, AP is for at most 12." in report(predictions, tmp_path).text
    assert "_often 0.5" in page.text


def test_scores_without_java_are_labelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(captions, "has_ptb_tokenizer", lambda: False)
    assert "not comparable with published figures" in report([captioned("a star")], tmp_path).text
    write_predictions(tmp_path / "p.jsonl", [captioned("a star")])
    assert main(["eval", str(tmp_path / "p.jsonl")]) == 0
    assert "not comparable with published figures" in capsys.readouterr().out
    write_predictions(tmp_path / "p.jsonl", [detected(("star", TRUE))])
    assert main(["eval", str(tmp_path / "p.jsonl")]) == 0
    assert "not comparable" not in capsys.readouterr().out


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [
        {"image": str(SCENE), "prefix": "<REGION_TO_CATEGORY>" + BOX, "suffix": "star"},
        {"image": str(SCENE), "prefix": "<OCR>", "suffix": "none"},
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "data.jsonl"


def test_a_checkpoint_is_asked_and_its_answers_are_scored_again(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept, page = tmp_path / "kept.jsonl", tmp_path / "r.html"
    asked = ["eval", str(data), "--checkpoint", str(DEMO_CHECKPOINT), "--num-beams", "1", "--max-new-tokens", "8"]
    assert main([*asked, "--predictions", str(kept), "--html", str(page), "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    first = {"task": "<REGION_TO_CATEGORY>", "metric": "exact", "value": 1, "count": 1, "higher_is_better": True}
    assert scores[0] == first | {"source": "equal to a reference"}
    assert page.read_text().startswith("<!doctype html>")
    assert [p.references for p in read_predictions(kept)] == [["star"], ["none"]]
    assert main(["eval", str(kept), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == scores
    assert main([*asked, "--limit", "1"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert [line.split() for line in table] == [
        ["task", "metric", "value", "questions"],
        ["<REGION_TO_CATEGORY>", "exact", "1.0000", "1"],
    ]


def test_an_export_is_asked(data: Path, demo_export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(data), "--export", str(demo_export), "--batch-size", "2", "--limit", "1"]) == 0
    assert "1.0000" in capsys.readouterr().out


def test_what_was_not_asked_is_told(data: Path, demo_export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with data.open("a") as file:
        file.write(json.dumps({"image": "nowhere.png", "prefix": "<OD>", "suffix": ""}) + "\n")
    assert main(["eval", str(data), "--export", str(demo_export)]) == 1
    told = capsys.readouterr()
    assert "exact" in told.out
    assert "data.jsonl:3" in told.err
    assert "nowhere.png" in told.err


def test_broken_pictures_are_not_asked_and_ten_are_named(
    data: Path, demo_export: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (data.parent / "cut.png").write_bytes(SCENE.read_bytes()[:3000])
    with data.open("a") as file:
        for number in range(12):
            file.write(json.dumps({"image": "cut.png", "prefix": f"what {number}?", "suffix": "x"}) + "\n")
    output = data.parent / "new" / "kept.jsonl"
    asked = ["eval", str(data), "--export", str(demo_export), "--predictions", str(output)]
    assert main([*asked, "--html", str(data.parent / "other" / "r.html")]) == 1
    told = capsys.readouterr()
    lines = [line for line in told.err.splitlines() if line.startswith("florence2:")]
    assert len(lines) == 11
    assert re.fullmatch(r"florence2: not asked: .*cut\.png, what 0\?: the image is damaged or cut short .*", lines[0])
    assert lines[-1] == "florence2: not asked: 2 more"
    assert "exact" in told.out
    assert [p.references for p in read_predictions(output)] == [["star"], ["none"]]
    assert (data.parent / "other" / "r.html").exists()


def test_what_cannot_be_scored_is_refused_in_one_line(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*arguments: str) -> str:
        assert main(["eval", *arguments]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    assert "--checkpoint" in refused(str(data))
    assert "--checkpoint" in refused(str(data), "--predictions", str(tmp_path / "p.jsonl"))
    assert "data.jsonl:1" in refused(str(data))
    assert "missing.jsonl" in refused(str(tmp_path / "missing.jsonl"))
    (tmp_path / "empty.jsonl").write_text("")
    assert "nothing to score" in refused(str(tmp_path / "empty.jsonl"))
    splits = tmp_path / "splits"
    for name in ("train", "valid"):
        (splits / name).mkdir(parents=True)
        (splits / name / "annotations.jsonl").write_text(data.read_text())
    for named in ([], ["--split", "test"]):
        error = refused(str(splits), "--export", "nowhere", *named)
        assert "has the splits train, valid; say which with --split" in error
    assert "manifest.json" in refused(str(splits), "--export", "nowhere", "--split", "valid")
    for arguments in (["--limit", "0"], ["--export", "a", "--url", "b"]):
        with pytest.raises(SystemExit):
            main(["eval", str(data), *arguments])
