"""What a repository keeps of each release: release-7.json."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Release:
    """One release of one ensemble. Its number is the ensemble's version, which every response names."""

    number: int
    name: str
    """The ensemble's."""
    models: dict[str, int]
    """The version of each model."""
    files: dict[str, dict[str, str]]
    """By model: sha256 of the files of its version."""
    manifest: dict[str, Any]
    """The export's: checkpoint, precision, versions of what made it, parity."""
    training: dict[str, Any] | None = None
    """The run.json that the checkpoint comes from: hashes of base and data."""
    scores: dict[str, float] = field(default_factory=dict)
    """By name of task and metric, as served before the release went live."""
    scored_on: str | None = None
    """sha256 of the validation data."""
    standby: int | None = None
    """While it is live: the release that stays loaded, to go back to."""
    before: tuple[int, int, float] | None = None
    """What the release before had answered and failed to, and the seconds of it, while this one was a candidate."""
    outcome: str | None = None
    """What became of it: live, or why not, or why not any more. None while it is on its way."""
    forced: bool = False
    """Whether it went live although its gate refused it."""
    steps: list[dict[str, Any]] = field(default_factory=list)
    """What was done: step, seconds, time of day."""


def read(path: Path) -> Release:
    """Raises ValueError."""
    try:
        return Release(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is no record of a release ({error}); restore it, or remove it") from None
