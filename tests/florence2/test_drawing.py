"""Answers drawn over pictures: what is where, and that no answer breaks the drawing."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from florence2.answers import AnswerParser, Decoded
from florence2.drawing import draw
from florence2.tasks import TASKS, AnswerKind

GREY = (128, 128, 128)
SIZE = (640, 480)


def blank(size: tuple[int, int] = SIZE) -> Image.Image:
    return Image.new("RGB", size, GREY)


def boxes(*corners: list[float], label: str = "", score: float = 0.5) -> dict[str, Any]:
    return {"bboxes": [*corners], "labels": [label] * len(corners), "scores": [score] * len(corners)}


def touched(answer: dict[str, Any], size: tuple[int, int] = SIZE) -> NDArray[np.bool_]:
    """[height, width]: where the drawing differs from the picture."""
    picture = blank(size)
    drawing = draw(picture, {"<OD>": answer})
    assert drawing.size == size
    assert drawing.mode == "RGB"
    return (np.asarray(drawing) != np.asarray(picture)).any(axis=2)


def test_a_box_is_drawn_on_its_edges() -> None:
    where = touched(boxes([100, 200, 300, 400]))
    assert where[200, 100:301].all()
    assert where[400, 100:301].all()
    assert where[200:401, 100].all()
    assert where[200:401, 300].all()
    assert not where[205:395, 105:295].any()
    # Above it stands its score, and around it nothing.
    outside = where.copy()
    outside[170:404, 96:304] = False
    assert not outside.any()


def test_a_quad_is_drawn_between_its_corners() -> None:
    where = touched({"quad_boxes": [[100, 200, 300, 240, 290, 340, 90, 300]], "labels": ["STOP"], "scores": [0.5]})
    assert where[220, 200]
    assert where[320, 190]
    assert not where[270, 195]
    assert not where[330, 95]


def test_a_polygon_is_filled_so_that_one_sees_through() -> None:
    answer = {"polygons": [[[100, 100, 300, 100, 300, 300], [400, 200, 500, 200, 450, 300]]]}
    picture = draw(blank(), {"<X>": {**answer, "labels": [""], "scores": [0.5]}})
    line, inside = picture.getpixel((200, 100)), picture.getpixel((280, 200))
    assert picture.getpixel((450, 230)) == inside
    assert picture.getpixel((120, 250)) == GREY
    assert line != inside != GREY
    mixed = [round(grey + (full - grey) * 0x40 / 255) for grey, full in zip(GREY, line, strict=True)]
    assert np.abs(np.array(inside) - mixed).max() <= 1


def test_labels_of_one_name_share_a_colour() -> None:
    answer = {
        "bboxes": [[10, 100, 60, 150], [110, 100, 160, 150], [210, 100, 260, 150]],
        "labels": ["car", "wheel", "car"],
        "scores": [0.5, 0.5, 0.5],
    }
    picture = draw(blank(), {"<OD>": answer})
    car, wheel, again = (picture.getpixel((x, 140)) for x in (10, 110, 210))
    assert car == again != wheel


@pytest.mark.parametrize("size", [(640, 480), (96, 96), (3000, 400)])
@pytest.mark.parametrize("corner", [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_labels_stay_inside(size: tuple[int, int], corner: tuple[int, int]) -> None:
    """A tag and its letters are as large in the corner as they are in the middle."""

    def areas(x: float, y: float) -> NDArray[np.int64]:
        answer = {"quad_boxes": [[x, y] * 4], "labels": ["door"], "scores": [0.5]}
        pixels = np.asarray(draw(blank(size), {"<OD>": answer}))
        return np.array([(pixels != GREY).any(axis=2).sum(), (pixels > 240).all(axis=2).sum()])

    x, y = ((side - 1) * share for side, share in zip(size, corner, strict=True))
    assert (areas(x, y) >= 0.97 * areas(size[0] // 4, size[1] // 2)).all()
    assert (areas(x, y) > 0).all()


@pytest.mark.parametrize("box", [[-50, -50, 900, 900], [700, 500, 800, 600], [-9, -9, -1, -1]])
def test_the_label_of_a_box_outside_is_seen(box: list[float]) -> None:
    assert touched(boxes(box, label="car")).sum() > 200


def test_a_label_wider_than_the_picture_begins_inside() -> None:
    long = touched(boxes([50, 40, 60, 50], label="a very long label " * 20), (96, 96))
    assert long[:, 0].any()
    assert long[:, -1].any()


@pytest.mark.parametrize("label", ["日本語", "é", "😀", "", "  ", "a\nb", "\x00", "\u200f\u202e", "x" * 2000])
def test_any_label_is_drawn(label: str) -> None:
    assert touched(boxes([100, 200, 300, 400], label=label))[200, 100]


@pytest.mark.parametrize("size", [(1, 1), (1, 400), (5000, 2)])
def test_any_size_is_drawn_on(size: tuple[int, int]) -> None:
    assert touched(boxes([0, 0, size[0], size[1]], label="car"), size).any()


@pytest.mark.parametrize("box", [[300, 400, 100, 200], [100, 200, 100, 200], [1e6, 1e6, 2e6, 2e6]])
def test_odd_boxes_are_drawn(box: list[float]) -> None:
    assert touched(boxes(box)).any()


@pytest.mark.parametrize("outlines", [[], [[]], [[], [100, 100]], [[100, 100, 200, 100]]])
def test_polygons_of_few_points(outlines: list[list[float]]) -> None:
    where = touched({"polygons": [outlines], "labels": ["car"], "scores": [0.5]})
    assert where.any() == any(outlines)


def test_open_vocabulary_draws_both() -> None:
    answer = {
        "bboxes": [[50, 100, 150, 200]],
        "bboxes_labels": ["car"],
        "scores": [0.5],
        "polygons": [[[300, 100, 400, 100, 400, 200]]],
        "polygons_labels": ["wheel"],
        "polygons_scores": [0.25],
    }
    where = touched(answer)
    assert where[100, 100]
    assert where[100, 350]
    assert where[120, 390]
    assert not where[150, 100]
    assert not where[150, 230]


TEXTS = {
    AnswerKind.PURE_TEXT: "",
    AnswerKind.OCR: "STOP",
    AnswerKind.PHRASE_GROUNDING: "a car",
    AnswerKind.DESCRIPTION_WITH_BBOXES: "car",
    AnswerKind.BBOXES: "",
    AnswerKind.POLYGONS: "",
    AnswerKind.DESCRIPTION_WITH_BBOXES_OR_POLYGONS: "car<poly>",
}


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_every_tasks_answer_is_drawn_or_is_text(task) -> None:
    text = TEXTS[task.answer] + "".join(f"<loc_{place}>" for place in (200, 300, 600, 310, 590, 700, 190, 690))
    decoded = Decoded(text, np.arange(len(text)))
    answer = AnswerParser().parse(task, decoded, np.zeros(len(text)), SIZE)
    picture = blank()
    drawing = draw(picture, {task.token: answer})
    changed = drawing.tobytes() != picture.tobytes()
    assert changed == (task.answer is not AnswerKind.PURE_TEXT)
    assert np.asarray(drawing)[144, 128].tolist() != [*GREY] or not changed


@pytest.mark.parametrize("answer", [{"<CAPTION>": "a car"}, {"what?": "<loc_1>"}, {}, {"<OD>": boxes()}])
def test_without_shapes_the_picture_stays(answer: dict[str, Any]) -> None:
    picture = blank()
    drawing = draw(picture, answer)
    assert drawing is not picture
    assert drawing.tobytes() == picture.tobytes()


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_the_picture_given_is_not_changed(mode: str) -> None:
    picture = blank().convert(mode)
    before = picture.tobytes()
    drawing = draw(picture, {"<OD>": boxes([10, 20, 300, 400], label="car")})
    assert drawing.mode == "RGB"
    assert picture.tobytes() == before
    assert drawing.tobytes() != blank().tobytes()
