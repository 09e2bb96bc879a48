"""`florence2 data convert`: lines and COCO, there and back."""

import json
from pathlib import Path
from typing import Any

import pytest
from florence2_cli import main
from florence2_data.convert import convert
from florence2_data.formats import examples, open_data
from florence2_data.record import Example
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

WIDTH, HEIGHT = 640, 480


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    Image.new("RGB", (WIDTH, HEIGHT), "white").save(tmp_path / "in" / "p.png")
    Image.new("RGB", (333, 777), "white").save(tmp_path / "in" / "q.png")
    return tmp_path


def write(folder: Path, *rows: dict[str, Any], name: str = "train.jsonl") -> Path:
    path = folder / "in" / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def row(suffix: str, image: str = "p.png", prefix: str = "<OD>") -> dict[str, str]:
    return {"image": image, "prefix": prefix, "suffix": suffix}


def run(path: Path, output: Path, *options: str) -> int:
    return main(["data", "convert", str(path), "--output", str(output), *options])


def read_lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_have_the_words_of_the_model_and_paths_from_the_outputs_folder(folder):
    source = write(
        folder,
        {
            "query": "Find <ref-object>",
            "response": "<bbox>",
            "images": ["p.png"],
            "objects": [{"caption": "guy in réd", "bbox": [138, 136, 235, 359]}],
        },
    )
    expected = {"prefix": "Find guy in réd", "suffix": "<loc_215><loc_283><loc_367><loc_747>"}
    assert run(source, folder / "out.jsonl") == 0
    assert read_lines(folder / "out.jsonl") == [{"image": "in/p.png", **expected}]
    assert run(source, folder / "new" / "out.jsonl") == 0
    assert read_lines(folder / "new" / "out.jsonl") == [{"image": str(folder / "in" / "p.png"), **expected}]
    for output in (folder / "out.jsonl", folder / "new" / "out.jsonl"):
        (read,) = examples(open_data(output)[0])
        assert isinstance(read, Example)
        assert read.image == folder / "in" / "p.png"


def test_coco_is_numbered_in_the_order_of_the_samples(folder):
    box = "<loc_1><loc_1><loc_2><loc_2>"
    source = write(folder, row(f"cat{box}"), row(f"dog{box}", "q.png"), row(f"bird{box}"))
    assert run(source, folder / "out.json") == 0
    out = json.loads((folder / "out.json").read_text())
    assert [one["name"] for one in out["categories"]] == ["cat", "dog", "bird"]
    assert [(one["id"], one["image_id"], one["category_id"]) for one in out["annotations"]] == [
        (1, 1, 1),
        (2, 2, 2),
        (3, 1, 3),
    ]
    assert [image["file_name"] for image in out["images"]] == ["in/p.png", "in/q.png"]


def test_coco_has_boxes_at_the_centres_of_their_bins(folder):
    source = write(
        folder,
        row("cat<loc_100><loc_200><loc_300><loc_500>dog<loc_0><loc_0><loc_999><loc_999>"),
        row("", "q.png"),
        row("dog<loc_1><loc_1><loc_2><loc_2>", "p.png", "Find the dog"),
    )
    assert run(source, folder / "out.json") == 0
    out = json.loads((folder / "out.json").read_text())
    assert out["images"] == [
        {"id": 1, "file_name": "in/p.png", "width": WIDTH, "height": HEIGHT},
        {"id": 2, "file_name": "in/q.png", "width": 333, "height": 777},
    ]
    assert out["categories"] == [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    assert [(box["image_id"], box["category_id"]) for box in out["annotations"]] == [(1, 1), (1, 2), (1, 2)]
    assert out["annotations"][0]["bbox"] == pytest.approx([100.5 * 0.64, 200.5 * 0.48, 200 * 0.64, 300 * 0.48])
    assert out["annotations"][1]["bbox"] == pytest.approx([0.32, 0.24, 999 * 0.64, 999 * 0.48])
    assert out["annotations"][0]["area"] == pytest.approx(200 * 0.64 * 300 * 0.48)


boxes = st.tuples(*[st.integers(0, 999)] * 4).map(
    lambda n: "".join(f"<loc_{v}>" for v in (min(n[0], n[2]), min(n[1], n[3]), max(n[0], n[2]), max(n[1], n[3])))
)
answers = st.lists(st.tuples(st.sampled_from(["cat", "big dog", "käfer"]), boxes).map("".join), max_size=5).map("".join)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)
@given(answers, answers)
def test_lines_to_coco_to_lines_are_the_same_lines(folder, first, second):
    source = write(folder, row(first, "in/p.png"), row(second, "in/q.png"))
    source = source.rename(folder / "source.jsonl")
    for start, end in (("source.jsonl", "out.json"), ("out.json", "back.jsonl")):
        (split,) = open_data(folder / start)
        assert convert(split, folder / end, lambda problem: pytest.fail(str(problem))) == 2
    assert read_lines(folder / "back.jsonl") == read_lines(source)


def test_what_is_left_out_is_said_and_makes_the_exit_code_1(folder, capsys):
    source = write(folder, row("", "gone.png"), row("cat"), *[{"image": "p.png"}] * 12)
    assert run(source, folder / "out.jsonl") == 1
    out, err = capsys.readouterr()
    assert err.count("train.jsonl:") == 10
    assert "13 samples left out" in err
    assert out.endswith("out.jsonl: 1 samples\n")
    assert run(source, folder / "out.jsonl", "--skip-bad") == 0
    assert [line["suffix"] for line in read_lines(folder / "out.jsonl")] == ["cat"]


@pytest.mark.parametrize(
    "sample",
    [
        row("A cat.", prefix="<CAPTION>"),
        row("", prefix="<CAPTION>"),
        row("hello" + "<loc_1>" * 8, prefix="<OCR_WITH_REGION>"),
        row("cat<poly>" + "<loc_1>" * 6 + "</poly>", prefix="<OPEN_VOCABULARY_DETECTION>cat"),
        row("cat<loc_1><loc_2><loc_3><loc_4><loc_5>"),
        row("nothing"),
        row("<loc_1><loc_2><loc_3><loc_4>", prefix="<REGION_PROPOSAL>"),
        row("cat<loc_1><loc_2><loc_3><loc_4>", prefix="<OD> cats"),
    ],
)
def test_coco_takes_nothing_but_boxes(folder, sample, capsys):
    assert run(write(folder, row(""), sample), folder / "out.json") == 1
    assert capsys.readouterr().err.startswith("train.jsonl:2: ")
    assert len(json.loads((folder / "out.json").read_text())["images"]) == 1


def test_several_splits_need_a_name(folder, capsys):
    for name in ("train", "valid"):
        write(folder, row(name), name=f"{name}.jsonl")
    assert run(folder / "in", folder / "out.jsonl") == 1
    assert "has the splits train, valid; say which with --split" in capsys.readouterr().err
    assert run(folder / "in", folder / "out.jsonl", "--split", "test") == 1
    assert not (folder / "out.jsonl").exists()
    assert run(folder / "in", folder / "out.jsonl", "--split", "valid") == 0
    assert [line["suffix"] for line in read_lines(folder / "out.jsonl")] == ["valid"]


def test_a_run_that_breaks_leaves_the_old_file_and_no_other(folder):
    (folder / "out.jsonl").write_text("old")
    (split,) = open_data(write(folder, row("a"), row("b", "gone.png")))

    def stop(problem):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(split, folder / "out.jsonl", stop)
    assert sorted(path.name for path in folder.iterdir()) == ["in", "out.jsonl"]
    assert (folder / "out.jsonl").read_text() == "old"


def test_the_output_is_for_whom_a_new_file_is(folder):
    source = write(folder, row("a"))
    assert run(source, folder / "out.jsonl") == 0
    assert (folder / "out.jsonl").stat().st_mode == source.stat().st_mode


def test_an_output_of_another_kind_is_refused(folder, capsys):
    assert run(write(folder, row("a")), folder / "out.txt") == 1
    assert "name the output .jsonl" in capsys.readouterr().err
    assert sorted(path.name for path in folder.iterdir()) == ["in"]


def test_a_file_can_be_converted_onto_itself(folder):
    source = write(folder, row(" a "))
    assert run(source, source) == 0
    assert read_lines(source) == [row("a")]
