"""`manifest.json`: where an export comes from, its sizes, and how close it is to its checkpoint."""

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from florence2.fields import MANIFEST, MODEL_SETTINGS, Rule, check, short

FILE_NAME = "manifest.json"
SETTINGS_MEGABYTES = 4
"""A settings file that is larger is none; tokenizer_config.json and a weights index have some 200 kB."""
_DEEPEST = 32


@dataclass(frozen=True)
class Sizes:
    """Everything size-like, read from the checkpoint."""

    image_height: int
    image_width: int
    image_tokens: int
    d_model: int
    vocab_size: int
    decoder_layers: int
    decoder_attention_heads: int
    head_dim: int
    max_position_embeddings: int
    location_bins: int


@dataclass(frozen=True)
class Manifest:
    source: str
    """The checkpoint's folder or hub id, as it was given."""
    revision: str | None
    sha256: str
    """Of the checkpoint's files."""
    layout: str
    """"microsoft" or "native"."""
    repairs: list[str]
    precision: str
    opset: int
    sizes: Sizes
    banned_grounding_phrases: list[str]
    """Phrases whose boxes `<CAPTION_TO_PHRASE_GROUNDING>` drops."""
    tools: dict[str, str]
    """Versions of what made the export."""
    files: dict[str, str]
    """sha256 of every other file of the export."""
    parity: dict[str, Any] = field(default_factory=dict)
    """The export against the checkpoint: differences per graph, agreement of whole generations."""

    def write(self, folder: Path, name: str = FILE_NAME) -> None:
        (folder / name).write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path, name: str = FILE_NAME) -> "Manifest":
        """Raises ValueError, naming the file, if it isn't there or isn't one of ours."""
        path = folder / name
        if not os.path.lexists(path):
            raise ValueError(f"{path} is missing: {folder} is not an export; make one with `florence2 export`")
        try:
            content = read_json(path)
        except ValueError as error:
            raise ValueError(f"{error}; export the checkpoint again") from None
        try:
            _check_fields(content, cls, MANIFEST)
        except ValueError as error:
            raise ValueError(f"{path} can't be read ({error}); export the checkpoint again") from None
        return cls(**{"revision": None, **content, "sizes": Sizes(**content["sizes"])})


@dataclass(frozen=True)
class ModelSettings:
    """What the served models have to know of the checkpoint, and nothing that tells two fine-tunes of it apart."""

    sizes: Sizes
    banned_grounding_phrases: list[str]
    """As in `Manifest`."""
    FILE_NAME: ClassVar[str] = "model_settings.json"

    def write(self, folder: Path) -> None:
        (folder / self.FILE_NAME).write_text(self._text())

    def sha256(self) -> str:
        """Of the file."""
        return hashlib.sha256(self._text().encode()).hexdigest()

    @classmethod
    def read(cls, folder: Path) -> "ModelSettings":
        """Raises ValueError, naming the file."""
        path = folder / cls.FILE_NAME
        content = read_json(path)
        _check_fields(content, cls, MODEL_SETTINGS, f"{path}: ")
        return cls(Sizes(**content["sizes"]), content["banned_grounding_phrases"])

    def _text(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"


def sha256_of(path: Path) -> str:
    """What `Manifest.files` says of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path, megabytes: float = SETTINGS_MEGABYTES) -> dict[str, Any]:
    """A JSON object from a file. Raises ValueError, naming the file, without reading one that is too large."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            # A pipe would be waited for, a device has no end.
            raise ValueError(f"{path} is not a regular file")
        if found.st_size > megabytes * 1e6:
            raise ValueError(f"{path} has {found.st_size / 1e6:.0f} MB; {megabytes:g} MB are allowed")
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} can't be read ({error.strerror})") from None
    try:
        content = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__} where an object is expected")
    _check_depth(content, path)
    return content


def _check_depth(content: dict[str, Any], path: Path) -> None:
    """What walks through a value later, json.dumps among others, calls itself at every level."""
    level: list[Any] = [content]
    for _ in range(_DEEPEST):
        inner = [value.values() if isinstance(value, dict) else value for value in level]
        level = [value for values in inner for value in values if isinstance(value, dict | list)]
        if not level:
            return
    raise ValueError(f"{path} is nested more than {_DEEPEST} levels deep")


def _check_fields(content: Mapping[str, Any], cls: type, rules: Mapping[str, Rule], where: str = "") -> None:
    """Raises ValueError for a field that is missing, unknown or of another kind."""
    check(content, rules, where, rules.keys() - {"revision", "parity"})
    for known, given in ((cls, content), (Sizes, content["sizes"])):
        if unknown := given.keys() - {one.name for one in fields(known)}:
            raise ValueError(f"{where}{short(min(unknown))} is unknown to this version")
