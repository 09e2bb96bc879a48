"""Labelling without a server: the journal, COCO and Parquet."""

import json
import tracemalloc
import zlib
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from florence2_apps.label import Job, Labelled, Source, label, open_source
from florence2_apps.label.journal import Journal
from florence2_apps.label.sources import Picture, Reading
from florence2_cli import main
from florence2_client import ServerRefused
from label_pictures import make_folder, png
from pyarrow import parquet
from serving import result

JOB = Job("<OD>", {"min_score": 0.25})
BAD = png(100)


class FakeClient:
    """Answers from the picture's bytes, so that every run says the same. It refuses BAD."""

    def __init__(self, stop_after: int = 10**9) -> None:
        self.asked = 0
        self.stop_after = stop_after

    def run(self, prompt: str, image: bytes, **settings: Any) -> None:
        assert settings == {"max_new_tokens": 1, **JOB.settings}

    def run_many(self, asked: Iterator[tuple[str, Any]], *, in_flight: int, **settings: Any) -> Iterator[Any]:
        assert settings == {"return_exceptions": True, **JOB.settings}
        waiting: deque[Any] = deque()
        for prompt, image in asked:
            assert prompt == JOB.prompt
            waiting.append(self._answer(image))
            if len(waiting) == in_flight:
                yield waiting.popleft()
        yield from waiting

    def _answer(self, image: Reading) -> Any:
        try:
            data = image.read()
        except (ValueError, OSError) as error:
            return error
        self.asked += 1
        if self.asked > self.stop_after:
            return ServerRefused("localhost:1: not reached", "UNAVAILABLE")
        if data == BAD:
            return ServerRefused("localhost:1: the image is damaged", "INVALID_ARGUMENT")
        value = zlib.crc32(data)
        boxes = [[value % 7 / 3, 1.0, 20.0, 30.5 + value % 5]] * (value % 3)
        found = {"bboxes": boxes, "labels": ["tree", "car"][: len(boxes)], "scores": [0.75, 0.5][: len(boxes)]}
        return result({"<OD>": found}, data, text=f"</s><s>{value}</s>", sequence_score=-value / 2**33)


def names_of(lines: Path) -> list[str]:
    return [json.loads(line)["image"] for line in lines.read_text().splitlines()]


@pytest.fixture
def pictures(tmp_path: Path) -> Source:
    folder = make_folder(tmp_path / "pictures", [f"{number}.jpg" for number in range(6)])
    (folder / "2.jpg").write_bytes(BAD)
    (folder / "4.jpg").write_bytes(b"<html>")
    (tmp_path / "list.txt").write_text("".join(f"pictures/{number}.jpg\n" for number in range(6)))
    return open_source(str(tmp_path / "list.txt"))


@pytest.fixture
def lines(pictures: Source, tmp_path: Path) -> Path:
    """An uninterrupted run's."""
    assert label(pictures, JOB, tmp_path / "whole.jsonl", FakeClient()) == Labelled(6, 2)
    return tmp_path / "whole.jsonl"


def test_a_line_per_picture(lines: Path) -> None:
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [row["image"] for row in rows] == [f"pictures/{number}.jpg" for number in range(6)]
    assert [row["error"] is None for row in rows] == [True, True, False, True, False, True]
    assert "is damaged" in rows[2]["error"]
    assert "none of JPEG" in rows[4]["error"]
    assert len({tuple(row) for row in rows}) == 1
    assert {key: rows[0][key] for key in ("prompt", "min_score", "width", "model_version")} == {
        **{"prompt": "<OD>", "min_score": 0.25},
        **{"width": 4, "model_version": "1"},
    }


def test_a_run_goes_on_wherever_it_was_cut(pictures: Source, lines: Path, tmp_path: Path) -> None:
    whole, output = lines.read_bytes(), tmp_path / "cut.jsonl"
    newlines = [place for place, byte in enumerate(whole) if byte == 10]
    for end in sorted({*range(0, len(whole), 17), *(place + step for place in newlines for step in (-1, 0, 1))}):
        output.write_bytes(whole[:end])
        client = FakeClient()
        assert label(pictures, JOB, output, client, in_flight=3) == Labelled(6, 2)
        assert output.read_bytes() == whole
        # One is asked again only if its line was cut; 4 is no picture and never sent.
        assert client.asked == sum(number != 4 for number in range(whole[:end].count(b"\n"), 6))


def test_a_server_that_goes_away_ends_the_run(pictures: Source, lines: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    with pytest.raises(ServerRefused, match="not reached"):
        label(pictures, JOB, output, FakeClient(stop_after=2))
    assert names_of(output) == ["pictures/0.jpg", "pictures/1.jpg"]
    label(pictures, JOB, output, FakeClient())
    assert output.read_bytes() == lines.read_bytes()


def test_pictures_that_are_added_come_behind(tmp_path: Path) -> None:
    folder, output = make_folder(tmp_path / "in", ["b.jpg", "d.jpg"]), tmp_path / "out.jsonl"
    label(open_source(str(folder)), JOB, output, FakeClient())
    make_folder(folder, ["a.jpg", "c.jpg"])
    done: list[int] = []
    label(open_source(str(folder)), JOB, output, FakeClient(), progress=lambda count, row: done.append(count))
    assert names_of(output) == ["b.jpg", "d.jpg", "a.jpg", "c.jpg"]
    assert done == [2, 3, 4]


def test_a_picture_that_is_listed_twice_has_two_lines(tmp_path: Path) -> None:
    make_folder(tmp_path, ["a.jpg", "b.jpg"])
    (tmp_path / "list.txt").write_text("a.jpg\na.jpg\nb.jpg\na.jpg\n")
    for _ in range(2):
        label(open_source(str(tmp_path / "list.txt")), JOB, tmp_path / "out.jsonl", FakeClient())
        assert names_of(tmp_path / "out.jsonl") == ["a.jpg", "a.jpg", "b.jpg", "a.jpg"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"image": "a.jpg", "prefix": "<OD>", "suffix": ""}\n', "out.jsonl:1 is no line"),
        (b"a,b\n1,2\n", "out.jsonl:1 is no line"),
        (b"[1, 2]\n", "out.jsonl:1 is no line"),
        (b"my notes", "never wrote"),
        (b'{"im', None),
        (b"", None),
    ],
)
def test_a_file_of_something_else_is_left_alone(
    content: bytes, message: str | None, pictures: Source, lines: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    output.write_bytes(content)
    if message is None:
        label(pictures, JOB, output, FakeClient())
        assert output.read_bytes() == lines.read_bytes()
        return
    with pytest.raises(ValueError, match=message):
        label(pictures, JOB, output, FakeClient())
    assert output.read_bytes() == content


@pytest.mark.parametrize(
    "job", [Job("<OD>"), Job("<OCR>", JOB.settings), Job("<OD>", {**JOB.settings, "num_beams": 1})]
)
def test_an_output_is_of_one_job(job: Job, lines: Path, pictures: Source) -> None:
    before = lines.read_bytes()
    with pytest.raises(ValueError, match=r"was made with prompt <OD>, min_score 0\.25, not with prompt"):
        label(pictures, job, lines, FakeClient())
    assert lines.read_bytes() == before


def test_one_process_at_a_time(lines: Path, pictures: Source) -> None:
    with Journal(lines, JOB), pytest.raises(OSError, match=r"another process writes .*whole\.jsonl"):
        label(pictures, JOB, lines, FakeClient())
    label(pictures, JOB, lines, FakeClient())


def test_parquet_output(pictures: Source, lines: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "whole.parquet"
    label(pictures, JOB, output, FakeClient())
    rows = parquet.read_table(output).to_pylist()
    assert rows == [json.loads(line) for line in lines.read_text().splitlines()]
    assert output.with_suffix(".jsonl").read_bytes() == lines.read_bytes()
    assert sorted(path.name for path in output.parent.iterdir()) == ["whole.jsonl", "whole.parquet"]


def test_coco_output(pictures: Source, lines: Path, tmp_path: Path) -> None:
    label(pictures, JOB, tmp_path / "coco.json", FakeClient())
    found = json.loads((tmp_path / "coco.json").read_text())
    rows = [row for row in map(json.loads, lines.read_text().splitlines()) if row["error"] is None]
    assert [(image["file_name"], image["width"]) for image in found["images"]] == [(row["image"], 4) for row in rows]
    names = {category["id"]: category["name"] for category in found["categories"]}
    read = []
    for image in found["images"]:
        for annotation in found["annotations"]:
            if annotation["image_id"] == image["id"]:
                x, y, width, height = annotation["bbox"]
                assert annotation["area"] == pytest.approx(width * height)
                read.append((image["file_name"], names[annotation["category_id"]], annotation["score"], x, y + height))
    expected = []
    for row in rows:
        value = row["answer"]["<OD>"]
        for box, name, score in zip(value["bboxes"], value["labels"], value["scores"], strict=True):
            expected.append((row["image"], name, score, box[0], box[3]))
    assert len(expected) > 2
    assert read == [(*one[:3], pytest.approx(one[3]), pytest.approx(one[4])) for one in expected]


def test_an_output_elsewhere_is_ray_s(pictures: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["label", str(tmp_path / "list.txt"), "<OD>", "-o", "s3://bucket/out.jsonl"]) == 1
    assert "where --ray can write" in capsys.readouterr().err


def test_without_a_server(
    pictures: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("florence2_apps.label.labelling.RETRIES", 0)
    source, output = str(tmp_path / "list.txt"), str(tmp_path / "out.jsonl")
    assert main(["label", source, "<OD>", "-o", output, "--url", "localhost:1"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "is the server running there?" in error
    assert "the same command goes on from here" in error


@pytest.mark.parametrize(
    ("prompt", "name", "message"),
    [
        ("<CAPTION>", "out.json", "COCO holds boxes"),
        ("what is this?", "out.json", "COCO holds boxes"),
        ("<OD>", "out.csv", "says no format"),
        ("<OD>", "there.parquet", r"without .*there\.jsonl"),
    ],
)
def test_outputs_that_are_refused(prompt: str, name: str, message: str, pictures: Source, tmp_path: Path) -> None:
    (tmp_path / "there.parquet").write_bytes(b"mine")
    with pytest.raises(ValueError, match=message):
        label(pictures, Job(prompt), tmp_path / name, FakeClient())
    assert (tmp_path / "there.parquet").read_bytes() == b"mine"
    assert not (tmp_path / "out.jsonl").exists()


def test_memory_does_not_grow_with_the_pictures(tmp_path: Path) -> None:
    class Many(list):
        """A source of pictures of 100 KB."""

        def __iter__(self) -> Iterator[Picture]:
            for number in range(self[0]):
                yield Picture(str(number), png(number % 20) + bytes(100_000), str(number))

    tracemalloc.start()
    try:
        label(Many([1000]), JOB, tmp_path / "out.jsonl", FakeClient(), in_flight=8)  # type: ignore[arg-type]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 20 * 100_000


def test_the_source_is_not_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listed = tmp_path / "pictures.jsonl"
    listed.write_text('{"image": "a.png"}')
    for name in ("pictures.jsonl", "pictures.parquet"):
        assert main(["label", str(listed), "<OD>", "-o", str(tmp_path / name)]) == 1
        assert "is the source itself" in capsys.readouterr().err
    assert listed.read_text() == '{"image": "a.png"}'
