"""config.pbtxt of a model in a repository: what this package ships for its profile, with the versions that Triton is to
load, and what was set there by hand.

Triton's own --model-config-name is not for a repository that changes while it is served: where configs/PROFILE.pbtxt
is written, Triton (24.10) takes the whole model for changed and loads all of its versions again, under traffic. So the
profile's config is the model's config.pbtxt, and configs/ is touched only before a server starts.
"""

from collections.abc import Sequence
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

FILE_NAME = "config.pbtxt"
CPU = "cpu"
_PROFILE = "profile"
"""The parameter that tells which profile a config is of."""


def settle(model: Path, versions: Sequence[int], profile: str | None) -> None:
    """Writes `model`'s config.pbtxt for these versions. Parameters and instances that were set in it stay, for every
    profile apart: those of the one that is left wait in configs/."""
    path = model / FILE_NAME
    before = parsed(path) if path.is_file() else None
    current = profile_of(before) if before else CPU
    wanted = profile or current
    if not _has(model, wanted):
        wanted = current
    if before and wanted != current:
        write(model / "configs" / f"{current}.pbtxt", before)
    if wanted != current:
        kept = model / "configs" / f"{wanted}.pbtxt"
        before = parsed(kept) if kept.is_file() else None
    source = _source(shipped() / model.name, wanted)
    config = ModelConfig()
    config.CopyFrom(parsed(source) if source.is_file() else before)
    if before:
        for key, parameter in before.parameters.items():
            if key in config.parameters:
                config.parameters[key].CopyFrom(parameter)
        del config.instance_group[:]
        config.instance_group.extend(before.instance_group)
    if wanted != CPU:
        config.parameters[_PROFILE].string_value = wanted
    config.version_policy.specific.versions[:] = versions
    if not path.is_file() or config != parsed(path):
        write(path, config)


def profile_of(config: ModelConfig) -> str:
    return config.parameters[_PROFILE].string_value if _PROFILE in config.parameters else CPU


def _has(model: Path, profile: str) -> bool:
    """Whether this model differs in the profile at all."""
    return any(_source(folder, profile).is_file() for folder in (shipped() / model.name, model))


def _source(folder: Path, profile: str) -> Path:
    return folder / FILE_NAME if profile == CPU else folder / "configs" / f"{profile}.pbtxt"


def shipped() -> Path:
    """The model repository of this package: beside the code in a wheel, at the top of a clone."""
    for folder in (
        Path(__file__).parent / "model_repository",
        Path(__file__).parents[2] / "model_repository",
    ):
        if folder.is_dir():
            return folder
    raise FileNotFoundError("florence2-triton is installed without its model_repository; install it again")


def parsed(path: Path) -> ModelConfig:
    try:
        return text_format.Parse(path.read_text(), ModelConfig(), allow_unknown_field=True)
    except text_format.ParseError as error:
        raise ValueError(f"{path} can't be read ({error}); correct it") from None


def write(path: Path, config: ModelConfig) -> None:
    """In one rename, so that Triton never reads half a file."""
    path.parent.mkdir(exist_ok=True)
    write_whole(path, text_format.MessageToString(config))


def write_whole(path: Path, text: str) -> None:
    """In place of what is there, or not at all."""
    scratch = path.with_name(f".{path.name}.part")
    scratch.write_text(text)
    scratch.replace(path)
