"""Files and folders that are whole or not there, also where the power goes."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """In place of what is there, or not at all."""
    scratch = path.with_name(f".{path.name}.part")
    scratch.write_text(text)
    flush(scratch)
    scratch.replace(path)
    flush(path.parent)


def flush(path: Path) -> None:
    """A file's content, or a folder's names, onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder that appears whole or not at all."""
    folder.parent.mkdir(exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".new-", dir=folder.parent))
    try:
        scratch.chmod(0o755)
        yield scratch
        for path in (*scratch.iterdir(), scratch):
            flush(path)
        scratch.rename(folder)
        flush(folder.parent)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
