"""The folder of a run: whose it is, and what is written there of what it is made of."""

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from florence2.files import write_whole
from florence2_training import run_state
from florence2_training.recipe import Recipe, save_recipe, saved_recipe

RECIPE, RUN = "recipe.yaml", "run.json"


@contextmanager
def claimed(run: Path, recipe: Recipe) -> Iterator[None]:
    """The folder is this recipe's, and nobody else's, for as long as it is trained."""
    if run.is_dir() and not (run / RECIPE).exists() and any(found.name not in _OURS for found in run.iterdir()):
        raise ValueError(f"{run} exists and is not a run; give another output_dir, or remove it")
    run.mkdir(parents=True, exist_ok=True)
    with (run / _LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process trains in {run}; wait for it, or give another output_dir") from None
        _claim(run, recipe)
        yield


_LOCK = ".lock"
_OURS = (_LOCK, f".{RECIPE}.part")


def _claim(run: Path, recipe: Recipe) -> None:
    path = run / RECIPE
    # A recipe that came to nothing can be mended.
    if path.exists() and run_state.newest_whole(run):
        before, now = (_flat(asdict(found)) for found in (saved_recipe(path), recipe))
        # The folder may have been moved; where features lie changes nothing.
        free = {"output_dir", "features_dir", "dataloader_num_workers", "tensorboard"}
        free |= {"logging_steps", "save_steps", "save_total_limit"}
        changed = [f"{name} was {before[name]!r}" for name in now if name not in free and now[name] != before[name]]
        if changed:
            raise ValueError(f"{run} is a run of another recipe ({'; '.join(changed)}); give another output_dir")
    save_recipe(recipe, path)


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    lora = settings.pop("lora")
    return settings | {f"lora.{name}": value for name, value in lora.items()}


def write_run(run: Path, content: dict[str, Any]) -> None:
    """RUN. Raises ValueError where a run that goes on was made of something else."""
    if run_state.newest_whole(run) and (run / RUN).exists():
        before = json.loads((run / RUN).read_text())
        same = ("sha256", "data", "mixed_precision", "frozen_sha256")
        if changed := [name for name in same if before[name] != content[name]]:
            raise ValueError(
                f"{run} was begun with another {' and '.join(changed)}, see its {RUN}; bring that back, or give "
                "another output_dir"
            )
    write_whole(run / RUN, json.dumps(content, indent=2) + "\n")
