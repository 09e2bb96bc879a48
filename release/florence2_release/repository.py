"""A Triton model repository on disk: releases, the versions of models that each is made of, and what Triton is to load.

Every change is whole or not there: a kill at any moment leaves a repository that serves a whole release.

    REPO/preprocess, vision_encoder, beam_search, postprocess   versions named after the release that brought them
    REPO/florence2                                              what clients call: config.pbtxt pins a version of each
    REPO/florence2_next                                         a candidate: a release that is not live yet
    REPO/release-7.json                                         what release 7 is made of, and what became of it

Records lie beside the models, not in them: Triton takes every folder for a model, and what changes in one for a reason
to load it again.
"""

import contextlib
import fcntl
import json
import logging
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tritonclient.grpc.model_config_pb2 import ModelConfig

from florence2.files import new_folder, write_whole
from florence2.manifest import FILE_NAME, ModelSettings, sha256_of
from florence2_release import configs, ensemble, release_record
from florence2_release.ensemble import ARRIVAL, NEXT, is_ours
from florence2_release.release_record import Release
from florence2_release.version_files import FILES, checked, copy, hashes, model_py

logger = logging.getLogger(__name__)
OTHERS = ("lost+found",)
"""Folders that are nobody's models."""
_RECORD = re.compile(r"release-(\d+)\.json")


class Repository:
    """The folder; every path of it is made here."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextlib.contextmanager
    def locked(self, wait: bool = True) -> Iterator[None]:
        """One command at a time; a second waits, or else gets BlockingIOError. Raises ValueError where the folder is
        something else."""
        lock = self.folder / ".lock"
        if not lock.exists():
            # Nothing is written into somebody else's folder.
            self.check()
        self.folder.mkdir(parents=True, exist_ok=True)
        with lock.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not wait:
                    raise
                logger.warning("waiting for another command on %s", self.folder)
                fcntl.flock(file, fcntl.LOCK_EX)
            self.check()
            yield

    def check(self) -> None:
        if not self.folder.exists():
            return
        if not self.folder.is_dir():
            raise ValueError(f"{self.folder} is not a folder; give another --repository")
        if self.folder.resolve() == configs.shipped().resolve():
            raise ValueError(f"{self.folder} is what this program makes repositories from; give another --repository")
        folders = {entry.name for entry in self.folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")}
        strangers = sorted(folders - {*FILES, *self.ensembles(), *OTHERS})
        if strangers:
            raise ValueError(
                f"{self.folder} is not a model repository of florence2 (it holds {', '.join(strangers[:3])}); "
                "give another --repository"
            )

    # --- what is there ---

    def ensembles(self) -> list[str]:
        """Names that clients call, and those of candidates."""
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted(path.name for path in found if path.name not in (*FILES, *OTHERS) and is_ours(path))

    def names(self) -> list[str]:
        """Names that clients call."""
        return [name for name in self.ensembles() if not name.endswith(NEXT)]

    def live(self, name: str) -> int | None:
        """The release that the ensemble's config.pbtxt names: what Triton loads at its next start, if not before."""
        config = self.config(name)
        return config.version_policy.specific.versions[0] if config else None

    def pins(self, name: str) -> dict[str, int]:
        """The version of each model that the ensemble is made of."""
        config = self.config(name)
        return {step.model_name: step.model_version for step in config.ensemble_scheduling.step} if config else {}

    def config(self, model: str) -> ModelConfig | None:
        path = self.folder / model / configs.FILE_NAME
        return configs.parsed(path) if path.is_file() else None

    def releases(self) -> list[Release]:
        """All that have a record, oldest first."""
        records = [path for path in self.folder.glob("release-*.json") if _RECORD.fullmatch(path.name)]
        return sorted((release_record.read(path) for path in records), key=lambda release: release.number)

    def release(self, number: int) -> Release:
        """Raises ValueError for a number that is none."""
        path = self.file_of(number, "json")
        if not path.is_file():
            raise ValueError(f"{self.folder} has no record of a release {number}; `florence2 releases` lists them")
        return release_record.read(path)

    def file_of(self, number: int, kind: str) -> Path:
        """The release's record, "json", or a report about it, "scores.html"."""
        return self.folder / f"release-{number}.{kind}"

    def is_there(self, release: Release) -> bool:
        """Whether its models have not been removed."""
        return all((self.folder / model / str(version)).is_dir() for model, version in release.models.items())

    def damage(self, release: Release) -> str | None:
        """The first file that is not what it was, or missing."""
        for model, files in release.files.items():
            for name, sha256 in files.items():
                path = self.folder / model / str(release.models[model]) / name
                if not path.is_file() or sha256_of(path) != sha256:
                    return str(path)
        return None

    def wanted(self) -> dict[str, list[int]]:
        """The versions of each model that Triton is to have loaded: of every ensemble, and of the releases to go back
        to."""
        found: dict[str, set[int]] = {model: set() for model in FILES}
        for name in self.ensembles():
            for model, version in self.pins(name).items():
                found[model].add(version)
        records = {release.number: release for release in self.releases()}
        for release in records.values():
            if release.standby in records and self.live(release.name) == release.number:
                for model, version in records[release.standby].models.items():
                    found[model].add(version)
        return {model: sorted(versions) for model, versions in found.items()}

    # --- what changes it ---

    def add(self, export: Path, name: str, training: dict[str, Any] | None = None) -> Release:
        """A new release, its models beside the others: those with the same bytes are shared. Nothing that is served
        changes. Raises ValueError for an export that is not whole."""
        manifest = checked(export)
        number = self._next_number()
        settings = ModelSettings(manifest.sizes, manifest.banned_grounding_phrases)
        files = {model: hashes(model, export, manifest, settings) for model in FILES}
        models = {model: self._shared(model, files[model]) or number for model in FILES}
        release = Release(number, name, models, files, json.loads((export / FILE_NAME).read_text()), training)
        try:
            for model in [model for model, version in models.items() if version == number]:
                with new_folder(self.folder / model / str(number)) as folder:
                    copy(model_py(model), folder / "model.py")
                    for file in files[model]:
                        if file == ModelSettings.FILE_NAME:
                            settings.write(folder)
                        elif file != "model.py":
                            copy(export / file, folder / file)
            self.write(release)
        except OSError as error:
            self.remove_leftovers()
            raise OSError(f"release {number} could not be written ({error}); make room and start again") from error
        return release

    def remove_leftovers(self) -> None:
        """Removes what a kill or a full disk left of a release that never came to be."""
        for left_behind in (*self.folder.glob("*/.new-*"), *self.folder.glob("**/.*.part")):
            shutil.rmtree(left_behind) if left_behind.is_dir() else left_behind.unlink()
        for name in self.ensembles():
            if self.config(name) is None:
                # Triton would not start with it.
                shutil.rmtree(self.folder / name)
        numbers = {release.number for release in self.releases()}
        pinned = {version for name in self.ensembles() for version in self.pins(name).values()}
        for folder in [path for path in self.folder.glob("*/*") if path.name.isdigit()]:
            # Releases from before there were records are left alone.
            if int(folder.name) > max(numbers | pinned, default=0):
                shutil.rmtree(folder)

    def write(self, release: Release) -> None:
        write_whole(self.file_of(release.number, "json"), json.dumps(asdict(release), indent=2) + "\n")

    def add_candidate(self, release: Release) -> None:
        """Makes it callable under its name with `_next`."""
        self.reconcile(release.models)
        self.write_ensemble(release.name + NEXT, release.number, release.models)

    def remove_candidate(self, name: str) -> None:
        """There is no candidate of that name any more."""
        folder = self.folder / (name + NEXT)
        # First what Triton goes by: a kill must not leave a model without its version.
        (folder / configs.FILE_NAME).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)

    @property
    def profile(self) -> str:
        """What the models are configured for. A model that has no config for it is of cpu."""
        found = [configs.profile_of(config) for model in FILES if (config := self.config(model))]
        return next((profile for profile in found if profile != configs.CPU), configs.CPU)

    @property
    def response_cache(self) -> bool:
        """Whether the models are configured for it."""
        return any(config.response_cache.enable for model in configs.CACHED if (config := self.config(model)))

    def check_profile(self, profile: str) -> None:
        """Raises ValueError for one that neither this package has nor the repository."""
        known = {configs.CPU, *(path.stem for path in configs.shipped().glob("*/configs/*.pbtxt"))}
        known |= {path.stem for path in self.folder.glob("*/configs/*.pbtxt")}
        if profile not in known:
            raise ValueError(f"there is no profile {profile!r}; there are {', '.join(sorted(known))}")

    def make_live(self, release: Release, standby: int | None) -> None:
        """From the next load of its ensemble on, or the next start, it is what clients get."""
        # Its models are in their configs before an ensemble needs them.
        self.reconcile(release.models)
        release.standby = standby
        self.write(release)
        self.write_ensemble(release.name, release.number, release.models)
        release.outcome = "live"
        self.write(release)

    def reconcile(
        self,
        *also: Mapping[str, Collection[int] | int],
        profile: str | None = None,
        response_cache: bool | None = None,
        engine_cache: Path | None = None,
    ) -> None:
        """Writes the versions that are wanted into the models' configs, and `also` others. What is not named stays as
        it is, the profile too."""
        for model, versions in self.wanted().items():
            added = {version for one in also for version in _versions(one.get(model, ()))}
            if versions or added:
                configs.write_model(
                    self.folder / model, sorted({*versions, *added}), profile, response_cache, engine_cache
                )

    def remove_models(self, release: Release) -> None:
        """Its models that no other release has. Its record stays: its number is never used again."""
        used = {
            (model, version)
            for other in self.releases()
            if other.number != release.number and self.is_there(other)
            for model, version in other.models.items()
        }
        wanted = self.wanted()
        for model, version in release.models.items():
            if (model, version) not in used and version not in wanted[model]:
                shutil.rmtree(self.folder / model / str(version), ignore_errors=True)

    def state(self, release: Release) -> str:
        """In words."""
        if self.live(release.name) == release.number:
            return "live"
        if self.live(release.name + NEXT) == release.number:
            return "looked at"
        live = self.live(release.name)
        if any(one.number == live and one.standby == release.number for one in self.releases()):
            return "standby"
        return "replaced" if release.outcome == "live" else release.outcome or "not finished"

    # --- how ---

    def write_ensemble(self, name: str, number: int, models: Mapping[str, int]) -> None:
        # What Triton's own backends run takes no such tensor.
        configs_of = {model: self.config(model) for model in models}
        told = [
            model for model, config in configs_of.items() if config and ARRIVAL in {one.name for one in config.input}
        ]
        ensemble.write(self.folder / name, number, models, told)

    def _next_number(self) -> int:
        numbers = [int(folder.name) for folder in self.folder.glob("*/*") if folder.name.isdigit()]
        return max([*numbers, *(release.number for release in self.releases())], default=0) + 1

    def _shared(self, model: str, files: dict[str, str]) -> int | None:
        """A version that has these bytes."""
        for release in reversed(self.releases()):
            folder = self.folder / model / str(release.models[model])
            if release.files[model] == files and all(
                (folder / name).is_file() and sha256_of(folder / name) == sha256 for name, sha256 in files.items()
            ):
                return release.models[model]
        return None


def _versions(given: Collection[int] | int) -> Collection[int]:
    return (given,) if isinstance(given, int) else given
