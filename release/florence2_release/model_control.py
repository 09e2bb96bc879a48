"""What a running Triton has loaded, told over gRPC, and moved to what the repository's configs say."""

import logging
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tritonclient import grpc
from tritonclient.utils import InferenceServerException

from florence2.files import write_whole
from florence2_release.ensemble import NEXT
from florence2_release.release_record import Release
from florence2_release.repository import Repository
from florence2_release.version_files import FILES

logger = logging.getLogger(__name__)
LOADING, ANSWERING = 3600, 30
"""Seconds that a model may take to load, and anything else."""


class LoadError(RuntimeError):
    """Triton can't load a model; the versions that it had go on."""

    def __init__(self, model: str, reason: str) -> None:
        super().__init__(f"{model} can't be loaded: {reason}")
        self.model = model


@dataclass(frozen=True)
class Requests:
    """What an ensemble's version has answered, itself and not from the response cache."""

    answered: int = 0
    failed: int = 0
    seconds: float = 0.0
    """Of all that were answered."""

    def since(self, before: "Requests") -> "Requests":
        """Triton counts anew when the ensemble is loaded again, as it is whenever one of its models is."""
        if self.answered < before.answered or self.failed < before.failed:
            return self
        return Requests(self.answered - before.answered, self.failed - before.failed, self.seconds - before.seconds)

    @property
    def count(self) -> int:
        return self.answered + self.failed

    @property
    def mean_seconds(self) -> float | None:
        return self.seconds / self.answered if self.answered else None

    @property
    def failed_share(self) -> float:
        return self.failed / max(self.count, 1)


class Triton:
    """A server, at its gRPC endpoint. `publish`: a shell command that brings the repository to where the server reads
    it, such as `aws s3 sync`; None where it reads the folder itself. Raises RuntimeError if the server is gone."""

    def __init__(self, url: str, publish: str | None = None) -> None:
        self.url, self.publish = url, publish
        self._client = grpc.InferenceServerClient(url)
        self.check()

    def check(self) -> None:
        """Raises RuntimeError if the server is gone: no fault of what is released."""
        self._ask(self._client.is_server_live)

    def loaded(self) -> dict[str, set[int]]:
        """The versions of each model that answer."""
        found: dict[str, set[int]] = {}
        for model in self._ask(self._client.get_model_repository_index).models:
            if model.state == "READY":
                found.setdefault(model.name, set()).add(int(model.version))
        return found

    def requests(self, name: str, version: int) -> Requests:
        try:
            (stats,) = self._client.get_inference_statistics(name, str(version), client_timeout=ANSWERING).model_stats
        except InferenceServerException:
            # It isn't loaded, or the server is gone.
            self.check()
            return Requests()
        own = stats.inference_stats
        answered = own.success.count - own.cache_hit.count
        return Requests(answered, own.fail.count, max(own.success.ns - own.cache_hit.ns, 0) / 1e9)

    def reconcile(self, repository: Repository) -> None:
        """Has the server load and unload until it has what the repository says, and leaves alone what it has already.
        Nothing that answers is unloaded before what takes its place is loaded. Raises LoadError, with Triton's reason.
        """
        loaded = self.loaded()
        on_disk = {model: {v for v in loaded.get(model, ()) if _is_there(repository, model, v)} for model in FILES}
        repository.reconcile(on_disk)
        self._publish()
        for model, versions in repository.wanted().items():
            if not set(versions) <= loaded.get(model, set()):
                self._load(model)
        for name in repository.ensembles():
            version = repository.live(name)
            if version is not None and loaded.get(name, set()) != {version}:
                self._load(name)
        for name in loaded:
            if name.endswith(NEXT) and repository.live(name) is None:
                self._ask(self._client.unload_model, name)
        repository.reconcile()
        self._publish()
        loaded = self.loaded()
        for model, versions in repository.wanted().items():
            if loaded.get(model, set()) != set(versions):
                self._load(model)

    def forget(self, repository: Repository, release: Release) -> None:
        """Triton lists what it could not load as failed until the same version was loaded, and retired. Of a release
        that nobody gets: its own versions are overwritten."""
        for model, reason in sorted(self._failed(release)):
            folder = repository.folder / model / str(release.models[model])
            try:
                _make_loadable(repository, model, folder)
                repository.reconcile({model: [int(folder.name)]})
                self._publish()
                self._load(model)
            except (OSError, LoadError) as error:
                logger.warning("Triton goes on listing %s %s as failed (%s): %s", model, folder.name, reason, error)
            finally:
                repository.reconcile()
                self._publish()
            try:
                self._load(model)
            except LoadError as error:
                logger.warning("%s of release %s is still loaded: %s", model, release.number, error)

    def _failed(self, release: Release) -> set[tuple[str, str]]:
        index = self._ask(self._client.get_model_repository_index).models
        own = {(model, str(version)) for model, version in release.models.items() if version == release.number}
        retired = ("", "unloaded")
        return {
            (one.name, one.reason)
            for one in index
            if (one.name, one.version) in own and one.state == "UNAVAILABLE" and one.reason not in retired
        }

    def _publish(self) -> None:
        if self.publish:
            done = subprocess.run(self.publish, shell=True, stderr=subprocess.PIPE, text=True)
            if done.returncode:
                raise RuntimeError(f"--publish {self.publish!r} failed: {done.stderr.strip()}; start again")

    def _load(self, model: str) -> None:
        try:
            self._client.load_model(model, client_timeout=LOADING)
        except InferenceServerException as error:
            self.check()
            raise LoadError(model, error.message()) from error

    def _ask(self, call: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return call(*arguments, client_timeout=ANSWERING)
        except InferenceServerException as error:
            raise RuntimeError(
                f"no server at {self.url} ({error.message()}); start it, and give the same command again"
            ) from error


def _make_loadable(repository: Repository, model: str, folder: Path) -> None:
    """As small as can be of a python model; of a model of Triton's own backends another version's files."""
    config = repository.config(model)
    if config is not None and config.backend == "python":
        write_whole(folder / "model.py", _LOADS)
        return
    live = repository.folder / model / str(max(repository.wanted()[model]))
    for path in live.iterdir():
        shutil.copyfile(path, folder / path.name)


_LOADS = """class TritonPythonModel:
    def execute(self, requests):
        raise RuntimeError("a release that was refused")
"""


def _is_there(repository: Repository, model: str, version: int) -> bool:
    return (repository.folder / model / str(version)).is_dir()
