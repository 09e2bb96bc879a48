"""What the tests of hostile checkpoints and exports share."""

import contextlib
import copy
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import checkpoints as make
import pytest
from florence2_export.checkpoint import CheckpointError, load_checkpoint
from hypothesis import strategies as st


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(str(folder))
    message = str(caught.value)
    assert message.isprintable(), message
    assert len(message) <= 1000, message
    for word in words:
        assert word in message, message


def put(folder: Path, file: str, name: str, value: Any) -> None:
    def change(content: dict[str, Any]) -> None:
        *parents, last = name.split(".")
        for parent in parents:
            content = content.setdefault(parent, {})
        content[last] = value

    make.edit_json(folder / file, change)


@contextlib.contextmanager
def pipe(path: Path) -> Iterator[None]:
    """A named pipe. Whoever reads it all the same finds something, so that the test fails instead of waiting."""
    os.mkfifo(path)
    writer = Thread(target=lambda: path.write_text("{}"))
    writer.start()
    try:
        yield
    finally:
        while writer.is_alive():
            reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            time.sleep(0.01)
            os.close(reader)


ODD = (
    *(None, True, False, 0, 1, -1, 2, 3, 16, 64, 10**5, 10**9, 2**63, 10**400),
    *(0.0, 1.0, 3.0, -0.5, 1e308, float("nan"), float("inf")),
    *("", "gelu", "prelu", "never", "\ud800", "\0", "a\nb", [], {}, [[]], [None], [0] * 4, [1] * 4, [10**9] * 4),
)
JSON = st.recursive(
    st.sampled_from(ODD) | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def mutated(draw: st.DrawFn, text: str) -> str:
    """The JSON with other values, or none, in one to three places at any depth."""
    content = json.loads(text)
    for _ in range(draw(st.integers(1, 3))):
        parent, key = draw(st.sampled_from(_places(content)))
        if draw(st.booleans()) or not isinstance(parent, dict):
            # A copy: what stands in ODD is everybody's, and could be put into itself.
            parent[key] = copy.deepcopy(draw(JSON))
        else:
            parent.pop(key)
    return json.dumps(content)


def _places(content: Any) -> list[tuple[Any, Any]]:
    if not isinstance(content, dict | list):
        return []
    keys = list(content) if isinstance(content, dict) else list(range(len(content)))
    return [(content, key) for key in keys] + [place for key in keys for place in _places(content[key])]
