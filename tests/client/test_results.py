"""What a client gives back: instances, COCO, supervision, JSON, drawings."""

import json
from typing import Any

import numpy as np
import pytest
import supervision
from conftest import DEMO_CHECKPOINT
from florence2_client import CaptionedInstances, Coco, Instance, Instances, Text
from PIL import Image
from pycocotools.coco import COCO
from serving import result

from florence2.drawing import draw

PICTURE = DEMO_CHECKPOINT.parent / "pictures" / "scene-1.png"
SIZE = Image.open(PICTURE).size

BOXES = {"bboxes": [[1.0, 2.0, 30.0, 50.0], [5.0, 6.0, 7.0, 8.0]], "labels": ["car", "cat"], "scores": [0.75, 0.25]}
QUADS = {"quad_boxes": [[1.0, 2.0, 9.0, 3.0, 8.0, 9.0, 1.0, 8.0]], "labels": ["EXIT"], "scores": [0.5]}
POLYGONS = {
    "polygons": [[[0.0, 0.0, 10.0, 0.0, 10.0, 20.0, 0.0, 20.0], [30.0, 30.0, 40.0, 30.0, 40.0, 40.0]], [[]]],
    "labels": ["", ""],
    "scores": [0.9, 0.1],
}
OPEN_BOXES = {
    **{"bboxes": [[1.0, 2.0, 3.0, 4.0]], "bboxes_labels": ["dog"], "scores": [0.5]},
    **{"polygons": [], "polygons_labels": [], "polygons_scores": []},
}
OPEN_POLYGONS = {
    **{"bboxes": [], "bboxes_labels": [], "scores": []},
    **{"polygons": [[[1.0, 1.0, 5.0, 1.0, 5.0, 5.0]]], "polygons_labels": ["dog"], "polygons_scores": [0.5]},
}


def found(value: dict[str, Any], task: str = "<OD>", **fields: Any) -> Instances:
    made = result({task: value}, PICTURE, **fields)
    assert isinstance(made, Instances)
    return made


def test_boxes() -> None:
    answer = found(BOXES)
    assert list(answer) == [
        Instance("car", 0.75, (1.0, 2.0, 30.0, 50.0)),
        Instance("cat", 0.25, (5.0, 6.0, 7.0, 8.0)),
    ]
    assert len(answer) == 2
    assert answer[-1].label == "cat"
    assert answer.boxes.tolist() == BOXES["bboxes"]
    assert answer.boxes.dtype == answer.scores.dtype == np.float32
    assert answer.labels == ["car", "cat"]


def test_nothing_found_has_shapes_all_the_same() -> None:
    answer = found({"bboxes": [], "labels": [], "scores": []})
    assert (answer.boxes.shape, answer.scores.shape, answer.labels) == ((0, 4), (0,), [])
    assert not answer
    assert len(answer.to_supervision()) == 0
    assert answer.to_coco()["annotations"] == []


def test_quads_and_polygons_have_a_box_around_them() -> None:
    (quad,) = found(QUADS)
    assert (quad.box, quad.quad, quad.polygons) == ((1.0, 2.0, 9.0, 9.0), tuple(QUADS["quad_boxes"][0]), None)
    (outlines,) = found(POLYGONS)  # the other has no point
    assert outlines.box == (0.0, 0.0, 40.0, 40.0)
    assert outlines.polygons == tuple(map(tuple, POLYGONS["polygons"][0]))


@pytest.mark.parametrize(("value", "kind"), [(OPEN_BOXES, "bboxes"), (OPEN_POLYGONS, "polygons")])
def test_open_vocabulary_gives_either(value: dict[str, Any], kind: str) -> None:
    (instance,) = found(value)
    assert (instance.label, instance.score) == ("dog", 0.5)
    assert (instance.polygons is not None) == (kind == "polygons")


@pytest.mark.parametrize(
    "value", [BOXES, QUADS, POLYGONS, OPEN_BOXES, OPEN_POLYGONS], ids=lambda value: next(iter(value))
)
@pytest.mark.parametrize("min_score", [0.0, 0.25, 0.5, 0.6, 1.0])
def test_min_score_leaves_out_what_is_below_and_nothing_else(value: dict[str, Any], min_score: float) -> None:
    answer = found(value, text="as it was")
    kept = answer.at_least(min_score)
    assert list(kept) == [one for one in answer if one.score >= min_score]
    assert kept.value.keys() == value.keys()
    assert (type(kept), kept.text) == (Instances, "as it was")
    assert len(answer) == len(found(value))


def test_words() -> None:
    text = result({"<CAPTION>": "a car"}, PICTURE)
    assert isinstance(text, Text)
    assert f"{text}" == "a car" == text.value


def test_json_has_all_but_the_picture() -> None:
    fields = json.loads(found(BOXES, sequence_score=-0.5, model_version="7").to_json())
    assert fields == {
        **{"prompt": "<OD>", "answer": {"<OD>": BOXES}, "text": "", "token_ids": [2], "token_logprobs": []},
        **{"sequence_score": -0.5, "finish_reason": "stop", "model_version": "7"},
    }
    caption = result({"<CAPTION>": "ein Auto, größer"}, PICTURE)
    base = vars(found(BOXES)).copy()
    del base["_rows"]
    both = CaptionedInstances(**base, caption=caption)
    assert json.loads(both.to_json())["caption"]["answer"] == {"<CAPTION>": "ein Auto, größer"}
    assert both.at_least(0.5).caption is caption


@pytest.mark.parametrize("value", [BOXES, QUADS, POLYGONS], ids=lambda value: next(iter(value)))
def test_draw(value: dict[str, Any]) -> None:
    drawn = found(value).draw()
    assert drawn.size == SIZE
    assert drawn.tobytes() == draw(Image.open(PICTURE), {"<OD>": value}).tobytes()
    assert found(value).draw(Image.new("RGB", (60, 60))).size == (60, 60)


def test_coco_is_read_by_pycocotools() -> None:
    coco = Coco()
    coco.add("a.jpg", (640, 480), found(BOXES))
    coco.add("b.jpg", (50, 60), found(POLYGONS))
    coco.add("c.jpg", (50, 60), found(QUADS))
    made = coco.to_dict()
    read = COCO()
    read.dataset = json.loads(json.dumps(made))
    read.createIndex()
    assert [image["file_name"] for image in read.loadImgs(read.getImgIds())] == ["a.jpg", "b.jpg", "c.jpg"]
    assert [one["name"] for one in read.loadCats(read.getCatIds())] == ["car", "cat", "", "EXIT"]
    car, cat, parts, quad = read.loadAnns(read.getAnnIds())
    assert (car["bbox"], car["area"], car["score"]) == ([1.0, 2.0, 29.0, 48.0], 29.0 * 48.0, 0.75)
    assert (cat["image_id"], cat["category_id"], "segmentation" in cat) == (1, 2, False)
    assert parts["area"] == 10 * 20 + 50
    # A mask holds the pixels that lie inside.
    assert read.annToMask(parts).sum() == pytest.approx(parts["area"], abs=20)
    assert quad["segmentation"] == [QUADS["quad_boxes"][0]]


def test_one_picture_as_coco_has_its_size() -> None:
    made = found(BOXES).to_coco("scene-1.png")
    assert made["images"] == [{"id": 1, "file_name": "scene-1.png", "width": SIZE[0], "height": SIZE[1]}]


def test_supervision() -> None:
    detections = found(BOXES).to_supervision()
    assert isinstance(detections, supervision.Detections)
    assert detections.xyxy.tolist() == BOXES["bboxes"]
    assert detections.confidence.tolist() == [0.75, 0.25]
    assert (detections.class_id.tolist(), detections["class_name"].tolist()) == ([0, 1], ["car", "cat"])
    quads = found(QUADS).to_supervision()
    assert quads["xyxyxyxy"].tolist() == [[[1, 2], [9, 3], [8, 9], [1, 8]]]
    masks = found(POLYGONS).to_supervision().mask
    assert masks.shape == (1, SIZE[1], SIZE[0])
    assert masks[0, :21, :11].all()
    assert masks.sum() == 21 * 11 + 66
    # supervision's own annotator takes what it is given.
    annotated = supervision.BoxAnnotator().annotate(np.array(Image.open(PICTURE).convert("RGB")), detections)
    assert annotated.shape == (SIZE[1], SIZE[0], 3)


def test_without_supervision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "supervision", None)
    with pytest.raises(ModuleNotFoundError, match="pip install supervision"):
        found(BOXES).to_supervision()
