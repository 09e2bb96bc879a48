"""A run, an adapter, a checkpoint or an export -> an export, kept where an interrupted command finds it again."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from florence2.manifest import FILE_NAME

_RUN, _ADAPTER = "run.json", "adapter_config.json"


@dataclass(frozen=True)
class Prepared:
    export: Path
    training: dict[str, Any] | None
    """run.json of the run that the checkpoint comes from."""
    scratch: Path | None = None
    """Not needed any more when it is released."""


def prepare(source: str, work: Path, say: Callable[[str], None]) -> Prepared:
    """Merges and exports what has to be. Raises ValueError for what can't be."""
    folder = Path(source)
    if (folder / FILE_NAME).is_file():
        return Prepared(folder, None)
    run = next((place for place in (folder, folder.parent) if (place / _RUN).is_file()), None)
    if folder.is_dir() and not run and not any((folder / name).is_file() for name in (_ADAPTER, "config.json")):
        raise ValueError(
            f"{folder} is no export, checkpoint, run or adapter; make one with `florence2 train` or `florence2 export`"
        )
    training = json.loads((run / _RUN).read_text()) if run else None
    scratch = work / hashlib.sha256(_fingerprint(folder, source).encode()).hexdigest()[:16]
    export = scratch / "export"
    checkpoint = source
    if run or (folder / _ADAPTER).is_file():
        checkpoint = str(scratch / "checkpoint")
        if not Path(checkpoint).is_dir():
            say(f"merging {source}")
            _florence2("merge", source, "--output", checkpoint)
    say(f"exporting {checkpoint}")
    # Which finds out for itself whether there is anything to do.
    _florence2("export", checkpoint, "--output", str(export))
    return Prepared(export, training, scratch)


def _florence2(*arguments: str) -> None:
    """In a process of its own, behind whatever clients ask. Raises RuntimeError with its last line."""
    command = ["nice", "-n", "19", sys.executable, "-m", "florence2_cli", *arguments]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode < 0:
        raise RuntimeError(f"florence2 {arguments[0]} was ended by signal {-done.returncode}; was there memory enough?")
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1].removeprefix("florence2: "))


def _fingerprint(folder: Path, source: str) -> str:
    """Another one when the source's files change."""
    if not folder.is_dir():
        return source
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    stamps = [f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files]
    return "\n".join([str(folder.resolve()), *stamps])
