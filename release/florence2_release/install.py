"""An export becomes the next release in a Triton model repository."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from florence2.manifest import FILE_NAME, Manifest, sha256_of

ENSEMBLE = "florence2"

# What each model's version folder holds beside its model.py.
FILES: dict[str, tuple[str, ...]] = {
    "preprocess": ("tokenizer.json", "preprocessor_config.json", FILE_NAME),
    "vision_encoder": ("vision_encoder.onnx", "vision_encoder.onnx.data"),
    "beam_search": (
        *("encoder.onnx", "encoder.onnx.data", "decoder.onnx", "decoder.onnx.data"),
        *("generation_config.json", FILE_NAME),
    ),
    "postprocess": ("tokenizer.json", FILE_NAME),
}


def install(export: Path, repository: Path) -> int:
    """Install the export as the next release, number 1 in a new repository, and return its number.

    What is served at the next start is this release. Releases before it stay as they are. Raises ValueError if `export`
    is not a whole export or `repository` is something else than a model repository of ours.
    """
    _check_whole(export)
    _check_repository(repository)
    repository.mkdir(parents=True, exist_ok=True)
    with _locked(repository):
        number = _next_number(repository)
        for model, names in FILES.items():
            with _new_folder(repository / model / str(number)) as folder:
                shutil.copy(_shipped() / model / "1" / "model.py", folder)
                for name in names:
                    _take(export / name, folder / name)
        with _new_folder(repository / ENSEMBLE / str(number)):
            pass
        # When all is there; the ensemble last, as it is what clients call.
        for model in (*FILES, ENSEMBLE):
            config = _shipped_config(model)
            config.version_policy.specific.versions[:] = [number]
            for step in config.ensemble_scheduling.step:
                step.model_version = number
            _write_config(repository / model, config)
    return number


def _check_whole(export: Path) -> None:
    manifest = Manifest.read(export)
    wanted = {name for names in FILES.values() for name in names} - {FILE_NAME}
    missing = [name for name in sorted(wanted | set(manifest.files)) if not (export / name).is_file()]
    if missing:
        raise ValueError(f"{export} lacks {', '.join(missing)}; export the checkpoint again")
    for name in sorted(wanted):
        if manifest.files.get(name) != sha256_of(export / name):
            raise ValueError(f"{export / name} is not the file its manifest names; export the checkpoint again")


def _check_repository(repository: Path) -> None:
    if not repository.exists():
        return
    if not repository.is_dir():
        raise ValueError(f"{repository} is not a folder; give another --repository")
    entries = {entry.name for entry in repository.iterdir() if not entry.name.startswith(".")}
    strangers = sorted(entries - {ENSEMBLE, *FILES, "lost+found"})
    if strangers:
        raise ValueError(
            f"{repository} is not a model repository of florence2 (it holds {', '.join(strangers[:3])}); "
            "give another --repository"
        )


def _next_number(repository: Path) -> int:
    numbers = [int(folder.name) for folder in repository.glob("*/*") if folder.name.isdigit()]
    return max(numbers, default=0) + 1


@contextlib.contextmanager
def _locked(repository: Path) -> Iterator[None]:
    """One release at a time; a second waits."""
    with (repository / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A folder that appears whole or not at all."""
    folder.parent.mkdir(exist_ok=True)
    for left_behind in folder.parent.glob(".new-*"):
        shutil.rmtree(left_behind)
    scratch = Path(tempfile.mkdtemp(prefix=".new-", dir=folder.parent))
    try:
        scratch.chmod(0o755)
        yield scratch
        scratch.rename(folder)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def _take(source: Path, target: Path) -> None:
    """Weights are large: a hard link where the file system has one. What people edit in place is copied."""
    if source.suffix in (".onnx", ".data"):
        with contextlib.suppress(OSError):
            os.link(source, target)
            return
    shutil.copy(source, target)


def _shipped() -> Path:
    """The model repository of this package: beside the code in a wheel, at the top of a clone."""
    for folder in (
        Path(__file__).parent / "model_repository",
        Path(__file__).parents[2] / "model_repository",
    ):
        if folder.is_dir():
            return folder
    raise FileNotFoundError("florence2-triton is installed without its model_repository; install it again")


def _shipped_config(model: str) -> ModelConfig:
    return text_format.Parse((_shipped() / model / "config.pbtxt").read_text(), ModelConfig())


def _write_config(folder: Path, config: ModelConfig) -> None:
    """In one rename, so that Triton never reads half a file."""
    scratch = folder / ".config.pbtxt"
    scratch.write_text(text_format.MessageToString(config))
    scratch.replace(folder / "config.pbtxt")
