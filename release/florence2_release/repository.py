"""A Triton model repository on disk: releases, the versions of models that each is made of, and what Triton is to load.

Every change is whole or not there: a kill at any moment leaves a repository that serves a whole release.

    REPO/preprocess, vision_encoder, beam_search, postprocess   versions named after the release that brought them
    REPO/florence2                                              what clients call: config.pbtxt pins a version of each
    REPO/florence2_next                                         a release that is not live yet, while it is looked at
    REPO/release-7.json                                         what release 7 is made of, and what became of it

Records lie beside the models, not in them: Triton takes every folder for a model, and what changes in one for a reason
to load it again.
"""

import contextlib
import fcntl
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tritonclient.grpc.model_config_pb2 import ModelConfig

from florence2.manifest import FILE_NAME, Manifest, ModelSettings, sha256_of
from florence2_release import configs
from florence2_release.export_check import check_settings

logger = logging.getLogger(__name__)
ENSEMBLE = "florence2"
NEXT = "_next"
"""Behind the name of an ensemble: the release of it that is looked at."""
OTHERS = ("lost+found",)
"""Folders that are nobody's models."""
_RECORD = re.compile(r"release-(\d+)\.json")

ARRIVAL = "arrival"
"""The tensor that tells when a request came; to a step that takes none, it comes when it comes there."""
OPTIONAL = {"vision_encoder": ("vision_encoder.plan",)}
"""What a version folder holds if the export has it: TensorRT's plan, made on the machine that serves."""

# What each model's version folder holds beside its model.py.
FILES: dict[str, tuple[str, ...]] = {
    "preprocess": ("tokenizer.json", "preprocessor_config.json", ModelSettings.FILE_NAME),
    "vision_encoder": ("vision_encoder.onnx", "vision_encoder.onnx.data"),
    "beam_search": (
        *("encoder.onnx", "encoder.onnx.data", "decoder.onnx", "decoder.onnx.data", "relayout.onnx"),
        *("generation_config.json", ModelSettings.FILE_NAME),
    ),
    "postprocess": ("tokenizer.json", ModelSettings.FILE_NAME),
}


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
    """What the release before had answered and failed to, and the seconds of it, while this one was looked at."""
    outcome: str | None = None
    """What became of it: live, or why not, or why not any more. None while it is on its way."""
    forced: bool = False
    """Whether it went live although its gate refused it."""
    steps: list[dict[str, Any]] = field(default_factory=list)
    """What was done: step, seconds, time of day."""


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
        folders = {entry.name for entry in self.folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")}
        strangers = sorted(folders - {*FILES, *self.ensembles(), *OTHERS})
        if strangers:
            raise ValueError(
                f"{self.folder} is not a model repository of florence2 (it holds {', '.join(strangers[:3])}); "
                "give another --repository"
            )

    # --- what is there ---

    def ensembles(self) -> list[str]:
        """Names that clients call, and those of releases that are looked at."""
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted(path.name for path in found if path.name not in (*FILES, *OTHERS) and _is_ours(path))

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
        return sorted((_read(path) for path in records), key=lambda release: release.number)

    def release(self, number: int) -> Release:
        """Raises ValueError for a number that is none."""
        path = self.file_of(number, "json")
        if not path.is_file():
            raise ValueError(f"{self.folder} has no record of a release {number}; `florence2 releases` lists them")
        return _read(path)

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
        manifest = _checked(export)
        number = self._next_number()
        settings = ModelSettings(manifest.sizes, manifest.banned_grounding_phrases)
        files = {model: _hashes(model, export, manifest, settings) for model in FILES}
        models = {model: self._shared(model, files[model]) or number for model in FILES}
        release = Release(number, name, models, files, json.loads((export / FILE_NAME).read_text()), training)
        try:
            for model in [model for model, version in models.items() if version == number]:
                with _new_folder(self.folder / model / str(number)) as folder:
                    _take(_model_py(model), folder / "model.py")
                    for file in files[model]:
                        if file == ModelSettings.FILE_NAME:
                            settings.write(folder)
                        elif file != "model.py":
                            _take(export / file, folder / file)
            self.write(release)
        except OSError as error:
            self.sweep()
            raise OSError(f"release {number} could not be written ({error}); make room and start again") from error
        return release

    def sweep(self) -> None:
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
        configs.write_whole(self.file_of(release.number, "json"), json.dumps(asdict(release), indent=2) + "\n")

    def offer(self, release: Release) -> None:
        """Makes it callable under its name with `_next`."""
        self.settle(release.models)
        self._write_ensemble(release.name + NEXT, release.number, release.models)

    def withdraw(self, name: str) -> None:
        """No release of that name is looked at any more."""
        folder = self.folder / (name + NEXT)
        # First what Triton goes by: a kill must not leave a model without its version.
        (folder / configs.FILE_NAME).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)

    def tidy(self, profile: str | None = None, response_cache: bool = False, engine_cache: Path | None = None) -> None:
        """Before a server starts: it loads what clients get, not what was looked at when the last one ended, with the
        code of this package, and for the `profile` that is named. TensorRT's engines are kept in `engine_cache`, or
        in the user's cache folder. Raises ValueError for a profile that is none, for what would have to be written and
        can't, or for engines that others may replace."""
        if profile:
            self.check_profile(profile)
        if not self.ensembles():
            return
        changes = profile not in (None, self.profile)
        engine_cache = engine_cache and engine_cache.absolute()
        if not os.access(self.folder, os.W_OK):
            moved = engine_cache and self._engine_caches() - {engine_cache}
            asked = [
                *([f"--profile {profile}"] if changes else []),
                *(["--response-cache"] if response_cache and not self.response_cache else []),
                *(["a server without --response-cache"] if self.response_cache and not response_cache else []),
                *([f"--engine-cache {engine_cache}"] if moved else []),
                *(["this release of florence2-triton"] if self.outdated() else []),
            ]
            if asked:
                raise ValueError(
                    f"{self.folder} is not made for {' and '.join(asked)}, and can't be written: start the server once "
                    "where it can be"
                )
            self._check_engine_caches()
            return
        engine_cache = engine_cache or configs.user_engine_cache()
        try:
            with self.locked(wait=False):
                if changes:
                    self.check_idle()
                for name in self.ensembles():
                    if name.endswith(NEXT):
                        self.withdraw(name.removesuffix(NEXT))
                self.sweep()
                self._bring_up_to_date()
                # Named even if it is what was there: a kill may have left models of two.
                self.settle(profile=profile or self.profile, response_cache=response_cache, engine_cache=engine_cache)
                for name in self.ensembles():
                    self._write_ensemble(name, self.live(name), self.pins(name))
                for folder in self._engine_caches():
                    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except BlockingIOError:
            if changes:
                raise ValueError(f"another command is at work on {self.folder}; start again when it is done") from None
        self._check_engine_caches()

    def _engine_caches(self) -> set[Path]:
        """Where the models keep TensorRT's engines."""
        places = (configs.engine_cache_of(found) for model in FILES if (found := self.config(model)))
        return {place for place in places if place}

    def _check_engine_caches(self) -> None:
        for folder in self._engine_caches():
            configs.check_engine_cache(folder)

    def outdated(self) -> list[Path]:
        """Copies of model.py that another release of this package made."""
        found = []
        for model in FILES:
            own = _model_py(model).read_bytes()
            copies = [path for path in self.folder.glob(f"{model}/*/model.py") if path.parent.name.isdigit()]
            found += [path for path in copies if path.read_bytes() != own]
        return sorted(found)

    def check_up_to_date(self) -> None:
        """Raises ValueError if a server that runs was started by another release of this package."""
        wanted = self.wanted()
        if any(int(path.parent.name) in wanted[path.parents[1].name] for path in self.outdated()):
            raise ValueError(
                f"the models in {self.folder} are those of another release of florence2-triton: stop and start "
                "`florence2 serve`, which brings them up to date, and give the same command again"
            )

    def _bring_up_to_date(self) -> None:
        for path in self.outdated():
            configs.write_whole(path, _model_py(path.parents[1].name).read_text())
        # After the files, and for all: a kill in between leaves records that the next start finds.
        sha256 = {model: sha256_of(_model_py(model)) for model in FILES}
        for release in self.releases():
            before = {model: dict(files) for model, files in release.files.items()}
            for model, files in release.files.items():
                if "model.py" in files:
                    files["model.py"] = sha256[model]
            if release.files != before:
                self.write(release)

    @contextlib.contextmanager
    def served(self) -> Iterator[None]:
        """While a server is on the repository."""
        if not os.access(self.folder, os.W_OK):
            yield
            return
        with (self.folder / ".serving").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            yield

    def check_idle(self) -> None:
        """Raises ValueError while a server is on the repository."""
        with (self.folder / ".serving").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"a server is running on {self.folder}; stop it to change the profile") from None

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
        self.settle(release.models)
        release.standby = standby
        self.write(release)
        self._write_ensemble(release.name, release.number, release.models)
        release.outcome = "live"
        self.write(release)

    def settle(
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
                configs.settle(self.folder / model, sorted({*versions, *added}), profile, response_cache, engine_cache)

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

    def prune(self, keep: int) -> list[Release]:
        """Removes the models of all but the last `keep` releases of each name that have any, of none that is live,
        looked at or gone back to; returns those that lost something. Records stay. Raises ValueError."""
        if keep < 0:
            raise ValueError(f"releases to keep are counted from 0 on, not {keep}")
        removed = []
        for name in self.names():
            own = [release for release in self.releases() if release.name == name and self.is_there(release)]
            for release in own[: max(len(own) - keep, 0)]:
                if self.state(release) not in ("live", "standby", "looked at"):
                    self.remove_models(release)
                    removed.append(release)
        return removed

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

    def _write_ensemble(self, name: str, number: int | None, models: Mapping[str, int]) -> None:
        assert number is not None
        source = configs.shipped() / ENSEMBLE / configs.FILE_NAME
        config = configs.parsed(source)
        config.name = name
        config.version_policy.specific.versions[:] = [number]
        for step in config.ensemble_scheduling.step:
            step.model_version = models[step.model_name]
            if not self._takes_arrival(step.model_name):
                step.input_map.pop(ARRIVAL, None)
        version = self.folder / name / str(number)
        version.mkdir(parents=True, exist_ok=True)
        if not (version / "release.txt").is_file():
            # Object storage has no empty folders.
            configs.write_whole(version / "release.txt", f"release-{number}.json\n")
        path = self.folder / name / configs.FILE_NAME
        if not path.is_file() or configs.parsed(path) != config:
            configs.write(path, config, source)

    def _takes_arrival(self, model: str) -> bool:
        """Not what Triton's own backends run."""
        config = self.config(model)
        return config is not None and any(one.name == ARRIVAL for one in config.input)


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
    _checked(export)
    repository = Repository(folder)
    if profile:
        repository.check_profile(profile)
    with repository.locked():
        if profile not in (None, repository.profile):
            repository.check_idle()
        repository.sweep()
        release = repository.add(export, name, training)
        repository.make_live(release, standby=None)
        repository.settle(profile=profile)
    return release


def check_name(name: str) -> None:
    """Raises ValueError for one that no ensemble can have."""
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", name) or name in FILES or name.endswith(NEXT) or name.startswith("."):
        raise ValueError(
            f"{name!r} can't be a model's name here: letters, digits, _ . and -, not {', '.join(FILES)}, and not "
            f"ending in {NEXT}"
        )


def _is_ours(folder: Path) -> bool:
    """Whether it is an ensemble of ours, or what a kill left of one."""
    if (folder / configs.FILE_NAME).is_file():
        return {step.model_name for step in configs.parsed(folder / configs.FILE_NAME).ensemble_scheduling.step} == set(
            FILES
        )
    if not folder.is_dir():
        return False
    # Version folders, as far as the kill let them come.
    known = {"release.txt", ".release.txt.part"}
    return all(entry.is_dir() and {path.name for path in entry.iterdir()} <= known for entry in folder.iterdir())


def _versions(given: Collection[int] | int) -> Collection[int]:
    return (given,) if isinstance(given, int) else given


def _checked(export: Path) -> Manifest:
    manifest = Manifest.read(export)
    wanted = {name for names in FILES.values() for name in names} - {ModelSettings.FILE_NAME}
    missing = [name for name in sorted(wanted | set(manifest.files)) if not (export / name).is_file()]
    if missing:
        raise ValueError(f"{export} lacks {', '.join(missing)}; export the checkpoint again")
    for name in sorted(wanted):
        if manifest.files.get(name) != sha256_of(export / name):
            raise ValueError(f"{export / name} is not the file its manifest names; export the checkpoint again")
    check_settings(export, manifest)
    return manifest


def _hashes(model: str, export: Path, manifest: Manifest, settings: ModelSettings) -> dict[str, str]:
    own = {
        "model.py": sha256_of(_model_py(model)),
        ModelSettings.FILE_NAME: settings.sha256(),
    }
    found = {name: own.get(name) or manifest.files[name] for name in ("model.py", *FILES[model])}
    optional = [name for name in OPTIONAL.get(model, ()) if (export / name).is_file()]
    return found | {name: sha256_of(export / name) for name in optional}


def _model_py(model: str) -> Path:
    return configs.shipped() / model / "1" / "model.py"


def _read(path: Path) -> Release:
    try:
        return Release(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is no record of a release ({error}); restore it, or remove it") from None


@contextlib.contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A folder that appears whole or not at all."""
    folder.parent.mkdir(exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".new-", dir=folder.parent))
    try:
        scratch.chmod(0o755)
        yield scratch
        for path in (*scratch.iterdir(), scratch):
            configs.flush(path)
        scratch.rename(folder)
        configs.flush(folder.parent)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def _take(source: Path, target: Path) -> None:
    """A copy, never a hard link: a link more or less changes the file's ctime, and Triton (24.10) then loads again what
    is serving, under which its python backend has crashed."""
    shutil.copyfile(source, target)
