"""The training's pictures, drawn once and kept in a folder: pixels at the model's side, and the truths."""

import pickle
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from florence2.locations import Size
from florence2_training.demo.model import SIDE
from florence2_training.demo.pictures import TRAINING, draw
from florence2_training.demo.things import Thing

# Half are words: reading is what takes the vision tower longest to learn.
PATTERN = ("scene", "word", "page", "word")
_MEAN, _STD = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)


def kind_of(index: int) -> str:
    return PATTERN[index % len(PATTERN)]


@dataclass(frozen=True)
class Truth:
    kind: str
    size: Size
    things: tuple[Thing, ...]


@dataclass(frozen=True)
class Gallery:
    pixels: np.ndarray
    """[N, SIDE, SIDE, 3] uint8"""
    truths: list[Truth]

    def normalised(self, indices: Sequence[int]) -> torch.Tensor:
        """[B, 3, SIDE, SIDE], as the image processor gives it."""
        pixels = (self.pixels[indices] / np.float32(255) - _MEAN) / _STD
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def draw_gallery(folder: Path, count: int, seed: int, processes: int) -> None:
    if (folder / "truths.pkl").exists():
        return
    pixels = np.lib.format.open_memmap(folder / "pixels.npy", mode="w+", dtype=np.uint8, shape=(count, SIDE, SIDE, 3))
    truths = []
    with ProcessPoolExecutor(processes) as pool:
        drawn = pool.map(partial(_draw_one, seed), range(count), chunksize=64)
        for index, (array, truth) in enumerate(tqdm(drawn, "pictures", count)):
            pixels[index] = array
            truths.append(truth)
    pixels.flush()
    (folder / "truths.pkl").write_bytes(pickle.dumps(truths))


def open_gallery(folder: Path) -> Gallery:
    truths = pickle.loads((folder / "truths.pkl").read_bytes())
    return Gallery(np.load(folder / "pixels.npy", mmap_mode="r"), truths)


def _draw_one(seed: int, index: int) -> tuple[np.ndarray, Truth]:
    picture = draw(kind_of(index), seed, TRAINING, index)
    small = picture.image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return np.asarray(small), Truth(picture.kind, picture.image.size, picture.things)
