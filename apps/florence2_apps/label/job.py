"""What is asked of every picture, and the line that is kept of it."""

import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from florence2_client.errors import ServerRefused
from florence2_client.results import Result

from florence2.answers import AnswerParser, Decoded
from florence2.locations import Size
from florence2.prompts import task_of

if TYPE_CHECKING:
    import pyarrow as pa

# Who refused a picture is nothing to keep.
_SERVER = re.compile(r"^\S+: (in ensemble '[^']*', )?")
_OF_A_RESULT = ("answer", "text", "sequence_score", "finish_reason", "model_version")
_ANSWERED = ("width", "height", *_OF_A_RESULT)
OF_A_PICTURE = ("image", *_ANSWERED, "error")
"""What a line holds beside what was asked."""


@dataclass(frozen=True)
class Job:
    prompt: str
    settings: dict[str, Any] = field(default_factory=dict)
    """What the client's `run` takes beside prompt and picture."""

    @property
    def asked(self) -> dict[str, Any]:
        """What all lines of a file have in common, as JSON has it."""
        given = {name: value for name, value in sorted(self.settings.items()) if value is not None}
        return {"prompt": self.prompt, **{name: list(v) if name == "region" else v for name, v in given.items()}}

    def line(self, name: str, size: Size, found: Result | Exception) -> dict[str, Any]:
        """Of a picture; all lines have the same keys. Raises what is no fault of the picture's."""
        line = {"image": name, **self.asked, **dict.fromkeys(_ANSWERED), "error": None}
        if isinstance(found, Result):
            return line | {"width": size[0], "height": size[1]} | {key: getattr(found, key) for key in _OF_A_RESULT}
        if isinstance(found, ValueError | OSError):
            return line | {"error": str(found)}
        if isinstance(found, ServerRefused) and found.status == "INVALID_ARGUMENT":
            return line | {"error": _SERVER.sub("", str(found))}
        raise found

    def schema(self) -> "pa.Schema":
        """Of the lines, as a table."""
        import pyarrow as pa

        number, text = pa.float64(), pa.string()
        asked = [(name, pa.infer_type([value])) for name, value in self.asked.items()]
        answered = zip(_ANSWERED, (pa.int64(), pa.int64(), self._answer(), text, number, text, text), strict=True)
        return pa.schema([("image", text), *asked, *answered, ("error", text)])

    def _answer(self) -> "pa.DataType":
        import pyarrow as pa

        task = task_of(self.prompt)
        key = task.token if task else self.prompt
        # What the parser makes of nothing has the keys of every answer.
        empty = AnswerParser().parse(task, Decoded("", np.zeros(0, np.int64)), [], (1, 1))
        if isinstance(empty, str):
            return pa.struct([(key, pa.string())])
        return pa.struct([(key, pa.struct([(name, _column(name)) for name in empty]))])


def to_line(row: dict[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


def same_job(asked: dict[str, Any], job: Job, output: object) -> None:
    """Raises ValueError unless `asked`, which an output was made with, is what the job asks."""
    if asked != job.asked:
        was, now = (", ".join(f"{key} {value}" for key, value in each.items()) for each in (asked, job.asked))
        raise ValueError(f"{output} was made with {was}, not with {now}; give what it was, or name another")


def _column(name: str) -> "pa.DataType":
    """Of the lists in an answer, one item per instance."""
    import pyarrow as pa

    if name.endswith("labels"):
        return pa.list_(pa.string())
    depth = 1 if name.endswith("scores") else 3 if name == "polygons" else 2
    kind = pa.float64()
    for _ in range(depth):
        kind = pa.list_(kind)
    return kind
