"""What the version folders of the models hold, and whether an export has it."""

import shutil
from pathlib import Path

from florence2.manifest import Manifest, ModelSettings, sha256_of
from florence2_release import configs
from florence2_release.export_check import check_settings

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


def checked(export: Path) -> Manifest:
    """Raises ValueError for an export that is not whole, or can't be served."""
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


def hashes(model: str, export: Path, manifest: Manifest, settings: ModelSettings) -> dict[str, str]:
    """sha256 of the files of `model`'s version, by name."""
    own = {
        "model.py": sha256_of(model_py(model)),
        ModelSettings.FILE_NAME: settings.sha256(),
    }
    found = {name: own.get(name) or manifest.files[name] for name in ("model.py", *FILES[model])}
    optional = [name for name in OPTIONAL.get(model, ()) if (export / name).is_file()]
    return found | {name: sha256_of(export / name) for name in optional}


def model_py(model: str) -> Path:
    return configs.shipped() / model / "1" / "model.py"


def copy(source: Path, target: Path) -> None:
    """A copy, never a hard link: a link more or less changes the file's ctime, and Triton (24.10) then loads again what
    is serving, under which its python backend has crashed."""
    shutil.copyfile(source, target)
