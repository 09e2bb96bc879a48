"""What `florence2 label` takes for pictures."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from florence2_apps.label import Source, open_source
from florence2_apps.label.sources import Reading
from label_pictures import make_folder
from pyarrow import parquet


def seen(source: Source) -> list[tuple[str, Any]]:
    return [(picture.name, picture.image) for picture in source]


def test_a_folder_is_searched_through_and_sorted(tmp_path: Path) -> None:
    make_folder(tmp_path, ["b.JPG", "a/z.png", "a/b/c.webp", "a.txt", "notes.md", "c.tiff"])
    source = open_source(str(tmp_path))
    assert [picture.name for picture in source] == ["a/b/c.webp", "a/z.png", "b.JPG", "c.tiff"]
    assert len(source) == 4
    for picture in source:
        assert picture.image == str(tmp_path / picture.name)
        assert Reading(picture.image).read() == (tmp_path / picture.name).read_bytes()


def test_a_folder_that_pyarrow_reads(tmp_path: Path) -> None:
    make_folder(tmp_path, ["b.jpg", "a/z.png", "notes.md"])
    found = list(open_source(f"file://{tmp_path}"))
    assert [picture.name for picture in found] == ["a/z.png", "b.jpg"]
    assert [Reading(picture.image).read() for picture in found] == [
        (tmp_path / picture.name).read_bytes() for picture in found
    ]


def test_lists(tmp_path: Path) -> None:
    names = ["a.jpg", "/abroad/b.jpg", "https://example.org/c.jpg?size=2", "a.jpg"]
    expected = [(name, name if "/" in name else str(tmp_path / name)) for name in names]
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(names).encode())
    (tmp_path / "list.jsonl").write_text("\n".join(json.dumps({"id": 1, "image": name}) for name in names))
    for name in ("list.txt", "list.jsonl"):
        source = open_source(str(tmp_path / name))
        assert seen(source) == expected
        assert len({picture.key for picture in source}) == len(source) == 4


ROWS = {
    "bytes": [b"one", b"two", None],
    "struct": [{"bytes": b"one", "path": "1.jpg"}, {"bytes": b"two", "path": None}, {"bytes": None, "path": "3.jpg"}],
    "path": ["1.jpg", "https://example.org/2.jpg", "3.jpg"],
}


@pytest.mark.parametrize("column", ROWS)
def test_parquet(column: str, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for part in "ab":
        parquet.write_table(pa.table(ROWS), tmp_path / "data" / f"{part}.parquet", row_group_size=2)
    source = open_source(str(tmp_path), column)
    here = str(tmp_path / "data")
    names = {"bytes": ["#0", "#1", "#2"], "struct": ["1.jpg", "#1", "3.jpg"], "path": ROWS["path"]}[column]
    images = {
        "bytes": [b"one", b"two", b""],
        "struct": [b"one", b"two", f"{here}/3.jpg"],
        "path": [f"{here}/1.jpg", "https://example.org/2.jpg", f"{here}/3.jpg"],
    }[column]
    named = [f"data/{part}.parquet{name}" if name[0] == "#" else name for part in "ab" for name in names]
    assert seen(source) == list(zip(named, images * 2, strict=True))
    assert len(source) == 6
    keys = [picture.key for picture in source]
    assert keys == [f"data/{part}.parquet#{row}" for part in "ab" for row in range(3)]


def test_parts_are_the_whole(tmp_path: Path) -> None:
    parquet.write_table(pa.table(ROWS), tmp_path / "a.parquet", row_group_size=1)
    (tmp_path / "list.txt").write_text("\n".join(["a.jpg", "b.jpg", "a.jpg", "a.jpg", "c.jpg"]))
    for source in (open_source(str(tmp_path / "a.parquet"), "bytes"), open_source(str(tmp_path / "list.txt"))):
        for count in (1, 2, 3, 100):
            parts = source.parts(count)
            assert len(parts) <= count
            assert [picture for part in parts for picture in part] == list(source)
            assert sum(map(len, parts)) == len(source)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "holds no pictures"),
        ("both", "pictures and Parquet files"),
        ("photo.jpg", "no folder, .txt, .jsonl or .parquet"),
        ("list.jsonl", 'list.jsonl:2: a line is an object with "image"'),
        ("rows.parquet", "has no column image; name the pictures' with --column: bytes, struct, path"),
        ("broken.parquet", "broken.parquet: "),
        ("missing.txt", "missing.txt"),
    ],
)
def test_what_is_no_source(name: str, message: str, tmp_path: Path) -> None:
    make_folder(tmp_path, ["nothing/readme.md", "both/a.jpg", "photo.jpg", "broken.parquet"])
    (tmp_path / "list.jsonl").write_text('{"image": "a.jpg"}\n{"file": "b.jpg"}\n')
    for path in ("rows.parquet", "both/rows.parquet"):
        parquet.write_table(pa.table(ROWS), tmp_path / path)
    with pytest.raises((ValueError, OSError), match=message):
        open_source(str(tmp_path / name))
