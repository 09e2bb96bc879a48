"""The demo checkpoint's making: its pictures and their truths, its tokenizer, and its recipe in small."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from florence2_demo import bpe, model, words
from florence2_demo.build import Recipe, Stage, train
from florence2_demo.examples import EXAMPLES
from florence2_demo.generators import HELD_OUT, HELD_OUT_NEW_WORDS, KINDS, TRAINING, Picture, draw
from florence2_demo.lessons import TASK_SHARES, Lessons
from florence2_demo.picture_store import Gallery, Truth, draw_gallery, open_gallery
from florence2_demo.samples import TASKS_OF, Sample, answer
from florence2_demo.stamps import STAMP, draw_stamped, write_all
from florence2_demo.things import Thing, overlap
from florence2_demo.tower import CLASSES, under_tokens
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps
from transformers import AutoProcessor, Florence2Config, Florence2ForConditionalGeneration

from florence2.answer_limits import repeats
from florence2.tasks import TASKS

VOCABULARY = bpe.build()
SIZE = (200, 100)
CIRCLES = (
    Thing("circle", (0, 0, 20, 10), "red"),
    Thing("circle", (20, 10, 60, 30), "red"),
    Thing("star", (100, 50, 200, 100), "orange"),
)


def asked(*arguments, **chosen) -> Sample:
    sample = answer(*arguments, **chosen)
    assert sample is not None
    return sample


def drawn(kind: str, split: int = TRAINING, count: int = 40) -> list[Picture]:
    return [draw(kind, 3, split, index) for index in range(count)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_arguments_draw_the_same_picture(kind):
    first, again, other = draw(kind, 3, HELD_OUT, 5), draw(kind, 3, HELD_OUT, 5), draw(kind, 3, HELD_OUT, 6)
    assert first.image.tobytes() == again.image.tobytes()
    assert first.things == again.things
    assert first.image.tobytes() != other.image.tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_boxes_lie_in_the_picture_and_in_reading_order(kind):
    for picture in drawn(kind):
        width, height = picture.image.size
        corners = [thing.box[0] + thing.box[1] for thing in picture.things]
        assert corners == sorted(corners)
        for thing in picture.things:
            x1, y1, x2, y2 = thing.box
            assert 0 <= x1 < x2 <= width
            assert 0 <= y1 < y2 <= height


@pytest.mark.parametrize("kind", ["scene", "word"])
def test_boxes_are_tight_round_what_is_coloured(kind):
    seen = 0
    for picture in drawn(kind):
        chroma = np.ptp(np.asarray(picture.image).astype(int), axis=2)
        for thing in picture.things:
            if any(overlap(thing.box, other.box) for other in picture.things if other is not thing):
                continue
            seen += 1
            x1, y1, x2, y2 = map(int, thing.box)
            inside = Image.fromarray(chroma[y1:y2, x1:x2] > 60).getbbox()
            # Letters fade out at their edges, shapes do not.
            assert inside == pytest.approx((0, 0, x2 - x1, y2 - y1), abs=2 if kind == "word" else 0)
    assert seen > 20


def test_boxes_of_tables_and_figures_end_where_the_paper_begins():
    pages = drawn("page")
    for page in pages:
        differs = (np.asarray(page.image) != page.image.getpixel((0, 0))).any(axis=2)
        for thing in page.things:
            x1, y1, x2, y2 = map(int, thing.box)
            edges = differs[y1, x1:x2], differs[y2 - 1, x1:x2], differs[y1:y2, x1], differs[y1:y2, x2 - 1]
            assert all(edge.any() for edge in edges)
    assert {len(page.things) for page in pages} == {0, 1, 2, 3}


def test_letters_lie_side_by_side_in_the_word():
    for picture in drawn("word"):
        (word,) = picture.things
        assert len(word.letters) == len(word.text)
        starts = [letter[0] for letter in word.letters]
        assert starts == sorted(starts)
        assert min(starts) == word.box[0]
        assert max(letter[2] for letter in word.letters) == word.box[2]


def test_held_out_words_are_never_drawn_in_training():
    assert not set(words.TRAINING_WORDS) & set(words.HELD_OUT_WORDS)
    assert {picture.things[0].text for picture in drawn("word", HELD_OUT_NEW_WORDS)} <= set(words.HELD_OUT_WORDS)
    assert not {picture.things[0].text for picture in drawn("word", count=300)} & set(words.HELD_OUT_WORDS)


ANSWERS = {
    "<OD>": (
        "",
        "circle<loc_0><loc_0><loc_100><loc_100>circle<loc_100><loc_100><loc_300><loc_300>"
        "star<loc_500><loc_500><loc_999><loc_999>",
    ),
    "<CAPTION>": ("", "two red circles and an orange star"),
    "<CAPTION_TO_PHRASE_GROUNDING>": (
        "two red circles and an orange star",
        "two red circles<loc_0><loc_0><loc_100><loc_100><loc_100><loc_100><loc_300><loc_300>"
        "an orange star<loc_500><loc_500><loc_999><loc_999>",
    ),
    "<REGION_TO_CATEGORY>": ("<loc_500><loc_500><loc_999><loc_999>", "star"),
    "<REGION_PROPOSAL>": (
        "",
        "<loc_0><loc_0><loc_100><loc_100><loc_100><loc_100><loc_300><loc_300><loc_500><loc_500><loc_999><loc_999>",
    ),
}


@pytest.mark.parametrize("task", ANSWERS)
def test_answers_are_written_as_florence2_writes_them(task):
    sample = asked(task, "scene", CIRCLES, SIZE, chosen=2)
    assert (sample.text, sample.target) == ANSWERS[task]


def test_a_word_is_answered_with_its_quad():
    word = (Thing("word", (20, 10, 60, 30), "blue", "STOP"),)
    quad = "<loc_100><loc_100><loc_300><loc_100><loc_300><loc_300><loc_100><loc_300>"
    assert asked("<OCR>", "word", word, SIZE).target == "STOP"
    assert asked("<OCR_WITH_REGION>", "word", word, SIZE).target == "STOP" + quad
    assert asked("<CAPTION>", "word", word, SIZE).target == "a blue word"


def test_grounding_may_ask_for_one_phrase():
    sample = asked("<CAPTION_TO_PHRASE_GROUNDING>", "scene", CIRCLES, SIZE, chosen=1)
    assert sample.prompt == "<CAPTION_TO_PHRASE_GROUNDING>an orange star"
    assert sample.target == "an orange star<loc_500><loc_500><loc_999><loc_999>"


def test_a_page_with_nothing_has_an_empty_answer():
    assert asked("<OD>", "page", (), SIZE).target == ""
    assert asked("<CAPTION>", "page", (), SIZE).target == "a page of text"
    assert answer("<REGION_TO_CATEGORY>", "page", (), SIZE) is None


def test_captions_count():
    table, figure = Thing("table", (0, 0, 9, 9)), Thing("figure", (0, 0, 9, 9))
    assert asked("<CAPTION>", "page", [table, figure, figure], SIZE).target == "a page with a table and two figures"
    cross = Thing("cross", (0, 0, 9, 9), "green")
    assert asked("<CAPTION>", "scene", [cross] * 3, SIZE).target == "three green crosses"


def test_the_shares_of_the_tasks_are_whole():
    for kind, shares in TASK_SHARES.items():
        assert set(shares) == set(TASKS_OF[kind])
        assert sum(shares.values()) == pytest.approx(1)


@pytest.mark.parametrize("kind", KINDS)
def test_no_target_repeats_a_trigram_and_every_target_survives_the_tokenizer(kind):
    truths = [Truth(picture.kind, picture.image.size, picture.things) for picture in drawn(kind)]
    lessons = Lessons(VOCABULARY, Gallery(Path(), truths), seed=0)
    for index in range(len(truths)):
        for visit in range(10):
            lesson = lessons.lesson(index, visit)
            target = VOCABULARY(lesson.target).input_ids
            assert not repeats(target, 3)
            assert VOCABULARY.unk_token_id not in target
            assert lesson.task in TASKS_OF[kind]
        for task in TASKS_OF[kind]:
            sample = answer(task, kind, truths[index].things, truths[index].size)
            if sample:
                ids = VOCABULARY(sample.target, add_special_tokens=False).input_ids
                assert VOCABULARY.decode(ids) == sample.target


def test_a_word_that_repeats_a_trigram_is_never_asked_for():
    assert repeats(VOCABULARY("BANANA").input_ids, 3)
    assert not any(repeats(VOCABULARY(word).input_ids, 3) for word in words.WORDS)
    box = (10, 10, 50, 40)
    truth = Truth("word", SIZE, (Thing("word", box, "red", "BANANA", (box,) * 6),))
    lessons = Lessons(VOCABULARY, Gallery(Path(), [truth]), seed=0)
    assert not any("BANANA" in lessons.lesson(0, visit).target for visit in range(20))


def test_lessons_walk_through_all_pictures_and_ask_anew(tmp_path):
    draw_gallery(tmp_path, 6, seed=1, processes=1)
    gallery = open_gallery(tmp_path)
    lessons = Lessons(VOCABULARY, gallery, seed=0)
    lessons.write(tmp_path / "lessons.jsonl", [4, 1, 5], 30)
    lines = [json.loads(line) for line in (tmp_path / "lessons.jsonl").read_text().splitlines()]
    assert [line["image"] for line in lines] == gallery.files([4, 1, 5]) * 10
    assert len({line["prefix"] for line in lines[::3]}) > 1
    with Image.open(lines[0]["image"]) as image:
        assert image.size == (model.SIDE, model.SIDE)
    picture = draw("scene", 1, TRAINING, 4)
    assert gallery.truths[4] == Truth("scene", picture.image.size, picture.things)


def test_the_words_of_the_demo_are_single_tokens_and_capitals_stay_letters():
    for noun in (*words.SHAPES, *words.PAGE_OBJECTS, *words.COLOURS, "word", "page"):
        for text in (noun, " " + noun):
            assert len(VOCABULARY(text, add_special_tokens=False).input_ids) == 1
    assert VOCABULARY.tokenize("LOCATE") == list("LOCATE")


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_the_prompts_of_all_tasks_have_no_unknown_token(task):
    ids = VOCABULARY(task.prompt).input_ids
    assert VOCABULARY.unk_token_id not in ids
    assert VOCABULARY.decode(ids[1:-1]) == task.prompt


@given(st.text(st.characters(exclude_characters="<", codec="utf-8")))
def test_any_text_survives_the_tokenizer(text):
    assert VOCABULARY.decode(VOCABULARY(text, add_special_tokens=False).input_ids) == text


def test_tokens_know_what_lies_under_them():
    truth = Truth("scene", (120, 120), (Thing("star", (20, 30, 50, 50), "green"),))
    classes, colours, places, boxes = under_tokens(truth)
    under = classes.reshape(12, 12) == CLASSES.index("star")
    assert under.sum() == 6
    assert under[3:5, 2:5].all()
    assert set(places) == {-1}
    assert colours.max() == 2
    assert boxes[3 * 12 + 2] == pytest.approx([1 / 6, 1 / 4, 5 / 12, 5 / 12])


def test_stamps_are_written_where_they_are(tmp_path):
    stamped = [draw_stamped(5, HELD_OUT, index) for index in range(30)]
    seen = 0
    for index, picture in enumerate(stamped):
        plain = draw("page", 5, HELD_OUT, index)
        stamps = [thing for thing in picture.things if thing.noun == STAMP]
        assert [thing for thing in picture.things if thing.noun != STAMP] == list(plain.things)
        assert all(overlap(stamp.box, thing.box) < 0.05 for stamp in stamps for thing in plain.things)
        differs = Image.fromarray((np.asarray(picture.image) != np.asarray(plain.image)).any(axis=2))
        for stamp in stamps:
            # All that was drawn lies inside, up to the box's edges.
            own = Image.new("1", differs.size)
            own.paste(differs.crop(tuple(map(int, stamp.box))), tuple(map(int, stamp.box[:2])))
            assert own.getbbox() == pytest.approx(stamp.box, abs=2)
            seen += 1
    assert seen > 15
    counts = {path.name: count for path, count in write_all(tmp_path, 0.01)}
    assert counts["train.jsonl"] == 40
    first = json.loads((tmp_path / "train.jsonl").read_text().splitlines()[0])
    assert (tmp_path / first["images"][0]).is_file()


@pytest.fixture(scope="module")
def small_recipe() -> Recipe:
    return Recipe(1, 16, 8, Stage(4, 0.2, 4), Stage(4, 0, 4), Stage(4, 0.33, 4), processes=1)


def weights(recipe: Recipe, folder: Path) -> dict[str, torch.Tensor]:
    train(recipe, folder / "checkpoint", folder / "work")
    return Florence2ForConditionalGeneration.from_pretrained(folder / "checkpoint").state_dict()


def test_the_recipe_makes_a_checkpoint_that_its_seed_decides(small_recipe, tmp_path):
    first, again = (weights(small_recipe, tmp_path / name) for name in ("first", "again"))
    other = weights(replace(small_recipe, seed=2), tmp_path / "other")
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])

    processor = AutoProcessor.from_pretrained(tmp_path / "first" / "checkpoint")
    inputs = processor(text="<OD>", images=drawn("page", count=1)[0].image, return_tensors="pt")
    checkpoint = tmp_path / "first" / "checkpoint"
    loaded: Any = Florence2ForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    ids = loaded.generate(**inputs, max_length=8)[0].tolist()
    assert ids[:2] == [VOCABULARY.eos_token_id, VOCABULARY.bos_token_id]


def test_a_finished_run_is_not_run_again(small_recipe, tmp_path):
    first = weights(small_recipe, tmp_path)
    stages = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*.safetensors")}
    again = weights(small_recipe, tmp_path)
    assert stages == {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*.safetensors")}
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_the_shipped_checkpoint_is_the_recipes(tmp_path):
    shipped = ROOT / "demo" / "checkpoint"
    VOCABULARY.save_pretrained(tmp_path)
    assert json.loads((shipped / "tokenizer.json").read_text()) == json.loads((tmp_path / "tokenizer.json").read_text())
    made: Any = model.config(VOCABULARY)
    config: Any = Florence2Config.from_pretrained(shipped)
    assert config.vision_config.to_dict() == made.vision_config.to_dict()
    assert config.text_config.vocab_size == made.text_config.vocab_size
    assert sum(path.stat().st_size for path in shipped.iterdir()) < 12_000_000


def test_the_example_pictures_are_those_of_the_generator():
    truths = json.loads((ROOT / "demo" / "pictures" / "truth.json").read_text())
    assert set(truths) == set(EXAMPLES)
    for name, truth in truths.items():
        path = ROOT / "demo" / "pictures" / name
        with Image.open(path) as image:
            assert image.getexif().get(0x0112, 1) == truth["exif_orientation"]
            assert list(ImageOps.exif_transpose(image).size) == truth["size"]
        assert path.stat().st_size < 60_000


def test_the_shipped_checkpoint_reads_and_describes_the_examples():
    shipped = ROOT / "demo" / "checkpoint"
    network: Any = Florence2ForConditionalGeneration.from_pretrained(shipped, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(shipped)
    truths = json.loads((ROOT / "demo" / "pictures" / "truth.json").read_text())
    for name, truth in truths.items():
        with Image.open(ROOT / "demo" / "pictures" / name) as opened:
            upright = ImageOps.exif_transpose(opened).convert("RGB")
        for prompt in ("<CAPTION>", "<OCR>"):
            if prompt in truth["answers"]:
                ids = network.generate(**processor(text=prompt, images=upright, return_tensors="pt"), max_length=40)
                assert processor.decode(ids[0], skip_special_tokens=True) == truth["answers"][prompt]
