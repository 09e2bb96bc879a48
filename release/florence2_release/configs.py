"""config.pbtxt of a model in a repository: what this package ships for its profile, with the versions that Triton is to
load, and what was set there by hand.

Triton's own --model-config-name is not for a repository that changes while it is served: where configs/PROFILE.pbtxt
is written, Triton (24.10) takes the whole model for changed and loads all of its versions again, under traffic. So the
profile's config is the model's config.pbtxt, and configs/ is written only when the profile changes, with no server on
the repository.
"""

import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from florence2.files import write_whole
from florence2_release.profiles import BEAM_SEARCH, COMMENTS, on_gpu
from florence2_release.tritonserver import ServerError

FILE_NAME = "config.pbtxt"
CPU = "cpu"
_PROFILE = "profile"
"""The parameter that tells which profile a config is of."""
_ENGINE_CACHE = "tensorrt_cache"
CACHED = ("vision_encoder", "beam_search")
"""Models that the response cache is for, where they are python models: Triton caches tensors in CPU memory only. Not
the ensemble, of which it would keep what the first of equal requests named; a step's outputs are always all asked for.
Not preprocess, whose pixels are the largest of all, and not postprocess, which takes no longer than the cache."""
_SHIPPED_BEFORE = {("preprocess", "max_megapixels", "100")}
"""What a release of this package before set: nobody's choice."""
_CACHE_TOLD = "response_cache"
"""The parameter of preprocess that says that there is one."""


def write_model(
    model: Path,
    versions: Sequence[int],
    profile: str | None,
    response_cache: bool | None = None,
    engine_cache: Path | None = None,
) -> None:
    """Writes `model`'s config.pbtxt for these versions, of `profile`, or of the one that it is of already. A model that
    has no config of that profile takes the plain one. `response_cache` and `engine_cache`, where TensorRT's engines are
    kept, stay as they are if nothing is said.

    Of a profile that this package ships, what was set in config.pbtxt stays, as far as it is a parameter that ships, or
    the instances; while another profile holds, it waits in configs/. A profile of somebody's own is configs/NAME.pbtxt
    as it stands when it is named; nothing is written there."""
    path = model / FILE_NAME
    before = parsed(path) if path.is_file() else None
    current = profile_of(before) if before else CPU
    wanted = (profile if _has(model, profile) else CPU) if profile else current
    if before and wanted != current and (left := _shipped(model.name, current)):
        write(_kept(model, current), before, left.comments)
    if shipped_one := _shipped(model.name, wanted):
        config, comments = shipped_one.config, shipped_one.comments
        chosen = before if wanted == current else _parsed_if_there(_kept(model, wanted))
        _keep(model.name, config, chosen)
    else:
        own = path if before and not profile else _kept(model, wanted)
        config, comments, chosen = parsed(own), own.read_text(), None
        _complete(config, parsed(shipped() / model.name / FILE_NAME))
    if wanted != CPU:
        config.parameters[_PROFILE].string_value = wanted
    config.version_policy.specific.versions[:] = versions
    _set_response_cache(model.name, config, before, chosen, response_cache)
    if engine_cache := engine_cache or (before and engine_cache_of(before)):
        _set_engine_cache(config, engine_cache)
    if not path.is_file() or config != parsed(path):
        write(path, config, comments)


@dataclass(frozen=True)
class _Shipped:
    config: ModelConfig
    comments: str
    """A config's text, whose comments explain it."""


def _shipped(model: str, profile: str) -> _Shipped | None:
    """What this package has for the profile."""
    path = shipped() / model / FILE_NAME
    if model == "beam_search" and profile in BEAM_SEARCH:
        config = parsed(path)
        on_gpu(config, BEAM_SEARCH[profile])
        return _Shipped(config, path.read_text() + COMMENTS)
    if profile != CPU:
        path = _kept(path.parent, profile)
    return _Shipped(parsed(path), path.read_text()) if path.is_file() else None


def _kept(model: Path, profile: str) -> Path:
    """Where the config of a profile lies that is not in use, or is somebody's own."""
    return model / "configs" / f"{profile}.pbtxt"


def _parsed_if_there(path: Path) -> ModelConfig | None:
    return parsed(path) if path.is_file() else None


def _keep(model: str, config: ModelConfig, chosen: ModelConfig | None) -> None:
    """What was set by hand."""
    if chosen is None:
        return
    for key, parameter in chosen.parameters.items():
        if key in config.parameters and (model, key, parameter.string_value) not in _SHIPPED_BEFORE:
            config.parameters[key].CopyFrom(parameter)
    del config.instance_group[:]
    config.instance_group.extend(chosen.instance_group)


def _set_response_cache(
    model: str, config: ModelConfig, before: ModelConfig | None, chosen: ModelConfig | None, wanted: bool | None
) -> None:
    told = wanted is not None
    if wanted is None:
        wanted = before is not None and before.response_cache.enable
    config.ClearField("response_cache")
    if _CACHE_TOLD in config.parameters:
        if chosen is not None and _CACHE_TOLD in chosen.parameters and not told:
            wanted = chosen.parameters[_CACHE_TOLD].string_value == "true"
        config.parameters[_CACHE_TOLD].string_value = str(bool(wanted)).lower()
    if wanted and model in CACHED and config.backend == "python":
        config.response_cache.enable = True


def _complete(own: ModelConfig, plain: ModelConfig) -> None:
    """Gives a profile of somebody's own what it lacks: it may have been made of an earlier release's."""
    if own.backend != plain.backend:
        return
    for field in ("input", "output"):
        own.ClearField(field)
        getattr(own, field).extend(getattr(plain, field))
    for key, parameter in plain.parameters.items():
        if key not in own.parameters:
            own.parameters[key].CopyFrom(parameter)


def engine_cache_of(config: ModelConfig) -> Path | None:
    """Where TensorRT's engines are kept, if this model has any."""
    accelerators = config.optimization.execution_accelerators.gpu_execution_accelerator
    found = [
        one.parameters["trt_engine_cache_path"] for one in accelerators if "trt_engine_cache_path" in one.parameters
    ]
    if _ENGINE_CACHE in config.parameters:
        found.append(config.parameters[_ENGINE_CACHE].string_value)
    return Path(found[0]) if found else None


def user_engine_cache() -> Path | None:
    """Where only this user writes; None if there is no such place."""
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(caches) / "florence2-triton" if os.path.isabs(caches) else None


def check_engine_cache(folder: Path) -> None:
    """What lies there is run. Raises ValueError if others may write there."""
    if not folder.is_dir():
        return
    status = folder.stat()
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) or status.st_uid not in (0, os.geteuid()):
        raise ValueError(
            f"{folder}, where TensorRT's engines are kept, can be written by others, and engines are run: empty it and "
            "make it yours alone (chown, chmod 700), or name another with --engine-cache"
        )


def _set_engine_cache(config: ModelConfig, folder: Path) -> None:
    for accelerator in config.optimization.execution_accelerators.gpu_execution_accelerator:
        if "trt_engine_cache_path" in accelerator.parameters:
            accelerator.parameters["trt_engine_cache_path"] = str(folder)
    if _ENGINE_CACHE in config.parameters:
        config.parameters[_ENGINE_CACHE].string_value = str(folder)


def profile_of(config: ModelConfig) -> str:
    return config.parameters[_PROFILE].string_value if _PROFILE in config.parameters else CPU


def _has(model: Path, profile: str) -> bool:
    """Whether there is a config of this model for the profile."""
    return _shipped(model.name, profile) is not None or _kept(model, profile).is_file()


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


def write(path: Path, config: ModelConfig, comments: str) -> None:
    """In one rename, so that Triton never reads half a file; with the comments that the text of another has."""
    path.parent.mkdir(exist_ok=True)
    write_whole(path, _with_comments(text_format.MessageToString(config), comments))


_STATEMENT = re.compile(r"^(\w+)(?:.*?\bkey: *\"([^\"]+)\")?", re.DOTALL)


def _with_comments(text: str, source: str) -> str:
    """`text` of a config as protobuf prints it, every statement behind the comment that stands before the same field,
    or the same parameter, in `source`."""
    comments: dict[str, str] = {}
    comment = ""
    for line in source.splitlines():
        if line.startswith("#"):
            comment += f"{line}\n"
        elif comment:
            if found := _STATEMENT.match(line):
                comments[found[2] or found[1]] = comment
            comment = ""
    lines = []
    # A statement begins at the margin, and so does the brace that ends it.
    for statement in re.findall(r"^\w[^\n]*\n(?:^[ }][^\n]*\n)*", text, re.MULTILINE):
        found = _STATEMENT.match(statement)
        name = (found[2] if found[1] == "parameters" else found[1]) if found else None
        lines.append(comments.pop(name, "") + statement if name else statement)
    return "".join(lines)


def check_backends(repository: Path) -> None:
    """Of the wheel's server, which has the python backend alone."""
    for path in sorted(repository.glob("*/config.pbtxt")):
        config = parsed(path)
        needed = config.backend or config.platform
        if needed not in ("python", "ensemble"):
            raise ServerError(
                f"{path} is for Triton's backend {needed!r}, which nvidia-pytriton's server lacks: serve in NVIDIA's "
                "image (docs/docker.md), or with --profile cuda-python or cpu"
            )
