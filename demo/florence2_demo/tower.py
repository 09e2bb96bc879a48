"""The first stage: the vision tower alone, asked at every image token what lies under it.

Trained from scratch through the decoder it learns nothing for a long time; here every token has an answer
of its own. The head is thrown away.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from florence2_export.pixel_values import normalised
from florence2_training.pixels import read_pixels
from florence2_training.sampler import Batch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers.models.florence2 import Florence2VisionBackbone

from florence2_demo.model import GRID, WIDTH, processor
from florence2_demo.picture_store import Gallery, Truth
from florence2_demo.words import COLOURS, LETTERS, PAGE_OBJECTS, SHAPES

CLASSES = ("", *SHAPES, *PAGE_OBJECTS, *LETTERS)
_COLOURS = ("", *COLOURS)
_LONGEST = 6
_BACKGROUND = 0.04
"""The weight of a token with nothing under it: letters are few among the tokens."""
_PARTS = [len(CLASSES), len(_COLOURS), _LONGEST, 4]


class Tower(nn.Module):
    def __init__(self, vision: Florence2VisionBackbone):
        super().__init__()
        self.vision = vision
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, sum(_PARTS)))

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The loss, summed over the batch: each picture counts the same, however much of it is covered."""
        classes, colours, places, boxes = (batch[name] for name in ("classes", "colours", "places", "boxes"))
        thing = (classes > 0).float()
        weight = torch.where(classes > 0, 1.0, _BACKGROUND)
        guessed = self.guess(batch["pixels"])
        errors = weight * _entropy(guessed[0], classes)
        errors = errors + thing * _entropy(guessed[1], colours) * 0.5
        errors = errors + (places >= 0) * _entropy(guessed[2], places.clamp(min=0)) * 0.5
        errors = errors + thing * 5 * (guessed[3] - boxes).abs().mean(-1)
        return (errors.sum(1) / weight.sum(1)).sum() * (batch["weight"] > 0)

    def guess(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """Per token: class, colour, place of the letter in its word, box in parts of the picture."""
        features = self.vision(pixels).last_hidden_state.flatten(2).transpose(1, 2)
        return list(self.head(features).split(_PARTS, dim=-1))


class Lookings:
    """Pictures and what lies under their tokens, as batches."""

    def __init__(self, gallery: Gallery) -> None:
        self.gallery = gallery
        self.preprocessor = processor().image_processor.to_dict()

    def __getitem__(self, batch: Batch) -> dict[str, torch.Tensor]:
        pixels = torch.from_numpy(read_pixels(self.gallery.files(batch.samples), self.preprocessor))
        truths = [under_tokens(self.gallery.truths[index]) for index in batch.samples]
        names = ("classes", "colours", "places", "boxes")
        labels = {
            name: torch.from_numpy(np.stack(column))
            for name, column in zip(names, zip(*truths, strict=True), strict=True)
        }
        weight = torch.tensor(float(len(batch.samples)) * batch.counts)
        return {"pixels": normalised(pixels, self.preprocessor), **labels, "weight": weight}


@dataclass(frozen=True)
class TowerLearner:
    tower: Tower

    def save(self, folder: Path) -> None:
        save_file(self.tower.state_dict(), folder / "tower.safetensors")

    def load(self, folder: Path) -> None:
        self.tower.load_state_dict(load_file(folder / "tower.safetensors"))

    def set_modes(self) -> None:
        self.tower.train()


def under_tokens(truth: Truth) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """[T] class, [T] colour, [T] place of a letter in its word or -1, [T, 4] box in parts of the picture."""
    classes, colours = np.zeros(GRID * GRID, np.int64), np.zeros(GRID * GRID, np.int64)
    places, boxes = np.full(GRID * GRID, -1), np.zeros((GRID * GRID, 4), np.float32)
    scale = np.array([*truth.size, *truth.size])
    for thing in truth.things:
        box = np.array(thing.box) / scale
        for place, part in enumerate(thing.letters or (thing.box,)):
            under = _tokens(np.array(part) / scale)
            classes[under] = CLASSES.index(thing.text[place] if thing.letters else thing.noun)
            colours[under] = _COLOURS.index(thing.colour)
            places[under] = place if thing.letters else -1
            boxes[under] = box
    return classes, colours, places, boxes


def _tokens(box: np.ndarray) -> np.ndarray:
    """The tokens whose centres lie in the box, and the one that holds the box's own centre."""
    centres = (np.arange(GRID) + 0.5) / GRID
    inside = [(centres >= low) & (centres < high) for low, high in (box[[0, 2]], box[[1, 3]])]
    for axis, middle in zip(inside, (box[:2] + box[2:]) / 2, strict=True):
        axis[min(int(middle * GRID), GRID - 1)] = True
    return np.flatnonzero((inside[1][:, None] & inside[0][None, :]).reshape(-1))


def _entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
