"""Checkpoints that are whole or not there: everything a run needs to go on as if it had never stopped."""

import hashlib
import json
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from florence2.files import flush

_NAME = re.compile(r"checkpoint-(\d+)")
_COMPLETE = "complete.json"
_STATE = "training_state.pt"


@dataclass
class Progress:
    """How far a run is."""

    step: int = 0
    best: float | None = None
    best_step: int | None = None
    validations_without_better: int = 0
    scores: dict[int, dict[str, float]] = field(default_factory=dict)
    """By step."""
    stopped_early: bool = False


def folder_of(run: Path, step: int) -> Path:
    return run / f"checkpoint-{step:07}"


def whole_checkpoints(run: Path) -> list[Path]:
    """Oldest first. One that was broken off or damaged is not among them."""
    return [path for path in _checkpoints(run) if is_whole(path)]


def newest_whole(run: Path) -> Path | None:
    """The newest that is neither broken off nor damaged; those before it are not read."""
    return next((path for path in reversed(_checkpoints(run)) if is_whole(path)), None)


def is_whole(folder: Path) -> bool:
    """Every file as long as it was written, and with the same bytes."""
    return _matches(folder, _describe)


def _checkpoints(run: Path) -> list[Path]:
    found = [path for path in run.glob("checkpoint-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def _matches(folder: Path, describe: Callable[[Path], dict[str, Any]]) -> bool:
    try:
        files = json.loads((folder / _COMPLETE).read_text())["files"]
        return _STATE in files and all(
            describe(folder / name).items() <= described.items() for name, described in files.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def save_checkpoint(
    run: Path, progress: Progress, save_model: Callable[[Path], None], states: dict[str, Any], process_states: list[Any]
) -> Path:
    """Written under another name, forced to the disk, listed with its hashes, then renamed: killed or out of space
    anywhere before, it is no checkpoint. Raises OSError with what to do; nothing is left behind then."""
    folder = folder_of(run, progress.step)
    scratch = run / f".{folder.name}.part"
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        scratch.mkdir(parents=True)
        save_model(scratch)
        torch.save({"states": states, "processes": process_states}, scratch / _STATE)
        (scratch / "progress.json").write_text(json.dumps(asdict(progress)))
        files = {path.name: _describe(path) for path in sorted(scratch.iterdir())}
        (scratch / _COMPLETE).write_text(json.dumps({"files": files}))
        for path in scratch.iterdir():
            flush(path)
        flush(scratch)
        # The same step can be there: damaged, or of a run that goes on from before it.
        shutil.rmtree(folder, ignore_errors=True)
        scratch.rename(folder)
        flush(run)
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch and safetensors raise errors of their own for a full disk.
        shutil.rmtree(scratch, ignore_errors=True)
        raise OSError(
            f"{folder} could not be written ({error}); make room there and start the same command again: it goes on "
            "from the checkpoint before"
        ) from error
    return folder


def load_states(folder: Path) -> tuple[dict[str, Any], list[Any]]:
    saved = torch.load(folder / _STATE, map_location="cpu", weights_only=True)
    return saved["states"], saved["processes"]


def load_progress(folder: Path) -> Progress:
    fields = json.loads((folder / "progress.json").read_text())
    fields["scores"] = {int(step): scores for step, scores in fields["scores"].items()}
    return Progress(**fields)


def prune(run: Path, keep: int, best_step: int | None) -> None:
    """All but the last `keep`, and the best. Files are told by their lengths: their bytes take long to read."""
    folders = [path for path in _checkpoints(run) if _matches(path, _length)]
    for folder in folders[: max(len(folders) - keep, 0)]:
        if best_step is None or folder != folder_of(run, best_step):
            shutil.rmtree(folder)


def random_states() -> dict[str, Any]:
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        # As numbers: an array would have to be unpickled.
        "numpy": (name, np.asarray(keys).tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def restore_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _length(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size}


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
