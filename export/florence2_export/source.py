"""Where a checkpoint's files come from: a folder, or a model id on the Hugging Face hub."""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SETTINGS = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "adapter_config.json",
)
SAFETENSORS = ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors")
BIN = ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")


class CheckpointError(ValueError):
    """A checkpoint that cannot be read; one line that names the file or tensor and says what to do."""


@dataclass
class Source:
    """The files of one checkpoint."""

    folder: Path
    hub_id: str | None = None
    revision: str | None = None

    def has(self, name: str) -> bool:
        return (self.folder / name).is_file()

    def path(self, name: str) -> Path:
        if not self.has(name):
            if self.has("run.json") or self.has("adapter_config.json"):
                raise CheckpointError(f"{self.folder} is no checkpoint yet; make one of it with `florence2 merge`")
            raise CheckpointError(f"{self.folder / name} is missing; copy it from the checkpoint's base model")
        return self.folder / name

    def json(self, name: str) -> dict[str, Any]:
        path = self.path(name)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise CheckpointError(f"{path} is not valid JSON ({one_line(error)}); get it again") from error
        if not isinstance(content, dict):
            raise CheckpointError(f"{path} holds a {type(content).__name__} where an object is expected; get it again")
        return content

    def optional_json(self, name: str) -> dict[str, Any]:
        return self.json(name) if self.has(name) else {}

    def fetch(self, patterns: tuple[str, ...]) -> None:
        """Have the files of a hub id that match `patterns` in `folder`; a local folder has what it has."""
        if self.hub_id is not None:
            self.folder = _download(self.hub_id, self.revision, patterns)

    def sha256(self) -> str:
        """Of every settings and weights file here, names and contents, whether it is read or not."""
        total = hashlib.sha256()
        patterns = (*SETTINGS, *SAFETENSORS, *BIN)
        for path in sorted({path for pattern in patterns for path in self.folder.glob(pattern)}):
            with path.open("rb") as file:
                total.update(f"{path.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
        return total.hexdigest()


def open_source(source: str, revision: str | None = None) -> Source:
    """The settings of a checkpoint; its weights are fetched once these are found good."""
    path = Path(source).expanduser()
    if path.is_dir():
        if revision is not None:
            raise CheckpointError(f"{source} is a folder, which has no revision {revision!r}; leave the revision out")
        return Source(path)
    if path.exists():
        raise CheckpointError(f"{source} is a file; give the checkpoint's folder")
    if not _HUB_ID.fullmatch(source):
        raise CheckpointError(f"{source!r} is neither a folder nor a hub id such as microsoft/Florence-2-base")
    folder = _download(source, revision, SETTINGS)
    commit = folder.name if _COMMIT.fullmatch(folder.name) else revision
    return Source(folder, hub_id=source, revision=commit)


def _download(hub_id: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    import huggingface_hub

    what = f"{hub_id}@{revision}" if revision else hub_id
    try:
        # Patterns name data files only: code that a repository carries never reaches this machine.
        return Path(huggingface_hub.snapshot_download(hub_id, revision=revision, allow_patterns=list(patterns)))
    except (OSError, ValueError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        hint = "no such folder here, and the hub gave no such model"
        raise CheckpointError(f"{what}: {hint} ({reason}); check the name, the network and HF_TOKEN") from error


def one_line(error: BaseException, limit: int = 200) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."
