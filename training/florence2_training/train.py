"""A recipe, carried out."""

import logging
import math
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from florence2_export.checkpoint import Checkpoint, load_checkpoint
from florence2_export.export import sizes_of
from numpy.typing import NDArray
from safetensors.torch import load_file
from tqdm import tqdm

from florence2.prompts import PromptEncoder
from florence2_training import trainable
from florence2_training.adapters import WEIGHTS, add_adapters
from florence2_training.corpus import Corpus, Tokens, draw_epoch, read_corpus
from florence2_training.features import PictureGroups, computer, open_cache
from florence2_training.loop import Schedule, Validation, fit, loader, make_scheduler
from florence2_training.objective import Batches, Florence2Learner, checkpoint_activations
from florence2_training.recipe import Recipe
from florence2_training.run_folder import claimed, write_run
from florence2_training.run_state import Progress
from florence2_training.sampler import steps_of
from florence2_training.saving import make_native, save_native, set_no_repeat_ngram_size
from florence2_training.validation import Judge, check_metric

logger = logging.getLogger(__name__)
_PACKAGES = ("florence2-triton", "torch", "transformers", "peft", "accelerate")


def train(recipe: Recipe) -> Progress:
    """Carries the recipe out in its output_dir, going on from the last checkpoint there.

    Raises ValueError for a recipe or data that can't be used, RuntimeError where the loss is no number or a frozen
    weight has changed.
    """
    run = Path(recipe.output_dir).expanduser()
    accelerator = Accelerator(mixed_precision=precision(recipe))
    with claimed(run, recipe) if accelerator.is_main_process else nullcontext():
        accelerator.wait_for_everyone()
        training = Training.prepare(recipe, run, accelerator)
        frozen = trainable.frozen_sha256(training.model)
        if accelerator.is_main_process:
            training.describe(run, frozen, accelerator.mixed_precision)
        if recipe.cache_features and "vision" not in trainable.trained_parts(training.model):
            training.cache_features(accelerator, run)
        progress = training.fit(accelerator, run)
        if trainable.frozen_sha256(training.model) != frozen:
            raise RuntimeError("weights that were to stay frozen have changed; this run's checkpoints can't be trusted")
        return progress


@dataclass
class Training:
    """Everything that a recipe names, opened."""

    recipe: Recipe
    checkpoint: Checkpoint
    model: Any
    """The native class; adapters are inside."""
    adapted: Any
    """peft's view of it, with method lora."""
    tokens: Tokens
    corpus: Corpus
    replayed: Corpus | None
    validation: Corpus | None
    batches: Batches

    @classmethod
    def prepare(cls, recipe: Recipe, run: Path, accelerator: Accelerator) -> "Training":
        """Reads model and data, and finds what of the recipe doesn't fit them: ValueError."""
        checkpoint = load_checkpoint(recipe.model, recipe.revision)
        make_native(checkpoint)
        if recipe.no_repeat_ngram_size is not None:
            set_no_repeat_ngram_size(checkpoint, recipe.no_repeat_ngram_size)
        ngram = checkpoint.generation["no_repeat_ngram_size"]
        tokens = Tokens(PromptEncoder(checkpoint.tokenizer, sizes_of(checkpoint)), recipe.long_answers, ngram)
        # Each process reads for itself: what is read is the same, and nothing has to be handed over.
        data = run / "data" / str(accelerator.process_index)
        corpus = read_corpus(recipe.train, tokens, data / "train.jsonl")
        if corpus.repeating and accelerator.is_main_process:
            logger.warning(
                "%d of %d answers repeat %d tokens, which no_repeat_ngram_size %d never writes; "
                "set no_repeat_ngram_size=0",
                *(corpus.repeating, len(corpus), ngram, ngram),
            )
        replayed = read_corpus(recipe.replay, tokens, data / "replay.jsonl") if recipe.replay else None
        validation = None
        if recipe.validation:
            validation = read_corpus(recipe.validation, tokens, data / "validation.jsonl", recipe.eval_samples)
        model: Any = checkpoint.model
        torch.manual_seed(recipe.seed)
        adapted = None
        if recipe.method == "lora":
            adapted = add_adapters(model, recipe.lora, recipe.model, checkpoint.revision)
        else:
            trainable.freeze(model, recipe.freeze)
        if not trainable.trained_parts(model):
            raise ValueError("freeze names every part: nothing would be trained")
        if recipe.gradient_checkpointing:
            checkpoint_activations(model)
        model.to(accelerator.device)
        corpora = [corpus] + ([replayed] if replayed else [])
        batches = Batches(corpora, tokens, checkpoint.preprocessor)
        training = cls(recipe, checkpoint, model, adapted, tokens, corpus, replayed, validation, batches)
        make_scheduler(torch.optim.AdamW(training.parameter_groups()), training.schedule(accelerator))
        if validation and recipe.metric_for_best_model != "loss":
            check_metric(recipe.metric_for_best_model, validation)
        return training

    def cache_features(self, accelerator: Accelerator, run: Path) -> None:
        """Fills the cache with every picture's features, each process a part of them."""
        vision, recipe = self.model.model.vision_tower.eval(), self.recipe
        folder = Path(recipe.features_dir).expanduser() if recipe.features_dir else run / "features"
        dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
        cache = open_cache(folder, vision, self.checkpoint.preprocessor, dtype)
        corpora = self.batches.corpora + ([self.validation] if self.validation else [])
        pictures = list(dict.fromkeys(picture for corpus in corpora for picture in corpus.picture_files))
        # Another run may be filling the same folder: all processes go by what one of them saw.
        (missing,) = broadcast_object_list([cache.missing(pictures)])
        cache.check_room(len(missing))
        if missing and accelerator.is_main_process:
            tqdm.write(f"the features of {len(missing)} pictures are computed, once", file=sys.stderr)
        own = missing[accelerator.process_index :: accelerator.num_processes]
        size = recipe.per_device_train_batch_size
        groups = PictureGroups(
            [own[start : start + size] for start in range(0, len(own), size)], self.checkpoint.preprocessor
        )
        bar = tqdm(
            loader(groups, range(len(groups.groups)), recipe.dataloader_num_workers),
            "features of pictures",
            total=len(groups.groups),
            disable=None if accelerator.is_main_process else True,
        )
        see = computer(vision, self.checkpoint.preprocessor, accelerator.device, accelerator.autocast)
        if own:
            cache.fill((pictures, see(pixels)) for pictures, pixels in bar)
        accelerator.wait_for_everyone()
        cache.refresh()
        if changing := cache.missing(pictures):
            raise ValueError(f"{changing[0]} changed while its features were computed; start again")
        self.batches.features = cache

    def fit(self, accelerator: Accelerator, run: Path) -> Progress:
        learner = Florence2Learner(self.model, self.checkpoint.preprocessor)
        validation = None
        if self.validation is not None:
            batches = Batches([self.validation], self.tokens, self.checkpoint.preprocessor, self.batches.features)
            judge = Judge(self.recipe, self.checkpoint, batches, learner, accelerator)
            validation = Validation(judge.scores, self.recipe.metric_for_best_model, judge.higher_is_better)
        return fit(
            accelerator,
            learner,
            self,
            self.parameter_groups(),
            self.batches,
            self.epoch(accelerator),
            self.schedule(accelerator),
            run,
            validation,
        )

    def schedule(self, accelerator: Accelerator) -> Schedule:
        steps_an_epoch = len(self.epoch(accelerator)(0))
        steps = self.recipe.max_steps or max(round(self.recipe.num_train_epochs * steps_an_epoch), 1)
        return Schedule(
            steps=steps,
            batch=self.recipe.per_device_train_batch_size,
            warmup_steps=math.ceil(self.recipe.warmup_ratio * steps),
            lr_scheduler_type=self.recipe.lr_scheduler_type,
            lr_scheduler_kwargs=self.recipe.lr_scheduler_kwargs,
            max_grad_norm=self.recipe.max_grad_norm,
            logging_steps=self.recipe.logging_steps,
            save_steps=self.recipe.save_steps,
            save_total_limit=self.recipe.save_total_limit,
            eval_steps=self.recipe.eval_steps or steps_an_epoch,
            early_stopping_patience=self.recipe.early_stopping_patience,
            workers=self.recipe.dataloader_num_workers,
            tensorboard=self.recipe.tensorboard,
            seed=self.recipe.seed,
        )

    def epoch(self, accelerator: Accelerator) -> Callable[[int], list[list[int]]]:
        """Number -> the steps of that epoch."""
        recipe = self.recipe
        weights = [recipe.task_weights.get(task, 1.0) for task in self.corpus.task_names]
        unknown = sorted(set(recipe.task_weights) - set(self.corpus.task_names))
        if unknown:
            raise ValueError(f"task_weights: the data has no {', '.join(unknown)}, only {self.corpus.task_names}")
        pictures = _pictures(self.batches.corpora)
        # With cached features a picture costs nothing more the second time.
        grouped = pictures if recipe.group_by_image and self.batches.features is None else None
        size = recipe.per_device_train_batch_size * recipe.gradient_accumulation_steps * accelerator.num_processes

        @lru_cache(maxsize=2)
        def steps(number: int) -> list[list[int]]:
            samples = draw_epoch(self.corpus, weights, self.replayed, recipe.replay_share, recipe.seed, number)
            if not len(samples):
                raise ValueError("task_weights leave no sample in an epoch")
            return steps_of(samples, self.lengths, grouped, size, recipe.group_by_length, [recipe.seed, 0, number])

        return steps

    @property
    def lengths(self) -> NDArray[np.int32]:
        """Tokens of the answers of all samples, replay behind the others."""
        return np.concatenate([corpus.lengths for corpus in self.batches.corpora])

    def parameter_groups(self) -> list[dict[str, Any]]:
        """AdamW's: by part and by whether weights decay."""
        groups: dict[tuple[str, bool], list[Any]] = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                groups.setdefault((trainable.part_of(name), parameter.ndim > 1), []).append(parameter)
        idle = set(self.recipe.learning_rates) - {part for part, _ in groups}
        if idle:
            raise ValueError(f"learning_rates names {', '.join(sorted(idle))}, which is not trained")
        return [
            {
                "name": part,
                "params": parameters,
                "lr": self.recipe.learning_rates.get(part, self.recipe.learning_rate),
                "betas": (0.9, self.recipe.adam_beta2),
                "weight_decay": self.recipe.weight_decay if decays else 0.0,
            }
            for (part, decays), parameters in groups.items()
        ]

    def set_modes(self) -> None:
        trainable.set_modes(self.model)

    def save(self, folder: Path) -> None:
        if self.adapted is not None:
            # The embeddings are never adapted; to find that out peft would ask the hub.
            self.adapted.save_pretrained(folder, save_embedding_layers=False)
            (folder / "README.md").unlink(missing_ok=True)
        else:
            save_native(self.checkpoint, folder)

    def load(self, folder: Path) -> None:
        if self.adapted is not None:
            from peft import set_peft_model_state_dict

            set_peft_model_state_dict(self.adapted, load_file(folder / WEIGHTS))
        else:
            saved = load_checkpoint(str(folder)).model.state_dict()
            self.model.load_state_dict(saved)

    def describe(self, run: Path, frozen: str, mixed_precision: str) -> None:
        """What the run is made of: for whoever asks, later, where a model comes from. Raises ValueError where a run
        that goes on was made of something else."""
        corpora = {"train": self.corpus, "replay": self.replayed, "validation": self.validation}
        content = {
            "model": self.recipe.model,
            "revision": self.checkpoint.revision,
            "sha256": self.checkpoint.sha256,
            "layout": self.checkpoint.layout,
            "data": {name: {"samples": len(data), "sha256": data.sha256} for name, data in corpora.items() if data},
            "no_repeat_ngram_size": self.recipe.no_repeat_ngram_size,
            "mixed_precision": mixed_precision,
            "frozen_sha256": frozen,
            "parameters": {
                part: {"trained": trained, "all": total}
                for part, (trained, total) in trainable.counts(self.model).items()
            },
            "attention": self.model.config._attn_implementation,
            "packages": {name: version(name) for name in _PACKAGES},
        }
        write_run(run, content)


def precision(recipe: Recipe) -> str:
    """accelerate's mixed_precision."""
    if recipe.mixed_precision != "auto":
        return recipe.mixed_precision
    has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if has_bf16 else "no"


def _pictures(corpora: list[Corpus]) -> NDArray[np.int32]:
    """The pictures of all samples; one that several corpora have is one."""
    names: dict[str, int] = {}
    return np.concatenate(
        [
            np.array([names.setdefault(name, len(names)) for name in corpus.picture_files], np.int32)[corpus.pictures]
            for corpus in corpora
        ]
    )
