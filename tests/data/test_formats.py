"""Every format as it is written elsewhere -> the exact words of the model."""

import json
import math
import re
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import yaml
from florence2_data.formats import FORMATS, examples, open_data
from florence2_data.picture_files import upright_size
from florence2_data.record import Example, Problem
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from florence2.images import decode
from florence2.locations import dequantize, quantize

WIDTH, HEIGHT = 640, 480
RED, OTHER = [138, 136, 235, 359], [1, 2, 3, 4]


def loc(*box: float, size: tuple[float, float] = (WIDTH, HEIGHT)) -> str:
    """The rule in other words than the package's."""
    bins = (min(max(math.floor(value * 1000 / size[i % 2]), 0), 999) for i, value in enumerate(box))
    return "".join(f"<loc_{number}>" for number in bins)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.new("RGB", (WIDTH, HEIGHT), "white").save(tmp_path / "p.png")
    return tmp_path


def lines(folder: Path, *rows: Any, name: str = "train.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def read(path: Path, **options: Any) -> list[Example | Problem]:
    return [item for split in open_data(path, **options) for item in examples(split)]


def pairs(path: Path, **options: Any) -> list[tuple[str, str]]:
    found = read(path, **options)
    assert all(isinstance(item, Example) and item.image.is_file() for item in found), found
    return [(item.prefix, item.suffix) for item in found if isinstance(item, Example)]


def problem(path: Path, **options: Any) -> str:
    (found,) = read(path, **options)
    assert isinstance(found, Problem), found
    return str(found)


def v2(query: str, response: str, bbox: Any = RED, **changed: Any) -> dict[str, Any]:
    thing = {"caption": "guy in red", "bbox": bbox, "bbox_type": "real", "image": 0, **changed}
    return {"query": query, "response": response, "images": ["p.png"], "objects": json.dumps([thing])}


def test_the_expected_numbers_are_these():
    assert loc(*RED) == "<loc_215><loc_283><loc_367><loc_747>"


SWIFT_V2 = {
    "box to label": (v2("Find <bbox>", "<ref-object>"), "Find " + loc(*RED), "guy in red"),
    "label to box": (v2("Find <ref-object>", "<bbox>"), "Find guy in red", loc(*RED)),
    "label to two boxes": (v2("Find <ref-object>", "<bbox>", [RED, OTHER]), "Find guy in red", loc(*RED) + loc(*OTHER)),
    "box alone": (v2("Describe <bbox>.", "He waves."), f"Describe {loc(*RED)}.", "He waves."),
    "thousandths": (
        v2("Find <ref-object>", "<bbox>", [0, 499.9, 500, 1000], bbox_type="norm_1000"),
        "Find guy in red",
        "<loc_0><loc_499><loc_500><loc_999>",
    ),
    "parts of one": (
        v2("Find <ref-object>", "<bbox>", [0.3, 0.299, 0.57, 1], bbox_type="norm_1"),
        "Find guy in red",
        "<loc_300><loc_299><loc_570><loc_999>",
    ),
    "an img tag": (
        {**v2("Picture 1: <img>p.png</img>\nFind <bbox>", "<ref-object>"), "images": []},
        "Find " + loc(*RED),
        "guy in red",
    ),
    "objects as a list": (
        {**v2("<bbox>", "x"), "objects": [{"bbox": [0, 0, 640, 480]}]},
        "<loc_0><loc_0><loc_999><loc_999>",
        "x",
    ),
    "a point": (v2("Point at <ref-object>", "<bbox>", [138, 136]), "Point at guy in red", loc(138, 136)),
    "no objects": (
        {"query": "<OD>", "response": "table<loc_1><loc_2><loc_3><loc_4>", "images": ["p.png"], "system": "Be brief."},
        "<OD>",
        "table<loc_1><loc_2><loc_3><loc_4>",
    ),
}


@pytest.mark.parametrize(("row", "prefix", "suffix"), SWIFT_V2.values(), ids=SWIFT_V2)
def test_swift_v2(folder, row, prefix, suffix):
    assert pairs(lines(folder, row)) == [(prefix, suffix)]
    assert pairs(lines(folder, json.dumps([row], indent=2), name="array.json")) == [(prefix, suffix)]


def test_swift_v2_takes_boxes_in_the_order_query_response(folder):
    things = [{"caption": "a", "bbox": RED}, {"caption": "b", "bbox": OTHER}]
    row = {"query": "<bbox> or <ref-object>?", "response": "<ref-object>, <bbox>", "images": ["p.png"]}
    assert pairs(lines(folder, {**row, "objects": things})) == [(f"{loc(*RED)} or a?", f"b, {loc(*OTHER)}")]


def test_swift_v2_history_becomes_samples_of_the_same_picture(folder):
    row = {"history": [["<img>p.png</img>q1", "a1"], ["q2", "a2"]], "query": "q3", "response": "a3"}
    found = read(lines(folder, row))
    assert [(item.prefix, item.suffix, item.image.name) for item in found if isinstance(item, Example)] == [
        ("q1", "a1", "p.png"),
        ("q2", "a2", "p.png"),
        ("q3", "a3", "p.png"),
    ]


@pytest.mark.parametrize("kind", ["real", None, "norm1", "norm_1", "norm1000", "norm_1000"])
def test_swift_v3(folder, kind):
    scale = {"norm1": (1, 1), "norm_1": (1, 1), "norm1000": (1000, 1000), "norm_1000": (1000, 1000)}
    size = scale.get(kind, (WIDTH, HEIGHT))
    boxes = [[0.1 * size[0], 0.3 * size[1], 0.5 * size[0], size[1]], [0, 0, 0.25 * size[0], 0.75 * size[1]]]
    row = {
        "messages": [
            {"role": "system", "content": "You are kind."},
            {"role": "user", "content": "<image>\nFind <ref-object> and <ref-object>"},
            {"role": "assistant", "content": "<bbox> <bbox>"},
        ],
        "images": ["p.png"],
        "objects": {
            "ref": ["a cat", "a dog"],
            "bbox": boxes,
            "image_id": [0, 0],
            **({"bbox_type": kind} if kind else {}),
        },
    }
    first, second = (loc(*box, size=size) for box in boxes)
    assert pairs(lines(folder, row)) == [("Find a cat and a dog", f"{first} {second}")]


def test_llama_factory(folder):
    answer = "table<loc_173><loc_2><loc_300><loc_400>"
    row = {
        "messages": [{"role": "user", "content": "<image><OD>"}, {"role": "assistant", "content": answer}],
        "images": ["p.png"],
    }
    spoken = {
        "conversations": [{"from": "human", "value": "<OD>"}, {"from": "gpt", "value": answer}],
        "images": ["p.png"],
    }
    assert pairs(lines(folder, json.dumps([row, row]), name="a.json")) == [("<OD>", answer)] * 2
    assert pairs(lines(folder, spoken)) == [("<OD>", answer)]


def qwen(*said: str) -> dict[str, Any]:
    return {"conversations": [{"from": ("user", "assistant")[i % 2], "value": text} for i, text in enumerate(said)]}


QWEN = {
    "numbered": (("Picture 1:<img>p.png</img>\n11111", "22222"), [("11111", "22222")]),
    "number apart": (("Picture 12: \n<img>p.png</img>q", "a"), [("q", "a")]),
    "behind the text": (("What is this? <img>p.png</img>", "a"), [("What is this?", "a")]),
    "spaces": (("<img>p.png</img> \n  What is <ref>this</ref>? ", "\ta \n"), [("What is this?", "a")]),
    "turns": (("<img>p.png</img>q1", "a1", "q2", "a2"), [("q1", "a1"), ("q2", "a2")]),
    "grounded": (
        ("<img>p.png</img>Find <ref>the cat</ref>", "<ref> cat</ref><box>(1,20),(300,1000)</box> sits"),
        [("Find the cat", "cat<loc_1><loc_20><loc_300><loc_999> sits")],
    ),
    "a quad": (
        ("<img>p.png</img>Read it", "<ref>GO</ref><quad>(1,2), (30,4),(50,60),(7,80)</quad>"),
        [("Read it", "GO<loc_1><loc_2><loc_30><loc_4><loc_50><loc_60><loc_7><loc_80>")],
    ),
}


@pytest.mark.parametrize(("said", "expected"), QWEN.values(), ids=QWEN)
def test_qwen_conversations(folder, said, expected):
    assert pairs(lines(folder, qwen(*said))) == expected
    # A line may be a list of one.
    assert pairs(lines(folder, json.dumps([qwen(*said)]))) == expected


@pytest.mark.parametrize(
    "picture",
    [
        {"images": [{"path": "p.png", "bytes": None}]},
        {"images": None, "image": "p.png"},
        {"image": {"path": "p.png"}},
    ],
)
def test_pictures_in_other_words(folder, picture):
    assert pairs(lines(folder, {"query": "q", "response": "a", **picture})) == [("q", "a")]


@pytest.mark.parametrize(
    ("picture", "listed"),
    [({}, {"images": ["p.png"]}), ({"image": "p.png"}, {}), ({"path": "p.png"}, {})],
)
def test_content_in_parts(folder, picture, listed):
    question = [{"type": "image", **picture}, {"type": "text", "text": "Find <ref>it</ref>"}]
    answer = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    said = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    assert pairs(lines(folder, {"messages": said, **listed})) == [("Find it", "ab")]


@pytest.mark.parametrize("token", ["<loc0123>", "<|box_start|>", "<|object_ref_start|>", "<|quad_start|>"])
def test_locations_of_other_models_are_refused(folder, token):
    expected = f"train.jsonl:1: {token} is another model's; write LABEL<loc_x1><loc_y1><loc_x2><loc_y2>"
    for row in (
        {"image": "p.png", "prefix": "<OD>", "suffix": f"{token} cat"},
        {"query": "q", "response": f"{token} cat", "images": ["p.png"]},
    ):
        assert problem(lines(folder, row)).startswith(expected)


def test_prefix_suffix_and_the_maestro_folder(folder):
    row = {"image": "p.png", "prefix": " <OD>\n", "suffix": "a b<loc_1><loc_2><loc_3><loc_4>"}
    expected = ("<OD>", "a b<loc_1><loc_2><loc_3><loc_4>")
    assert pairs(lines(folder, row, "", {**row, "suffix": ""})) == [expected, ("<OD>", "")]
    for name in ("train", "valid"):
        (folder / "set" / name).mkdir(parents=True)
        (folder / "set" / name / "p.png").write_bytes((folder / "p.png").read_bytes())
        lines(folder / "set" / name, row, name="annotations.jsonl")
    splits = open_data(folder / "set")
    assert [(split.name, split.format) for split in splits] == [("train", "prefix"), ("valid", "prefix")]
    assert pairs(folder / "set") == [expected] * 2


def test_a_byte_order_mark_is_no_text(folder):
    path = lines(folder, {"image": "p.png", "prefix": "<OD>", "suffix": ""})
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert pairs(path) == [("<OD>", "")]


def test_a_folder_of_jsonl_files_is_its_splits(folder):
    for name in ("train.jsonl", "test.jsonl"):
        lines(folder, {"image": "p.png", "prefix": "<CAPTION>", "suffix": name}, name=name)
    assert [split.name for split in open_data(folder)] == ["test", "train"]


def test_a_split_that_two_files_give_is_refused(folder):
    row = {"image": "p.png", "prefix": "<CAPTION>", "suffix": "a"}
    lines(folder, row)
    (folder / "train.json").write_text(json.dumps([row]))
    with pytest.raises(ValueError, match=r"has the split train twice, as train\.jsonl and train\.json;"):
        open_data(folder)


@pytest.mark.parametrize("row", [{"query": "q", "response": "a"}, {"image": "p.png", "prefix": "q", "sufix": "a"}])
def test_files_of_another_format_are_not_passed_over(folder, row):
    lines(folder, {"image": "p.png", "prefix": "<CAPTION>", "suffix": "a"})
    lines(folder, row, name="valid.jsonl")
    (folder / "dataset_info.json").write_text("{}")
    with pytest.raises(ValueError, match=r"^train\.jsonl is of the format prefix, valid\.jsonl beside it is not;"):
        open_data(folder)
    assert [split.name for split in open_data(folder, "prefix")] == ["train"]


def test_the_first_row_is_looked_for_once(folder, monkeypatch):
    from florence2_data import formats

    read: list[Path] = []
    original = formats.rows
    monkeypatch.setattr(formats, "rows", lambda path: read.append(path) or original(path))
    path = folder / "train.json"
    path.write_text(json.dumps([qwen("<img>p.png</img>q", "a")]))
    assert [split.format for split in open_data(path)] == ["conversations"]
    assert read == [path]


def test_a_line_separator_is_no_end_of_a_line(folder):
    row = {"info": "a\u2028b", "messages": [], "images": ["p.png"]}
    path = lines(folder, json.dumps(row, ensure_ascii=False), name="train.json")
    assert [split.format for split in open_data(path)] == ["messages"]


def test_images_names_the_folder_paths_start_from(folder):
    (folder / "elsewhere").mkdir()
    (folder / "p.png").rename(folder / "elsewhere" / "p.png")
    path = lines(folder, v2("Find <bbox>", "<ref-object>"))
    assert "is missing" in problem(path)
    assert pairs(path, images=folder / "elsewhere") == [("Find " + loc(*RED), "guy in red")]


COCO = {
    "images": [
        {"id": 7, "file_name": "p.png", "width": WIDTH, "height": HEIGHT},
        {"id": 8, "file_name": "p.png", "width": WIDTH, "height": HEIGHT},
    ],
    "annotations": [
        {"id": 1, "image_id": 7, "category_id": 1, "bbox": [10, 20, 30, 40]},
        {"id": 2, "image_id": 7, "category_id": 2, "bbox": [50.5, 60, 589.5, 420]},
        {"id": 3, "image_id": 7, "category_id": 1, "bbox": [0, 0, 640, 480], "iscrowd": 1},
        {"id": 4, "image_id": 7, "category_id": 1, "bbox": [1, 2, 3, 4]},
    ],
    "categories": [{"id": 1, "name": "table"}, {"id": 2, "name": "figure"}, {"id": 3, "name": " "}],
}
COCO_ANSWER = f"table{loc(10, 20, 40, 60)}figure{loc(50.5, 60, 640, 480)}table{loc(1, 2, 4, 6)}"


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("place", [".", "images", "far"])
def test_coco_detection(folder, place, indent):
    (folder / place).mkdir(exist_ok=True)
    (folder / "p.png").rename(folder / place / "p.png")
    path = folder / "annotations_with_caption.json"
    path.write_text(json.dumps(COCO, indent=indent))
    options = {"images": folder / place} if place == "far" else {}
    assert pairs(path, **options) == [("<OD>", COCO_ANSWER), ("<OD>", "")]
    assert "<loc_999><loc_999>" in COCO_ANSWER


def test_roboflow_coco_folder(folder):
    for name in ("train", "valid", "test"):
        (folder / "set" / name).mkdir(parents=True)
        (folder / "set" / name / "p.png").write_bytes((folder / "p.png").read_bytes())
        (folder / "set" / name / "_annotations.coco.json").write_text(json.dumps(COCO))
    assert [(split.name, split.format) for split in open_data(folder / "set")] == [
        ("train", "coco"),
        ("valid", "coco"),
        ("test", "coco"),
    ]
    assert pairs(folder / "set") == [("<OD>", COCO_ANSWER), ("<OD>", "")] * 3


def test_coco_captions(folder):
    path = folder / "captions.json"
    annotations = [{"id": i, "image_id": 7, "caption": text} for i, text in enumerate(("A man. ", "", "A dog."))]
    path.write_text(json.dumps({"images": COCO["images"], "annotations": annotations}))
    found = read(path)
    assert [(item.prefix, item.suffix) for item in found if isinstance(item, Example)] == [
        ("<CAPTION>", "A man."),
        ("<CAPTION>", "A dog."),
    ]
    assert str(found[1]).startswith("captions.json:annotation 1: no caption")


def yolo(folder: Path, labels: str | None, config: Any = None) -> Path:
    root = folder / "yolo"
    for kind in ("images", "labels"):
        (root / kind / "train").mkdir(parents=True)
    (folder / "p.png").rename(root / "images" / "train" / "p.png")
    if labels is not None:
        (root / "labels" / "train" / "p.txt").write_text(labels)
    if config:
        (root / "data.yaml").write_text(yaml.safe_dump(config))
    return root


YOLO_CONFIGS = {
    "list": {"names": ["cat", "dog"], "train": "images/train"},
    "table": {"names": {0: "cat", 1: "dog"}, "path": "", "train": ["images/train"]},
    "roboflow": {"names": ["cat", "dog"], "train": "../images/train"},
}


@pytest.mark.parametrize("config", YOLO_CONFIGS.values(), ids=YOLO_CONFIGS)
def test_yolo(folder, config):
    root = yolo(folder, "1 0.3 0.2 0.2 0.2\n\n0 0.2 0.9 0.1 0.3 0.5 0.1\n", config)
    # 0.3 - 0.1 is 0.19999999999999998; the polygon begins in no corner.
    answer = "dog<loc_200><loc_100><loc_400><loc_300>cat<loc_100><loc_100><loc_500><loc_900>"
    assert pairs(root) == [("<OD>", answer)]
    assert pairs(root / "data.yaml") == [("<OD>", answer)]
    assert [split.name for split in open_data(root)] == ["train"]


def test_yolo_with_classes_txt(folder):
    root = yolo(folder, "1 0.5 0.5 1 1")
    with pytest.raises(ValueError, match=r"class names are missing; put data\.yaml or classes\.txt"):
        read(root)
    (root / "classes.txt").write_text("cat\nbig dog\n")
    assert pairs(root) == [("<OD>", "big dog<loc_0><loc_0><loc_999><loc_999>")]


def test_yolo_without_labels_is_an_empty_picture(folder):
    root = yolo(folder, "", YOLO_CONFIGS["list"])
    (root / "images" / "train" / "q.png").write_bytes((root / "images" / "train" / "p.png").read_bytes())
    assert pairs(root) == [("<OD>", ""), ("<OD>", "")]


def test_yolo_without_any_label_file_says_where_they_would_be(folder):
    with pytest.raises(
        ValueError, match=r"no picture of train has a label file; that of p\.png .*/labels/train/p\.txt"
    ):
        read(yolo(folder, None, YOLO_CONFIGS["list"]))


def test_yolo_points_stand_behind_the_box(folder):
    config = {**YOLO_CONFIGS["list"], "kpt_shape": [2, 3]}
    root = yolo(folder, "1 0.3 0.2 0.2 0.2 0.9 0.9 2 0.8 0.8 1", config)
    assert pairs(root) == [("<OD>", "dog<loc_200><loc_100><loc_400><loc_300>")]


def test_yolo_messages_name_a_file_with_spaces(folder):
    root = yolo(folder, "", YOLO_CONFIGS["list"])
    (root / "images" / "train" / "p.png").rename(root / "images" / "train" / "my p.png")
    (root / "labels" / "train" / "my p.txt").write_text("0 1")
    (found,) = read(root)
    assert isinstance(found, Problem)
    assert (found.where, found.message[:9]) == ("my p.txt:1", "1 numbers")


@pytest.mark.parametrize("names", [["cat", " "], ["cat", None], ["cat"]])
def test_yolo_classes_without_a_name(folder, names):
    config = {**YOLO_CONFIGS["list"], "names": names}
    assert problem(yolo(folder, "1 0.5 0.5 1 1", config)).startswith("p.txt:1: class 1 has no name")


def test_yolo_classes_txt_keeps_its_lines(folder):
    root = yolo(folder, "2 0.5 0.5 1 1")
    (root / "classes.txt").write_text("cat\n\nbig\u2028dog\n\n")
    assert pairs(root) == [("<OD>", "big\u2028dog<loc_0><loc_0><loc_999><loc_999>")]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("0 0.5 0.5 1 1\n7 0.5 0.5 1 1", "p.txt:2: class 7 has no name"),
        ("0 0.5 0.5 1", "p.txt:1: 3 numbers behind the class"),
        ("0 0.5 0.5 1 1 0.9", "p.txt:1: 5 numbers behind the class"),
        ("0 0.5 x 1 1", "p.txt:1: not numbers"),
        ("0 nan 0.5 1 1", "p.txt:1: coordinates are no numbers"),
    ],
)
def test_yolo_problems(folder, labels, message):
    assert problem(yolo(folder, labels, YOLO_CONFIGS["list"])).startswith(message)


VOC = """<annotation><filename>p.png</filename><size><width>{width}</width><height>480</height></size>
<object><name>dog</name><bndbox><xmin>1</xmin><ymin>49</ymin><xmax>640</xmax><ymax>96</ymax></bndbox></object>
<object><name>cat</name><bndbox><xmin>65</xmin><ymin>1</ymin><xmax>128</xmax><ymax>480</ymax></bndbox></object>
</annotation>"""
VOC_ANSWER = f"dog{loc(0, 48, 640, 96)}cat{loc(64, 0, 128, 480)}"


def voc(folder: Path, xml: str = VOC) -> Path:
    root = folder / "VOC"
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / name).mkdir(parents=True)
    (folder / "p.png").rename(root / "JPEGImages" / "p.png")
    (root / "Annotations" / "p.xml").write_text(xml.format(width=WIDTH))
    return root


def test_voc_boxes_are_counted_from_one_with_both_ends(folder):
    root = voc(folder)
    assert pairs(root) == [("<OD>", VOC_ANSWER)]
    (root / "ImageSets/Main/train.txt").write_text("p\n")
    (root / "ImageSets/Main/val.txt").write_text("q  1\n")
    assert [split.name for split in open_data(root)] == ["train", "val"]
    first, second = read(root)
    assert isinstance(first, Example)
    assert first.suffix == VOC_ANSWER
    assert str(second).startswith("q.xml: the annotation is missing")


def test_voc_names_may_have_spaces(folder):
    root = voc(folder)
    (root / "Annotations/p.xml").rename(root / "Annotations/my p 1.xml")
    for line in ("my p 1", "my p 1  1", "my p 1 -1"):
        (root / "ImageSets/Main/train.txt").write_text(f"{line}\n")
        assert pairs(root) == [("<OD>", VOC_ANSWER)]


def test_voc_pictures_may_have_upper_case_suffixes(folder):
    root = voc(folder, VOC.replace("<filename>p.png</filename>", ""))
    (root / "JPEGImages/p.png").rename(root / "JPEGImages/p.PNG")
    assert pairs(root) == [("<OD>", VOC_ANSWER)]


def test_voc_that_counts_from_zero_is_taken_as_it_is(folder):
    root = voc(folder, VOC.replace("<ymin>1</ymin>", "<ymin>0</ymin>"))
    assert pairs(root) == [("<OD>", f"dog{loc(1, 49, 640, 96)}cat{loc(65, 0, 128, 480)}")]


def test_voc_beside_the_pictures_in_split_folders(folder):
    (folder / "set" / "train").mkdir(parents=True)
    (folder / "p.png").rename(folder / "set" / "train" / "p.png")
    (folder / "set" / "train" / "p.xml").write_text(VOC.format(width=WIDTH))
    assert [(split.name, split.format) for split in open_data(folder / "set")] == [("train", "voc")]
    assert pairs(folder / "set") == [("<OD>", VOC_ANSWER)]


@pytest.mark.parametrize(
    ("xml", "message"),
    [
        ('<!DOCTYPE a [<!ENTITY b "c">]>' + VOC, "p.xml: it has a DOCTYPE"),
        (VOC[:-5], "p.xml: no XML"),
        (VOC.replace("<name>cat</name>", "<name> </name>"), "p.xml: an object has no name; name it"),
        (VOC.replace("<xmin>1</xmin>", ""), "p.xml: bndbox has no number xmin"),
        (VOC.replace("<xmin>1</xmin>", "<xmin>nan</xmin>"), "p.xml: bndbox has no number xmin"),
        (
            VOC.replace("{width}", "480").replace("<height>480", "<height>640"),
            "p.xml: boxes are of a picture of 480 x 640",
        ),
    ],
)
def test_voc_problems(folder, xml, message):
    assert problem(voc(folder, xml)).startswith(message)


USER = {"role": "user", "content": "q"}
PROBLEMS = {
    "broken": ('{"query": ', "train.jsonl:2: no JSON"),
    "no object": ("17", "train.jsonl:2: a row is an object"),
    "key": ({"query": "q", "images": ["p.png"]}, "train.jsonl:2: `response` is missing; it has query, images"),
    "no text": ({"query": 1, "response": "a", "images": ["p.png"]}, "train.jsonl:2: `query` is text"),
    "no picture": ({"query": "q", "response": "a", "images": []}, "train.jsonl:2: no picture; name one in `images`"),
    "two pictures": (
        {"query": "<img>q.png</img>", "response": "a", "images": ["p.png"]},
        "train.jsonl:2: 2 pictures; Florence-2 takes one a sample: split the row",
    ),
    "missing picture": (
        {"query": "q", "response": "a", "images": ["gone.png"]},
        "train.jsonl:2: the picture {folder}/gone.png is missing; put it there",
    ),
    "broken picture": (
        {**v2("<bbox>", "a"), "images": ["train.jsonl"]},
        "train.jsonl:2: the picture {folder}/train.jsonl can't be read",
    ),
    "url": ({"query": "q", "response": "a", "images": ["http://a/b.png"]}, "train.jsonl:2: the picture http://a/b.png"),
    "too many placeholders": (v2("<bbox> <bbox>", "a"), "train.jsonl:2: 2 <bbox> for 1 in `objects`"),
    "too many refs": (v2("<bbox>", "<ref-object><ref-object>"), "train.jsonl:2: 2 <ref-object> for 1 in `objects`"),
    "idle objects": (v2("q", "a"), "train.jsonl:2: 0 <bbox> for 1 in `objects`"),
    "no objects": ({**v2("<bbox>", "a"), "objects": ""}, "train.jsonl:2: 1 <bbox> for 0 in `objects`"),
    "bbox_type": (v2("<bbox>", "a", bbox_type="norm_2"), "train.jsonl:2: unknown bbox_type 'norm_2'; known are real"),
    "three numbers": (v2("<bbox>", "a", [1, 2, 3]), "train.jsonl:2: a bbox has 4 numbers"),
    "no numbers": (v2("<bbox>", "a", [1, 2, 3, None]), "train.jsonl:2: a bbox is a list of numbers"),
    "not finite": (v2("<bbox>", "a", [1, 2, 3, math.nan]), "train.jsonl:2: a bbox is a list of numbers"),
    "huge": (v2("<bbox>", "a", [1, 2, 3, 10**400]), "train.jsonl:2: a bbox is a list of numbers"),
    "half a character": ({"query": "q", "response": "\ud83d", "images": ["p.png"]}, "train.jsonl:2: half a surrogate"),
    "long name": (
        {"query": "q", "response": "a", "images": ["x" * 5000]},
        "train.jsonl:2: the picture {folder}/xxxx",
    ),
    "infinite": (v2("<bbox>", "a", [1, 2, 3, math.inf]), "train.jsonl:2: a bbox is a list of numbers"),
    "no bbox": (
        {**v2("<bbox>", "a"), "objects": [{"caption": "a"}]},
        "train.jsonl:2: an object of `objects` has no bbox",
    ),
    "image index": (v2("<bbox>", "a", image=1), "train.jsonl:2: a bbox is of picture 1"),
    "objects string": (
        {**v2("<bbox>", "a"), "objects": "[{"},
        "train.jsonl:2: `objects` is a string that holds no JSON",
    ),
    "objects number": ({**v2("<bbox>", "a"), "objects": 3}, "train.jsonl:2: `objects` is a list"),
    "qwen box": (
        {"query": "<box>1,2</box>", "response": "a", "images": ["p.png"]},
        "train.jsonl:2: <box>1,2</box> is no",
    ),
    "history": ({"query": "q", "response": "a", "history": ["x"]}, "train.jsonl:2: a turn of `history`"),
}


@pytest.mark.parametrize(("row", "message"), PROBLEMS.values(), ids=PROBLEMS)
def test_a_bad_line_is_a_problem_and_its_neighbours_are_read(folder, row, message):
    good = {"query": "q", "response": "a", "images": ["p.png"]}
    first, second, third = read(lines(folder, good, row, good))
    assert isinstance(first, Example)
    assert isinstance(third, Example)
    assert isinstance(second, Problem)
    assert str(second).startswith(message.format(folder=folder))


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([USER], "`messages` must go user, assistant"),
        ([USER, {"role": "tool", "content": "x"}], "unknown role 'tool'"),
        ("hello", "`messages` is missing or no list"),
        ([{"role": "user"}], "`content` is missing"),
        ([], "`messages` must go user, assistant"),
    ],
)
def test_messages_that_are_no_dialogue(folder, messages, message):
    assert problem(lines(folder, {"messages": messages, "images": ["p.png"]})).startswith("train.jsonl:1: " + message)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"category_id": 9}, "coco.json:image 7: annotation 1: category_id 9 is in no row of categories"),
        ({"bbox": [1, 2, 3]}, "coco.json:image 7: annotation 1: bbox has 4 numbers"),
        ({"bbox": None}, "coco.json:image 7: annotation 1: bbox is a list of numbers"),
        ({"image_id": [9]}, "coco.json:annotation 1: image_id [9] is in no row of images"),
        ({"category_id": 3}, "coco.json:image 7: annotation 1: category_id 3 has an empty name"),
        ({"image_id": 9}, "coco.json:annotation 1: image_id 9 is in no row of images"),
    ],
)
def test_coco_problems(folder, changed, message):
    (folder / "coco.json").write_text(
        json.dumps({**COCO, "annotations": [{**COCO["annotations"][0], **changed}]})  # type: ignore[dict-item]
    )
    problems = [item for item in read(folder / "coco.json") if isinstance(item, Problem)]
    assert [str(item).startswith(message) for item in problems] == [True]


def test_an_array_names_the_line_a_row_begins_on(folder):
    good = {"query": "q", "response": "a", "images": ["p.png"]}
    path = folder / "train.json"
    path.write_text(json.dumps([good, {"query": "q"}, good], indent=1)[:-2] + ", {]")
    found = read(path)
    assert [str(item).split(" ")[0] for item in found if isinstance(item, Problem)] == [
        "train.json:9:",
        "train.json:18:",
    ]
    assert len(found) == 4


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_is_that_of_the_upright_picture(tmp_path, form, orientation):
    exif = Image.Exif()
    exif[0x112] = orientation
    path = tmp_path / "p"
    Image.new("RGB", (64, 48)).save(path, form, exif=exif)
    assert upright_size(path) == decode(path.read_bytes()).size == ((48, 64) if orientation > 4 else (64, 48))


def test_png_orientation_behind_the_pixels_counts(tmp_path):
    exif = Image.Exif()
    exif[0x112] = 6
    path = tmp_path / "p.png"
    Image.new("RGB", (64, 48)).save(path, exif=exif)
    data = path.read_bytes()
    start = data.index(b"eXIf") - 4
    chunk = data[start : start + 12 + int.from_bytes(data[start : start + 4], "big")]
    path.write_bytes(data.replace(chunk, b"").replace(data[-12:], chunk + data[-12:]))
    assert upright_size(path) == decode(path.read_bytes()).size == (48, 64)


def test_pixels_are_those_of_the_upright_picture(folder):
    exif = Image.Exif()
    exif[0x112] = 6
    Image.new("RGB", (HEIGHT, WIDTH)).save(folder / "turned.jpg", exif=exif)
    row = {**v2("Find <ref-object>", "<bbox>"), "images": ["turned.jpg"]}
    assert pairs(lines(folder, row)) == [("Find guy in red", loc(*RED))]


def test_pixels_of_a_picture_of_another_size_are_a_problem(folder):
    images = [{"id": 7, "file_name": "p.png", "width": HEIGHT, "height": WIDTH}]
    (folder / "coco.json").write_text(json.dumps({**COCO, "images": images}))
    assert "boxes are of a picture of 480 x 640" in problem(folder / "coco.json")


@pytest.mark.parametrize(
    ("name", "text", "options", "message"),
    [
        ("none", None, {}, "is missing; name a file or folder"),
        ("a.txt", "hello", {}, "no data set of a known format; it can be\n  prefix: "),
        ("a.jsonl", '{"x": 1}', {}, "no data set of a known format"),
        ("a.jsonl", '{"x": 1}', {"format": "qwen"}, f"unknown format qwen; known are {', '.join(FORMATS)}"),
        ("a.jsonl", '{"x": 1}', {"images": Path("nowhere")}, "nowhere is no folder"),
        ("a.json", '{"images": 1, "annotations": []}', {}, "no COCO file; it needs"),
        ("a.json", '{"images": [], "annotations": [], "categories": [1]}', {}, "no COCO file; it needs"),
        ("data.yaml", "names: [a]", {"format": "yolo"}, "no YOLO data set; it needs names, train and val"),
        ("data.yaml", "names: [a]\ntrain: gone", {}, "train is gone, which is not there"),
        ("data.yaml", "train: gone", {}, "names is a list of class names"),
        ("data.yaml", "- a", {}, "no YOLO data set"),
        ("data.yaml", "a: [", {}, "no YAML"),
        ("", None, {"format": "yolo"}, "no data set of the format yolo"),
    ],
)
def test_what_is_no_data_set_is_refused_in_words(tmp_path, name, text, options, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        read(tmp_path / name, **options)


def test_the_format_can_be_named(folder):
    path = lines(folder, "{", {"messages": 1, "query": "q", "response": "a", "images": ["p.png"]})
    assert [split.format for split in open_data(path)] == ["query"]
    assert [split.format for split in open_data(path, format="messages")] == ["messages"]


def test_a_long_file_streams(folder):
    row = json.dumps({"image": "p.png", "prefix": "<OD>", "suffix": "table<loc_1><loc_2><loc_3><loc_4>" * 3})
    (folder / "train.jsonl").write_text((row + "\n") * 50_000)
    (split,) = open_data(folder / "train.jsonl")
    count = 0
    tracemalloc.start()
    try:
        for _ in examples(split):
            count += 1
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 50_000
    assert peak < 500_000


@given(
    st.tuples(st.integers(1, 5000), st.integers(1, 5000)).flatmap(
        lambda size: st.tuples(st.just(size), st.tuples(*(st.floats(0, size[i % 2]) for i in range(4))))
    )
)
def test_a_box_comes_back_to_half_a_bin(drawn):
    size, box = drawn
    back = dequantize(quantize(box, size), size)
    for i, (value, found) in enumerate(zip(box, back, strict=True)):
        assert abs(value - found) <= size[i % 2] / 2000 * (1 + 1e-6)
