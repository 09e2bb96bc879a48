"""JSON lines and JSON arrays, as rows with the line they begin on."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from florence2_data.record import Problem

Row = tuple[str, dict[str, Any]]
"""Where it stands, and what it says."""


def rows(path: Path) -> Iterator[Row | Problem]:
    """Streams a file of JSON lines; a file that begins with `[` and is named .json is read whole, as one array.

    A list in the place of a row holds rows: some write each line as `[{…}]`.
    """
    if path.suffix == ".json" and _begins_with(path, "["):
        yield from _array(path)
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path.name}:{number}"
            try:
                value = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                yield Problem(where, f"no JSON ({error}); write one object a line, in UTF-8")
                continue
            yield from _flat(where, value)


def _array(path: Path) -> Iterator[Row | Problem]:
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        yield Problem(f"{path.name}:1", f"no UTF-8 ({error}); save the file as UTF-8")
        return
    decoder = json.JSONDecoder()
    position, line, counted = text.index("[") + 1, 1, 0
    while True:
        while position < len(text) and text[position] in " \t\r\n,":
            position += 1
        line, counted = line + text.count("\n", counted, position), position
        where = f"{path.name}:{line}"
        if text[position : position + 1] == "]":
            return
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            yield Problem(where, f"no JSON ({error}); what follows it was not read; repair the file")
            return
        yield from _flat(where, value)


def _flat(where: str, value: Any) -> Iterator[Row | Problem]:
    if isinstance(value, dict):
        yield where, value
    elif isinstance(value, list):
        for inner in value:
            yield from _flat(where, inner)
    else:
        yield Problem(where, f"a row is an object {{…}}, not {json.dumps(value)[:40]}")


def _begins_with(path: Path, character: str) -> bool:
    with path.open("rb") as file:
        return file.read(1024).decode("utf-8-sig", "ignore").lstrip().startswith(character)
