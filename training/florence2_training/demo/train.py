"""The recipe of the demo checkpoint: draw, teach the tower, then the text half on its features, then both."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import Florence2ForConditionalGeneration, RobertaTokenizer

from florence2_training.demo import model as small
from florence2_training.demo import tokenizer as vocabulary
from florence2_training.demo import tower as towers
from florence2_training.demo.gallery import draw_gallery, open_gallery
from florence2_training.demo.lessons import Lessons
from florence2_training.demo.stage import Share, Stage, fit, shared

_TOWER = Stage("tower", steps=1700, batch=64, rate=1e-3)
_TEXT = Stage("text", steps=3000, batch=64, rate=1e-3)
_JOINT = Stage("joint", steps=700, batch=64, rate=3e-4, decay=0.6)


@dataclass(frozen=True)
class Recipe:
    seed: int = 2026
    pictures: int = 56_000
    cached: int = 20_000
    """Pictures whose features the text stage is trained on."""
    tower: Stage = _TOWER
    text: Stage = _TEXT
    joint: Stage = _JOINT
    processes: int = 2
    """Part of the recipe: a sum over two processes is rounded differently from a sum over one."""


def train(recipe: Recipe, output: Path, work: Path) -> None:
    """Saves the checkpoint in `output`. `work` keeps what a run that was broken off goes on from."""
    work.mkdir(parents=True, exist_ok=True)
    draw_gallery(work, recipe.pictures, recipe.seed, recipe.processes)
    shared(_teach_tower, recipe.processes, recipe, work)
    shared(_keep_features, recipe.processes, recipe, work)
    shared(_teach_text, recipe.processes, recipe, work)
    shared(_teach_both, recipe.processes, recipe, work)
    model, _ = _model(recipe, work, "joint")
    small.save(model, output)


def _teach_tower(share: Share, recipe: Recipe, work: Path) -> None:
    gallery = open_gallery(work)
    model, _ = _model(recipe, work)
    tower = towers.Tower(model.model.vision_tower)

    def loss_of(indices: list[int], _: int) -> torch.Tensor:
        return towers.loss(tower, gallery.normalised(indices), [gallery.truths[index] for index in indices])

    fit(tower, loss_of, len(gallery.truths), recipe.tower, recipe.seed, share, work / "tower.pt")


@torch.no_grad()
def _keep_features(share: Share, recipe: Recipe, work: Path) -> None:
    """Half precision, [cached, width, GRID, GRID]; each process computes every n-th chunk."""
    gallery = open_gallery(work)
    vision = _model(recipe, work, "tower")[0].model.vision_tower
    name = work / f"features-{share.rank}.npy"
    rows = share.of(range(recipe.cached))
    if name.exists():
        return
    kept = np.empty((len(rows), small.WIDTH, small.GRID, small.GRID), np.float16)
    for start in tqdm(range(0, len(rows), 64), "features", disable=share.rank > 0):
        pixels = gallery.normalised(list(rows[start : start + 64]))
        kept[start : start + 64] = vision(pixels).last_hidden_state.numpy()
    np.save(name, kept)


def _teach_text(share: Share, recipe: Recipe, work: Path) -> None:
    model, tokenizer = _model(recipe, work, "tower")
    model.model.vision_tower.requires_grad_(False)
    lessons = Lessons(tokenizer, open_gallery(work).truths, recipe.seed)
    kept = [np.load(work / f"features-{rank}.npy", mmap_mode="r") for rank in range(share.processes)]

    def loss_of(indices: list[int], step: int) -> torch.Tensor:
        rows = np.stack([kept[index % len(kept)][index // len(kept)] for index in indices])
        return lessons.loss(model, torch.from_numpy(rows).float(), indices, step)

    fit(model, loss_of, recipe.cached, recipe.text, recipe.seed + 1, share, work / "text.pt")


def _teach_both(share: Share, recipe: Recipe, work: Path) -> None:
    gallery = open_gallery(work)
    model, tokenizer = _model(recipe, work, "text")
    lessons = Lessons(tokenizer, gallery.truths, recipe.seed + 2)

    def loss_of(indices: list[int], step: int) -> torch.Tensor:
        features = model.model.vision_tower(gallery.normalised(indices)).last_hidden_state
        return lessons.loss(model, features, indices, step)

    fit(model, loss_of, len(gallery.truths), recipe.joint, recipe.seed + 2, share, work / "joint.pt")


def _model(
    recipe: Recipe, work: Path, after: str = ""
) -> tuple[Florence2ForConditionalGeneration, RobertaTokenizer]:
    """The model as initialised, or as it was `after` a stage."""
    tokenizer = vocabulary.build()
    model = small.initialise(tokenizer, recipe.seed)
    if after:
        taught = torch.load(work / f"{after}.pt", weights_only=True)["module"]
        module = towers.Tower(model.model.vision_tower) if after == "tower" else model
        module.load_state_dict(taught)
    return model, tokenizer
