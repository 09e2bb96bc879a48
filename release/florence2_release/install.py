"""An export becomes the next release of a repository, and what is served at the next start."""

import re
from pathlib import Path
from typing import Any

from florence2_release.ensemble import ENSEMBLE, NEXT
from florence2_release.release_record import Release
from florence2_release.repository import Repository
from florence2_release.startup import check_idle
from florence2_release.version_files import FILES, checked


def install(
    export: Path,
    folder: Path,
    name: str = ENSEMBLE,
    training: dict[str, Any] | None = None,
    profile: str | None = None,
) -> Release:
    """Adds the export as the next release and makes it what is served at the next start, for the `profile` if one is
    named. The releases before it stay as they are. Raises ValueError if `export` is not a whole export or `folder` is
    something else than a model repository of ours."""
    check_name(name)
    checked(export)
    repository = Repository(folder)
    if profile:
        repository.check_profile(profile)
    with repository.locked():
        if profile not in (None, repository.profile):
            check_idle(repository)
        repository.remove_leftovers()
        release = repository.add(export, name, training)
        repository.make_live(release, standby=None)
        repository.reconcile(profile=profile)
    return release


def check_name(name: str) -> None:
    """Raises ValueError for one that no ensemble can have."""
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", name) or name in FILES or name.endswith(NEXT) or name.startswith("."):
        raise ValueError(
            f"{name!r} can't be a model's name here: letters, digits, _ . and -, not {', '.join(FILES)}, and not "
            f"ending in {NEXT}"
        )
