"""Thousands of pictures through one server: its pipeline full, memory bounded, every line kept once it is there."""

import io
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from florence2_client import Florence2Client
from PIL import Image

from florence2.prompts import task_of
from florence2.tasks import AnswerKind
from florence2_apps.label.job import Job
from florence2_apps.label.journal import Journal
from florence2_apps.label.sources import Picture, Reading, Source
from florence2_apps.label.writers import WRITERS

RETRIES = 10
"""Of a request, so that a run outlives half a minute without a server, or with a busy one."""


@dataclass(frozen=True)
class Labelled:
    """Pictures with a line, and how many of the lines are errors."""

    pictures: int
    failed: int


def label(
    source: Source,
    job: Job,
    output: Path,
    client: Florence2Client,
    *,
    in_flight: int = 32,
    progress: Callable[[int, dict[str, Any] | None], None] = lambda done, row: None,
) -> Labelled:
    """Ask `job` of every picture of `source`, `in_flight` at once, and write .jsonl, COCO (.json) or .parquet.

    Lines go to the .jsonl of the output's name, in the order of the source. A picture that has one is not asked about
    again, so the same call goes on where another was ended. One that can't be read, here or by the server, gets a line
    with its error. `progress` is called with how many have a line, at first and with each new line.

    Raises ServerRefused when the server fails, ValueError for an output that is another job's, OSError.
    """
    lines = check_output(output, job)
    lines.parent.mkdir(parents=True, exist_ok=True)
    with Journal(lines, job) as journal:
        progress(journal.lines, None)
        remaining = journal.remaining(source)
        first = next(remaining, None)
        if first is not None:
            check_server(client, job)
            for row in rows(chain([first], remaining), job, client, in_flight):
                journal.append(row)
                progress(journal.lines, row)
        if output != lines:
            WRITERS[output.suffix](lines, output, job)
        return Labelled(journal.lines, journal.failed)


def rows(pictures: Iterable[Picture], job: Job, client: Florence2Client, in_flight: int) -> Iterator[dict[str, Any]]:
    """A line per picture. `in_flight` are with the server, twice as many at most in memory."""
    asked: deque[tuple[str, Reading]] = deque()

    def ask() -> Iterator[tuple[str, Any]]:
        for picture in pictures:
            reading = Reading(picture.image)
            asked.append((picture.name, reading))
            yield job.prompt, reading

    for found in client.run_many(ask(), in_flight=in_flight, return_exceptions=True, **job.settings):
        name, reading = asked.popleft()
        yield job.line(name, reading.size, found)


def check_server(client: Florence2Client, job: Job) -> None:
    """Ask about a picture that nothing is wrong with, so that what is refused later is a picture's fault.

    Raises ServerRefused, ValueError for settings that don't go together.
    """
    picture = io.BytesIO()
    Image.new("RGB", (32, 32)).save(picture, "PNG")
    client.run(job.prompt, picture.getvalue(), **{"max_new_tokens": 1, **job.settings})


def check_output(output: Path, job: Job) -> Path:
    """-> where the lines go. Raises ValueError for an output that can't be written, or that others wrote."""
    if output.suffix not in (".jsonl", *WRITERS):
        raise ValueError(f"{output} says no format; name a .jsonl, a .json (COCO) or a .parquet")
    task = task_of(job.prompt)
    if output.suffix == ".json" and (not task or task.answer is AnswerKind.PURE_TEXT):
        raise ValueError(f"{job.prompt} answers in text and COCO holds boxes; name a .jsonl or a .parquet")
    lines = output.with_suffix(".jsonl")
    if output.exists() and not lines.exists():
        raise ValueError(f"{output} is there without {lines}, which it would be made of; name another file")
    return lines
