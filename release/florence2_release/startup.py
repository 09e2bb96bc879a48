"""What is done to a repository before a server starts on it: it gets the code of this package, and loads what clients
get, not a candidate that was left when the last server ended."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from florence2.files import write_whole
from florence2.manifest import sha256_of
from florence2_release import configs
from florence2_release.ensemble import NEXT
from florence2_release.repository import Repository
from florence2_release.version_files import FILES, model_py


def prepare(
    repository: Repository,
    profile: str | None = None,
    response_cache: bool | None = False,
    engine_cache: Path | None = None,
) -> None:
    """For the `profile` that is named, with a `response_cache` or without, or as it is (None); TensorRT's engines are
    kept in `engine_cache`, or in the user's cache folder. Raises ValueError for a profile that is none, for what would
    have to be written and can't, or for engines that others may replace."""
    if profile:
        repository.check_profile(profile)
    if not repository.ensembles():
        return
    changes = profile not in (None, repository.profile) or response_cache not in (None, repository.response_cache)
    engine_cache = engine_cache and engine_cache.absolute()
    if not os.access(repository.folder, os.W_OK):
        other = profile if profile != repository.profile else None
        _check_read_only(repository, other, response_cache, engine_cache)
        _check_engine_caches(repository)
        return
    engine_cache = engine_cache or configs.user_engine_cache()
    try:
        with repository.locked(wait=False):
            if changes:
                check_idle(repository)
            # Named even if it is what was there: a kill may have left models of two.
            _write(repository, profile or repository.profile, response_cache, engine_cache)
    except BlockingIOError:
        if changes:
            raise ValueError(
                f"another command is at work on {repository.folder}; start again when it is done"
            ) from None
    _check_engine_caches(repository)


def _write(repository: Repository, profile: str, response_cache: bool | None, engine_cache: Path | None) -> None:
    for name in repository.ensembles():
        if name.endswith(NEXT):
            repository.remove_candidate(name.removesuffix(NEXT))
    repository.remove_leftovers()
    _bring_up_to_date(repository)
    repository.reconcile(profile=profile, response_cache=response_cache, engine_cache=engine_cache)
    for name in repository.ensembles():
        if number := repository.live(name):
            repository.write_ensemble(name, number, repository.pins(name))
    for folder in _engine_caches(repository):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)


def _check_read_only(
    repository: Repository, profile: str | None, response_cache: bool | None, engine_cache: Path | None
) -> None:
    """Raises ValueError if something would have to be written. `profile`: another than its own."""
    moved = engine_cache and _engine_caches(repository) - {engine_cache}
    asked = [
        *([f"--profile {profile}"] if profile else []),
        *(["--response-cache"] if response_cache and not repository.response_cache else []),
        *(["a server without --response-cache"] if repository.response_cache and response_cache is False else []),
        *([f"--engine-cache {engine_cache}"] if moved else []),
        *(["this release of florence2-triton"] if outdated(repository) else []),
    ]
    if asked:
        raise ValueError(
            f"{repository.folder} is not made for {' and '.join(asked)}, and can't be written: start the server once "
            "where it can be"
        )


def _engine_caches(repository: Repository) -> set[Path]:
    """Where the models keep TensorRT's engines."""
    places = (configs.engine_cache_of(found) for model in FILES if (found := repository.config(model)))
    return {place for place in places if place}


def _check_engine_caches(repository: Repository) -> None:
    for folder in _engine_caches(repository):
        configs.check_engine_cache(folder)


def outdated(repository: Repository) -> list[Path]:
    """Copies of model.py that another release of this package made."""
    found = []
    for model in FILES:
        own = model_py(model).read_bytes()
        copies = [path for path in repository.folder.glob(f"{model}/*/model.py") if path.parent.name.isdigit()]
        found += [path for path in copies if path.read_bytes() != own]
    return sorted(found)


def check_up_to_date(repository: Repository) -> None:
    """Raises ValueError if a server that runs was started by another release of this package."""
    wanted = repository.wanted()
    if any(int(path.parent.name) in wanted[path.parents[1].name] for path in outdated(repository)):
        raise ValueError(
            f"the models in {repository.folder} are those of another release of florence2-triton: stop and start "
            "`florence2 serve`, which brings them up to date, and give the same command again"
        )


def _bring_up_to_date(repository: Repository) -> None:
    for path in outdated(repository):
        write_whole(path, model_py(path.parents[1].name).read_text())
    # After the files, and for all: a kill in between leaves records that the next start finds.
    sha256 = {model: sha256_of(model_py(model)) for model in FILES}
    for release in repository.releases():
        before = {model: dict(files) for model, files in release.files.items()}
        for model, files in release.files.items():
            if "model.py" in files:
                files["model.py"] = sha256[model]
        if release.files != before:
            repository.write(release)


@contextlib.contextmanager
def served(repository: Repository) -> Iterator[None]:
    """While a server is on the repository."""
    if not os.access(repository.folder, os.W_OK):
        yield
        return
    with (repository.folder / ".serving").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        yield


def check_idle(repository: Repository) -> None:
    """Raises ValueError while a server is on the repository."""
    with (repository.folder / ".serving").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"a server is running on {repository.folder}; stop it to change its profile or its cache"
            ) from None
