"""Settings in a YAML file: a dataclass says their names, types, defaults, and in words what they do."""

from collections.abc import Callable, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any, TypeVar

Settings = TypeVar("Settings")


def setting(default: Any, text: str) -> Any:
    """A field of such a dataclass."""
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


def read_settings(
    kind: type[Settings],
    path: Path | None,
    hint: str,
    overrides: Sequence[str] = (),
    adapt: Callable[[Any, Path], Any] = lambda config, folder: config,
) -> Settings:
    """The file with `key=value` settings over it. `adapt` gets what the file says, and its folder. Raises ValueError
    that says what is wrong where, with the `hint` behind it where it is a setting."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        config = OmegaConf.structured(kind)
        if path is not None:
            config = OmegaConf.merge(config, adapt(OmegaConf.load(path), path.parent))
        found = OmegaConf.to_object(OmegaConf.merge(config, OmegaConf.from_dotlist(list(overrides))))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; give a YAML file of settings") from None
    except (OmegaConfBaseException, YAMLError, TypeError, ValueError) as error:
        # YAML's says in its lines where it is.
        problem = " ".join(str(error).split()) if isinstance(error, YAMLError) else _first_line(error)
        raise ValueError(f"{path or kind.__name__.lower()}: {problem}; {hint}") from error
    assert isinstance(found, kind)
    return found


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    key = next((line.removeprefix("full_key: ") for line in lines if line.startswith("full_key: ")), "")
    return f"{key}: {lines[0]}" if key and key not in lines[0] else lines[0]
