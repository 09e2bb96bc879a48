"""`manifest.json`: where an export comes from, its sizes, and how close it is to its checkpoint."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

FILE_NAME = "manifest.json"


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
        try:
            content = json.loads(path.read_text())
            return cls(**{**content, "sizes": Sizes(**content["sizes"])})
        except FileNotFoundError:
            raise ValueError(
                f"{path} is missing: {folder} is not an export; make one with `florence2 export`"
            ) from None
        except (json.JSONDecodeError, TypeError, KeyError) as error:
            raise ValueError(f"{path} can't be read ({error}); export the checkpoint again") from None


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
        content = read_json(folder / cls.FILE_NAME)
        return cls(Sizes(**content["sizes"]), content["banned_grounding_phrases"])

    def _text(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"


def sha256_of(path: Path) -> str:
    """What `Manifest.files` says of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> Mapping[str, Any]:
    """A JSON object from a file. Raises ValueError, naming the file."""
    try:
        content = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} can't be read: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} does not hold a JSON object")
    return content
