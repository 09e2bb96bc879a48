"""config.pbtxt of a model in a repository: what this package ships for its profile, with the versions that Triton is to
load, and what was set there by hand.

Triton's own --model-config-name is not for a repository that changes while it is served: where configs/PROFILE.pbtxt
is written, Triton (24.10) takes the whole model for changed and loads all of its versions again, under traffic. So the
profile's config is the model's config.pbtxt, and configs/ is written only when the profile changes, with no server on
the repository.
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
    """Writes `model`'s config.pbtxt for these versions, of `profile`, or of the one that it is of already. A model that
    has no config of that profile takes the plain one.

    Of a profile that this package ships, what was set in config.pbtxt stays, as far as it is a parameter that ships, or
    the instances; while another profile holds, it waits in configs/. A profile of somebody's own is configs/NAME.pbtxt
    as it stands when it is named; nothing is written there."""
    path = model / FILE_NAME
    before = parsed(path) if path.is_file() else None
    current = profile_of(before) if before else CPU
    wanted = (profile if _has(model, profile) else CPU) if profile else current
    kept, source = (_source(folder, wanted) for folder in (model, shipped() / model.name))
    if before and wanted != current and _source(shipped() / model.name, current).is_file():
        write(model / "configs" / f"{current}.pbtxt", before)
    config = ModelConfig()
    if not source.is_file():
        config.CopyFrom(parsed(kept) if profile or not before else before)
        before = None
    else:
        config.CopyFrom(parsed(source))
        if wanted != current:
            kept = model / "configs" / f"{wanted}.pbtxt"
            before = parsed(kept) if kept.is_file() else None
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
    """Whether there is a config of this model for the profile."""
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
