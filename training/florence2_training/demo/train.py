"""The recipe of the demo checkpoint: draw, teach the tower, then the text half on the tower's features."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import Florence2ForConditionalGeneration, RobertaTokenizer

from florence2_training.demo import model as small
from florence2_training.demo import tokenizer as vocabulary
from florence2_training.demo import tower as towers
from florence2_training.demo.gallery import draw_gallery, kind_of, open_gallery
from florence2_training.demo.lessons import Lessons
from florence2_training.demo.stage import Share, Stage, fit, shared

_TOWER = Stage("tower", steps=1500, batch=64, rate=1e-3, decay=0.2)
_TEXT = Stage("text", steps=2100, batch=64, rate=1e-3, decay=0)
_SCENES = Stage("scenes", steps=1500, batch=64, rate=1e-3, decay=0.33)


@dataclass(frozen=True)
class Recipe:
    seed: int = 2026
    pictures: int = 56_000
    cached: int = 20_000
    """Pictures of all kinds whose features the text stage is trained on; the scenes stage meets all scenes."""
    tower: Stage = _TOWER
    text: Stage = _TEXT
    scenes: Stage = _SCENES
    processes: int = 2
    """Part of the recipe: a sum over two processes is rounded differently from a sum over one."""

    def kept(self) -> list[int]:
        """The pictures whose features are kept."""
        later = range(self.cached, self.pictures)
        return [*range(self.cached), *(index for index in later if kind_of(index) == "scene")]

    def scenes_first(self) -> list[int]:
        """Places in `kept`: every scene, and half of the words.

        Words are read long before scenes are told apart.
        """
        return [place for place, index in enumerate(self.kept()) if kind_of(index) != "word" or index // 4 % 2 == 0]


def train(recipe: Recipe, output: Path, work: Path) -> None:
    """Saves the checkpoint in `output`. `work` keeps what a run that was broken off goes on from."""
    work.mkdir(parents=True, exist_ok=True)
    draw_gallery(work, recipe.pictures, recipe.seed, recipe.processes)
    shared(_teach_tower, recipe.processes, recipe, work)
    shared(_keep_features, recipe.processes, recipe, work)
    shared(_teach_text, recipe.processes, recipe, work)
    shared(_teach_scenes, recipe.processes, recipe, work)
    model, _ = _model(recipe, work, "scenes")
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
    """[kept, width, GRID, GRID] in half precision, shared out between the processes' files."""
    name = work / f"features-{share.rank}.npy"
    if name.exists():
        return
    gallery = open_gallery(work)
    vision = _model(recipe, work, "tower")[0].model.vision_tower
    rows = share.of(recipe.kept())
    features = np.empty((len(rows), small.WIDTH, small.GRID, small.GRID), np.float16)
    for start in tqdm(range(0, len(rows), 64), "features", disable=share.rank > 0):
        pixels = gallery.normalised(list(rows[start : start + 64]))
        features[start : start + 64] = vision(pixels).last_hidden_state.numpy()
    np.save(name, features)


def _teach_text(share: Share, recipe: Recipe, work: Path) -> None:
    places = list(range(recipe.cached))
    _teach(share, recipe, work, recipe.text, after="tower", places=places, seed=recipe.seed + 1)


def _teach_scenes(share: Share, recipe: Recipe, work: Path) -> None:
    places = recipe.scenes_first()
    _teach(share, recipe, work, recipe.scenes, after="text", places=places, seed=recipe.seed + 2)


def _teach(share: Share, recipe: Recipe, work: Path, stage: Stage, after: str, places: list[int], seed: int) -> None:
    """The projector and the text half, on the features of the pictures at `places` in `recipe.kept()`."""
    model, tokenizer = _model(recipe, work, after)
    model.model.vision_tower.requires_grad_(False)
    lessons = Lessons(tokenizer, open_gallery(work).truths, recipe.seed)
    files = [np.load(work / f"features-{rank}.npy", mmap_mode="r") for rank in range(share.processes)]
    kept = recipe.kept()

    def loss_of(batch: list[int], step: int) -> torch.Tensor:
        chosen = [places[entry] for entry in batch]
        rows = np.stack([files[place % len(files)][place // len(files)] for place in chosen])
        return lessons.loss(model, torch.from_numpy(rows).float(), [kept[place] for place in chosen], step)

    fit(model, loss_of, len(places), stage, seed, share, work / f"{stage.name}.pt")


def _model(recipe: Recipe, work: Path, after: str = "") -> tuple[Florence2ForConditionalGeneration, RobertaTokenizer]:
    """The model as initialised, or as it was `after` a stage."""
    tokenizer = vocabulary.build()
    model = small.initialise(tokenizer, recipe.seed)
    if after:
        taught = torch.load(work / f"{after}.pt", weights_only=True)["module"]
        module = towers.Tower(model.model.vision_tower) if after == "tower" else model
        module.load_state_dict(taught)
    return model, tokenizer
