"""Where a checkpoint's files come from: a folder, or a model id on the Hugging Face hub."""

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from florence2.manifest import read_json

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
_LONGEST = 1000


class CheckpointError(ValueError):
    """A checkpoint that cannot be read; one line that names the file or tensor and says what to do."""

    def __init__(self, message: str) -> None:
        # Names of tensors and tokens are whatever somebody wrote: lines, or a terminal's commands.
        printable = "".join(letter if letter.isprintable() else "?" for letter in message)
        super().__init__(printable if len(printable) <= _LONGEST else printable[: _LONGEST - 3] + "...")


@contextlib.contextmanager
def told_of_checkpoint(todo: str | None = None) -> Iterator[None]:
    """What is found wrong in a file, as CheckpointError; with `todo` where its text doesn't say what to do."""
    try:
        yield
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{error}; {todo}" if todo else str(error)) from error


@dataclass
class Source:
    """The files of one checkpoint."""

    folder: Path
    hub_id: str | None = None
    revision: str | None = None

    def has(self, name: str) -> bool:
        """Raises CheckpointError for a folder, a pipe or a link that leads nowhere, of that name."""
        path = self.folder / name
        if not path.is_file() and os.path.lexists(path):
            raise CheckpointError(f"{path} is not a regular file; get it again")
        return path.is_file()

    def path(self, name: str) -> Path:
        if not self.has(name):
            if self.has("run.json") or self.has("adapter_config.json"):
                raise CheckpointError(f"{self.folder} is no checkpoint yet; make one of it with `florence2 merge`")
            raise CheckpointError(f"{self.folder / name} is missing; copy it from the checkpoint's base model")
        return self.folder / name

    def json(self, name: str) -> dict[str, Any]:
        with told_of_checkpoint("get it again"):
            return read_json(self.path(name))

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
            with self.path(path.name).open("rb") as file:
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
