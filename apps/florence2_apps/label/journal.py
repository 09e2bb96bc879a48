"""The JSON lines of a run, which tell the next one what is done."""

import fcntl
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from florence2_apps.label.job import OF_A_PICTURE, Job, same_job, to_line
from florence2_apps.label.sources import Picture

_HEAD = b'{"image": "'


class Journal:
    """Lines that are appended whole, one per picture. Use it in a `with`: one process at a time has the file.

    A line that a kill cut short is taken off. Raises ValueError if the file holds anything else than lines of this
    job, OSError if another process writes it.
    """

    def __init__(self, path: Path, job: Job) -> None:
        self.path, self.job = path, job
        self.lines = self.failed = 0
        self._done: Counter[str] = Counter()
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._read()
        except BlockingIOError:
            self.close()
            raise BlockingIOError(f"another process writes {path}; wait for it, or name another file") from None
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        os.close(self._file)

    def remaining(self, pictures: Iterable[Picture]) -> Iterator[Picture]:
        """Those without a line. A picture that is listed twice has two."""
        done = self._done.copy()
        for picture in pictures:
            if done[picture.name]:
                done[picture.name] -= 1
            else:
                yield picture

    def append(self, row: dict[str, Any]) -> None:
        line = to_line(row)
        # A single write: a kill leaves all of it in the file, or none.
        if os.write(self._file, line) != len(line):
            raise OSError(f"{self.path} can't be written to its end; make room and give the command again")
        self._count(row)

    def _read(self) -> None:
        end = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    self._cut(line, end)
                    return
                self._count(self._checked(line, number))
                end += len(line)

    def _cut(self, torn: bytes, end: int) -> None:
        if torn[: len(_HEAD)] != _HEAD[: len(torn)]:
            raise ValueError(f"{self.path} ends in what `florence2 label` never wrote; name another file")
        os.ftruncate(self._file, end)

    def _checked(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not {"image", "prompt", "error"} <= row.keys():
            raise ValueError(f"{self.path}:{number} is no line of `florence2 label`; name another file")
        asked = {key: value for key, value in row.items() if key not in OF_A_PICTURE}
        same_job(asked, self.job, self.path)
        return row

    def _count(self, row: dict[str, Any]) -> None:
        self.lines += 1
        self._done[row["image"]] += 1
        self.failed += row["error"] is not None
