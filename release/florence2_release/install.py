"""An export becomes the next release in a Triton model repository."""

import os
import shutil
import tempfile
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from florence2.manifest import FILE_NAME, Manifest

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
    manifest = Manifest.read(export)
    missing = [name for name in manifest.files if not (export / name).is_file()]
    if missing:
        raise ValueError(f"{export} lacks {', '.join(missing)}; export the checkpoint again")
    number = _next_number(repository)
    repository.mkdir(parents=True, exist_ok=True)
    for model, names in FILES.items():
        with _NewFolder(repository / model / str(number)) as folder:
            shutil.copy(_shipped() / model / "1" / "model.py", folder)
            for name in names:
                _link_or_copy(export / name, folder / name)
        _write_config(repository / model, _shipped_config(model))
    with _NewFolder(repository / ENSEMBLE / str(number)):
        pass
    config = _shipped_config(ENSEMBLE)
    config.version_policy.specific.versions[:] = [number]
    for step in config.ensemble_scheduling.step:
        step.model_version = number
    # Last: until the ensemble names the new versions, nothing serves them.
    _write_config(repository / ENSEMBLE, config)
    return number


def _next_number(repository: Path) -> int:
    if not repository.exists():
        return 1
    strangers = {entry.name for entry in repository.iterdir()} - {ENSEMBLE, *FILES}
    if not repository.is_dir() or strangers:
        raise ValueError(
            f"{repository} is not a model repository of florence2 (it holds {', '.join(sorted(strangers)[:3])}); "
            "give another --repository"
        )
    numbers = [int(folder.name) for folder in repository.glob("*/*") if folder.name.isdigit()]
    return max(numbers, default=0) + 1


class _NewFolder:
    """A folder that appears whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> Path:
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self.scratch = Path(tempfile.mkdtemp(prefix=".new-", dir=self.folder.parent))
        self.scratch.chmod(0o755)
        return self.scratch

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.scratch.rename(self.folder)
        else:
            shutil.rmtree(self.scratch)


def _link_or_copy(source: Path, target: Path) -> None:
    """Weights are large: a hard link where the file system has one, so that installing costs no space."""
    try:
        os.link(source, target)
    except OSError:
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
