"""The recipe of the demo checkpoint: draw, teach the tower, then the text half on the tower's features."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from florence2_export.checkpoint import load_checkpoint
from florence2_training import recipe as recipes
from florence2_training.loop import Schedule, fit
from florence2_training.run_state import whole_checkpoints
from florence2_training.sampler import steps_of_all
from florence2_training.train import train as carry_out

from florence2_demo import bpe
from florence2_demo import model as small
from florence2_demo.lessons import Lessons
from florence2_demo.picture_store import draw_gallery, kind_of, open_gallery
from florence2_demo.tower import Lookings, Tower, TowerLearner


@dataclass(frozen=True)
class Stage:
    """AdamW steps: the rate rises, stays, and falls in the last part of them."""

    steps: int
    decay: float
    batch: int = 64
    rate: float = 1e-3
    warm_up: int = 66

    def scheduler(self) -> dict[str, Any]:
        if not self.decay:
            return {"lr_scheduler_type": "constant_with_warmup"}
        falling = {"num_decay_steps": round(self.decay * self.steps), "decay_type": "linear"}
        return {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": falling}


@dataclass(frozen=True)
class Recipe:
    seed: int = 2026
    pictures: int = 56_000
    cached: int = 20_000
    """Pictures of all kinds whose features the text stage is trained on; the scenes stage meets all scenes."""
    tower: Stage = Stage(steps=1500, decay=0.2)
    text: Stage = Stage(steps=2100, decay=0)
    scenes: Stage = Stage(steps=1500, decay=0.33)
    processes: int = 2
    """That draw."""

    def kept(self) -> list[int]:
        """The pictures that the text half meets."""
        later = range(self.cached, self.pictures)
        return [*range(self.cached), *(index for index in later if kind_of(index) == "scene")]

    def scenes_first(self) -> list[int]:
        """Every scene, every page, and half of the words: these are read long before scenes are told apart."""
        return [index for index in self.kept() if kind_of(index) != "word" or index // 4 % 2 == 0]


def train(recipe: Recipe, output: Path, work: Path) -> None:
    """Saves the checkpoint in `output`. `work` keeps what a run that was broken off goes on from.

    On as many processes as `accelerate launch` starts."""
    accelerator = Accelerator()
    with accelerator.main_process_first():
        if accelerator.is_main_process:
            work.mkdir(parents=True, exist_ok=True)
            draw_gallery(work, recipe.pictures, recipe.seed, recipe.processes)
    taught = _teach_tower(accelerator, recipe, work)
    taught = _teach_text(accelerator, recipe, work, "text", taught, list(range(recipe.cached)))
    taught = _teach_text(accelerator, recipe, work, "scenes", taught, recipe.scenes_first())
    if accelerator.is_main_process:
        small.save(load_checkpoint(str(taught)).model, output)
    accelerator.wait_for_everyone()


def _teach_tower(accelerator: Accelerator, recipe: Recipe, work: Path) -> Path:
    """The tower alone, asked at every image token what lies under it -> the checkpoint's folder."""
    folder = work / "tower-checkpoint"
    model = small.initialise(bpe.build(), recipe.seed)
    tower = Tower(model.model.vision_tower).to(accelerator.device)
    gallery = open_gallery(work)
    stage = recipe.tower
    schedule = Schedule(
        steps=stage.steps,
        batch=-(-stage.batch // accelerator.num_processes),
        warmup_steps=stage.warm_up,
        save_steps=100,
        save_total_limit=1,
        seed=recipe.seed,
        **stage.scheduler(),
    )
    groups = [{"params": list(tower.parameters()), "lr": stage.rate, "betas": (0.9, small.ADAM_BETA2)}]

    def epoch(number: int) -> list[list[int]]:
        return steps_of_all(len(gallery.truths), stage.batch, [recipe.seed, number])

    fit(accelerator, tower, TowerLearner(tower), groups, Lookings(gallery), epoch, schedule, work / "tower")
    if accelerator.is_main_process and not folder.exists():
        scratch = folder.with_suffix(".new")
        small.save(model, scratch, torch.float32)
        scratch.rename(folder)
    accelerator.wait_for_everyone()
    return folder


def _teach_text(
    accelerator: Accelerator, recipe: Recipe, work: Path, name: str, model: Path, pictures: list[int]
) -> Path:
    """The projector and the text half, like any full fine-tuning with the tower frozen -> the checkpoint's folder."""
    stage: Stage = getattr(recipe, name)
    lines = work / f"{name}.jsonl"
    with accelerator.main_process_first():
        if accelerator.is_main_process and not lines.exists():
            lessons = Lessons(bpe.build(), open_gallery(work), recipe.seed + len(name))
            lessons.write(lines, pictures, stage.steps * stage.batch)
    run = work / name
    carry_out(
        recipes.Recipe(
            model=str(model),
            output_dir=str(run),
            train=[recipes.Source(data=str(lines))],
            method="full",
            freeze=["vision"],
            max_steps=stage.steps,
            per_device_train_batch_size=-(-stage.batch // accelerator.num_processes),
            learning_rate=stage.rate,
            adam_beta2=small.ADAM_BETA2,
            warmup_ratio=stage.warm_up / stage.steps,
            group_by_length=False,
            features_dir=str(work / "features"),
            dataloader_num_workers=0,
            save_total_limit=1,
            seed=recipe.seed,
            **stage.scheduler(),
        )
    )
    return whole_checkpoints(run)[-1]
