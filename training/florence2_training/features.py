"""What a frozen vision tower sees, computed once per picture and kept on disk."""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from florence2_export.checkpoint_settings import feature_maps
from florence2_export.pixel_values import normalised
from numpy.typing import NDArray
from torch import Tensor

from florence2_training.pixels import read_pixels
from florence2_training.trainable import raw

# numpy has no bfloat16.
_STORED = {torch.float32: np.float32, torch.bfloat16: np.int16}


class FeatureCache:
    """Features by picture file, [channels, h, w] each; every filling has files of its own, so runs can share a folder.

    A picture whose size or time of change is another is computed anew. A row counts once its line is in the index,
    which is written after it: a filling that is killed loses at most its last rows.
    """

    def __init__(self, folder: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.folder, self.shape, self.dtype = folder, shape, dtype
        self._rows: dict[str, tuple[str, int, list[int]]] = {}
        self._files: dict[str, NDArray[Any]] = {}
        folder.mkdir(parents=True, exist_ok=True)
        self.refresh()

    def __getstate__(self) -> dict[str, Any]:
        """For worker processes: mapped files are opened there."""
        return {**vars(self), "_files": {}}

    def refresh(self) -> None:
        """Sees what other processes have added."""
        for index in sorted(self.folder.glob("*.jsonl")):
            for line in index.read_text().split("\n")[:-1]:
                entry = json.loads(line)
                # The names of the files say nothing of which is newer.
                if not self._has(entry["image"]):
                    self._rows[entry["image"]] = (index.stem, entry["row"], entry["stat"])

    def missing(self, pictures: Iterable[str]) -> list[str]:
        return [picture for picture in pictures if not self._has(picture)]

    def check_room(self, count: int) -> None:
        needed, free = count * self._row_bytes(), shutil.disk_usage(self.folder).free
        if needed > 0.95 * free:
            raise ValueError(
                f"the features of {count} pictures take {needed / 1e9:.1f} GB, and {self.folder} has {free / 1e9:.1f} "
                "GB free; set features_dir to a larger disk, or cache_features=false"
            )

    def fill(self, batches: Iterable[tuple[Sequence["Stamped"], Tensor]]) -> None:
        """Pictures with their features [B, *shape], batch by batch."""
        name = uuid.uuid4().hex
        with (self.folder / f"{name}.bin").open("wb") as rows, (self.folder / f"{name}.jsonl").open("w") as index:
            row = 0
            for pictures, features in batches:
                found = features.to(self.dtype).contiguous()
                rows.write(found.view(torch.uint8).numpy().tobytes())
                rows.flush()
                for picture, stat in pictures:
                    index.write(json.dumps({"image": picture, "row": row, "stat": stat}) + "\n")
                    row += 1
                index.flush()
        self.refresh()

    def read(self, pictures: Sequence[str]) -> Tensor:
        """[P, *shape]"""
        return torch.stack([self._read(picture) for picture in pictures])

    def _read(self, picture: str) -> Tensor:
        name, row, _ = self._rows[picture]
        if name not in self._files:
            # The last row may have been cut short anywhere.
            flat = np.memmap(self.folder / f"{name}.bin", np.uint8, "r")
            whole = flat[: len(flat) // self._row_bytes() * self._row_bytes()]
            self._files[name] = whole.view(_STORED[self.dtype]).reshape(-1, *self.shape)
        return torch.from_numpy(np.array(self._files[name][row])).view(self.dtype)

    def _has(self, picture: str) -> bool:
        try:
            return picture in self._rows and self._rows[picture][2] == _stat(picture)
        except OSError:
            return False

    def _row_bytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize


def open_cache(folder: Path, vision: Any, preprocessor: dict[str, Any], dtype: torch.dtype) -> FeatureCache:
    """The cache of one tower and one way to prepare pictures: another tower's features are never read."""
    total = hashlib.sha256(json.dumps([preprocessor, str(dtype)], sort_keys=True).encode())
    for name, tensor in sorted(vision.state_dict().items()):
        total.update(name.encode() + b"\0")
        total.update(raw(tensor))
    *_, shape = feature_maps(vision.config, preprocessor["size"])
    return FeatureCache(folder / total.hexdigest()[:16], shape, dtype)


Stamped = tuple[str, list[int]]
"""A picture file, and its size and time of change before it was read."""


@dataclass(frozen=True)
class PictureGroups:
    """Pictures to be seen together, as a DataLoader's workers read them."""

    groups: Sequence[Sequence[str]]
    preprocessor: dict[str, Any]

    def __getitem__(self, index: int) -> tuple[list[Stamped], Tensor]:
        """With their pixels, u8 [B, H, W, 3]."""
        stamped = [(picture, _stat(picture)) for picture in self.groups[index]]
        return stamped, torch.from_numpy(read_pixels(self.groups[index], self.preprocessor))


def computer(
    vision: Any, preprocessor: dict[str, Any], device: torch.device, autocast: Callable[[], Any]
) -> Callable[[Tensor], Tensor]:
    """Pixels -> features [B, channels, h, w] on the CPU."""

    @torch.no_grad()
    def compute(pixels: Tensor) -> Tensor:
        with autocast():
            return vision(normalised(pixels.to(device), preprocessor)).last_hidden_state.float().cpu()

    return compute


def _stat(picture: str) -> list[int]:
    found = os.stat(picture)
    return [found.st_size, found.st_mtime_ns]
