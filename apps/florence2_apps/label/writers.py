"""The lines of a run as COCO or Parquet. They are read as often as it takes, never all at once."""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO

from florence2_client.results import read_instances

from florence2.coco_writer import CocoRows
from florence2_apps.label.job import Job

_ROWS = 1000
"""Of a Parquet row group."""


def write_coco(lines: Path, output: Path, job: Job) -> None:
    """COCO detection, with scores; pictures without an answer are left out."""
    info = {"description": "florence2 label", **job.asked}
    with _replacing(output) as part, part.open("w", encoding="utf-8") as file:
        file.write(f'{{"info": {json.dumps(info, ensure_ascii=False)},\n')
        _write_list(file, "images", (image for image, _ in _coco(lines, CocoRows())), ",\n")
        rows = CocoRows()
        _write_list(file, "annotations", chain.from_iterable(found for _, found in _coco(lines, rows)), ",\n")
        _write_list(file, "categories", rows.categories, "}\n")


def write_parquet(lines: Path, output: Path, job: Job) -> None:
    """A row per line, its keys as columns."""
    import pyarrow as pa
    from pyarrow import parquet

    schema, rows = job.schema(), _rows(lines)
    with _replacing(output) as part, parquet.ParquetWriter(part, schema) as writer:
        while some := list(islice(rows, _ROWS)):
            writer.write_table(pa.Table.from_pylist(some, schema))


WRITERS = {".json": write_coco, ".parquet": write_parquet}
"""By the output's suffix."""


def _coco(lines: Path, rows: CocoRows) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    for row in _rows(lines):
        if row["error"] is None:
            (value,) = row["answer"].values()
            yield rows.add(row["image"], (row["width"], row["height"]), read_instances(value))


def _rows(lines: Path) -> Iterator[dict[str, Any]]:
    with lines.open("rb") as file:
        yield from map(json.loads, file)


def _write_list(file: TextIO, name: str, items: Iterable[dict[str, Any]], end: str) -> None:
    file.write(f'"{name}": [')
    for number, item in enumerate(items):
        file.write(("," if number else "") + "\n" + json.dumps(item, ensure_ascii=False))
    file.write(f"]{end}")


@contextmanager
def _replacing(output: Path) -> Iterator[Path]:
    """A file that becomes `output` when it is whole."""
    part = output.with_name(f"{output.name}.part")
    try:
        yield part
        os.replace(part, output)
    finally:
        part.unlink(missing_ok=True)
