"""Every picture decoded once, in other processes, and found again in other splits."""

import hashlib
import multiprocessing
import os
from collections import deque
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from types import TracebackType

from florence2_data.findings import Report
from florence2_data.picture_files import Seen, see_all

_BATCH = 16
_WORKERS = min(os.cpu_count() or 1, 8)
_Job = tuple[list[Path], list[str], "Future[list[Seen]]"]


class PictureCheck:
    """Takes pictures in any number; at most a few batches wait, and a digest of each path and file is kept."""

    def __init__(self, report: Report, decode: bool) -> None:
        self.report, self.decode = report, decode
        self.splits_of_path: dict[bytes, tuple[str, ...]] = {}
        self.splits_of_content: dict[bytes, tuple[str, ...]] = {}
        self.batch: list[tuple[Path, str]] = []
        self.jobs: deque[_Job] = deque()
        self.pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "PictureCheck":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._send()
            while self.jobs:
                self._receive()
        if self.pool:
            self.pool.shutdown(cancel_futures=True)

    def add(self, path: Path, split: str) -> None:
        key = hashlib.blake2b(os.path.normpath(path).encode("utf-8", "surrogateescape"), digest_size=16).digest()
        known = self.splits_of_path.get(key, ())
        self._note(self.splits_of_path, key, path, split)
        if known:
            return
        self.report.pictures += 1
        if self.decode:
            self.batch.append((path, split))
            if len(self.batch) == _BATCH:
                self._send()

    def _send(self) -> None:
        if not self.batch:
            return
        # Not fork: the caller may have threads.
        self.pool = self.pool or ProcessPoolExecutor(_WORKERS, mp_context=multiprocessing.get_context("spawn"))
        while len(self.jobs) >= 2 * _WORKERS:
            self._receive()
        paths, splits = [path for path, _ in self.batch], [split for _, split in self.batch]
        self.jobs.append((paths, splits, self.pool.submit(see_all, paths)))
        self.batch = []

    def _receive(self) -> None:
        paths, splits, future = self.jobs.popleft()
        for path, split, seen in zip(paths, splits, future.result(), strict=True):
            if seen.problem:
                self.report.add("picture", f"{split}: {seen.problem}")
            if seen.digest:
                self._note(self.splits_of_content, seen.digest, path, split)

    def _note(self, known: dict[bytes, tuple[str, ...]], key: bytes, path: Path, split: str) -> None:
        before = known.get(key, ())
        if split in before:
            return
        if before:
            self.report.add("leak", f"{path} is in {split} and in {', '.join(before)}")
        known[key] = (*before, split)
