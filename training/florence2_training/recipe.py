# ruff: noqa: RUF009 (`setting` is dataclasses.field)
"""One training run, described: the recipe file, the command line and the documentation are this dataclass."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from florence2.files import write_whole
from florence2.settings_file import read_settings, setting

PARTS = ("vision", "projector", "embeddings", "encoder", "decoder")
METHODS = ("lora", "full")
LONG_ANSWERS = ("refuse", "truncate", "skip")
PRECISIONS = ("auto", "no", "bf16")


@dataclass
class Source:
    """Where samples come from."""

    data: str = setting("", "a file or folder in any format that `florence2 data check` reads")
    format: str | None = setting(None, "its format, where it is not recognised")
    images: str | None = setting(None, "the folder that relative picture paths start from")
    split: str | None = setting(None, "the split to take, where the data has several")


@dataclass
class Lora:
    """Low-rank adapters, through peft."""

    r: int = setting(16, "rank")
    alpha: float = setting(32, "the adapters' output is scaled by alpha / r, with rsLoRA by alpha / sqrt(r)")
    dropout: float = setting(0.05, "of the adapters' input")
    targets: Any = setting(
        "text",
        "text, text+projector, all (every linear layer of both towers), or a list of regular expressions that match "
        "whole module names",
    )
    use_dora: bool = setting(False, "DoRA: direction and magnitude apart")
    use_rslora: bool = setting(False, "rsLoRA's scaling")


@dataclass
class Recipe:
    model: str = setting("", "the checkpoint to start from: a folder, or an id on the Hugging Face hub")
    revision: str | None = setting(None, "branch, tag or commit of a hub id")
    output_dir: str = setting("", "the run's folder; the same command again goes on where the run was broken off")
    train: list[Source] = setting([], "what is learned")
    validation: list[Source] = setting([], "what the run is judged by")
    replay: list[Source] = setting([], "samples of what must not be forgotten")
    replay_share: float = setting(0.3, "the part of every epoch that is replay, where there is any")
    task_weights: dict[str, float] = setting(
        {}, "how often an epoch meets each sample of a task, such as {<OD>: 2, <CAPTION>: 0.5}; 1 where not named"
    )
    long_answers: str = setting(
        "refuse", f"answers past the decoder's positions: {', '.join(LONG_ANSWERS)} (cut after a whole box)"
    )

    no_repeat_ngram_size: int | None = setting(
        None, "of validation and of the merged checkpoint (default: the checkpoint's own); 0 for answers that repeat"
    )

    method: str = setting("lora", "lora, or full fine-tuning")
    lora: Lora = field(default_factory=Lora)
    freeze: list[str] = setting([], f"with method full, parts that stay as they are: {', '.join(PARTS)}")

    num_train_epochs: float = setting(3, "passes over the data")
    max_steps: int | None = setting(None, "optimizer steps, in place of epochs")
    per_device_train_batch_size: int = setting(8, "samples per process that go through the model at once")
    gradient_accumulation_steps: int = setting(1, "batches per optimizer step")
    learning_rate: float = setting(1e-4, "AdamW's, at its highest; full fine-tuning wants 1e-6 to 1e-5")
    learning_rates: dict[str, float] = setting({}, "for parts that want another, such as {vision: 1e-6}")
    lr_scheduler_type: str = setting("cosine", "any of transformers' names: cosine, linear, constant_with_warmup, …")
    lr_scheduler_kwargs: dict[str, Any] = setting({}, "what that scheduler takes beside, as in transformers")
    warmup_ratio: float = setting(0.05, "the part of the steps in which the rate rises")
    adam_beta2: float = setting(0.999, "AdamW's second; the first is 0.9")
    weight_decay: float = setting(0.01, "of weights; biases and norms have none")
    max_grad_norm: float = setting(1.0, "gradients are clipped to this norm")
    mixed_precision: str = setting("auto", "bf16 (autocast over fp32 weights), no, or auto: bf16 where a GPU has it")
    gradient_checkpointing: bool = setting(False, "less memory, more time; covers the vision tower, too")
    group_by_length: bool = setting(True, "batches of answers of like length: less padding")
    group_by_image: bool = setting(
        True, "samples of one picture in one batch, where the vision tower then sees it once"
    )
    cache_features: bool = setting(True, "with the vision tower frozen, compute its features once and keep them")
    features_dir: str | None = setting(None, "where; runs with the same tower may share it (default: in output_dir)")
    dataloader_num_workers: int = setting(2, "processes that read pictures; 0 reads them in between")
    seed: int = setting(0, "of order, dropout and adapters")

    logging_steps: int = setting(10, "optimizer steps between lines of log.jsonl")
    save_steps: int = setting(500, "optimizer steps between checkpoints")
    save_total_limit: int = setting(2, "checkpoints that are kept, beside the best")
    eval_steps: int | None = setting(None, "optimizer steps between validations (default: once an epoch)")
    eval_samples: int | None = setting(None, "validate with so many samples, the first of each source")
    metric_for_best_model: str = setting("loss", 'such as "<OD> AP50"; the names are those that validation prints')
    early_stopping_patience: int | None = setting(None, "validations without a better metric that end the run")
    tensorboard: bool = setting(False, "write TensorBoard's files, too, in output_dir/tensorboard")

    def check(self) -> None:
        """Raises ValueError for what can't be meant."""
        for name in ("model", "output_dir", "train"):
            if not getattr(self, name):
                raise ValueError(f"the recipe has no {name}; set it: {_help(self, name)}")
        for name in ("train", "validation", "replay"):
            if any(not source.data for source in getattr(self, name)):
                raise ValueError(f"a source of {name} has no data: {_help(Source(), 'data')}")
        _one_of("method", self.method, METHODS)
        _one_of("long_answers", self.long_answers, LONG_ANSWERS)
        _one_of("mixed_precision", self.mixed_precision, PRECISIONS)
        for part in (*self.freeze, *self.learning_rates):
            _one_of("a part", part, PARTS)
        if self.method == "lora" and self.freeze:
            raise ValueError("freeze is for method full; with lora, lora.targets says what is trained")
        if self.method == "full" and self.lora != Lora():
            raise ValueError("lora.* says nothing with method full; leave it out, or set method to lora")
        if not 0 <= self.replay_share < 1:
            raise ValueError(f"replay_share is a part of an epoch, from 0 to below 1, not {self.replay_share}")
        self._check_numbers()
        needs_validation = (
            self.metric_for_best_model != "loss" or self.early_stopping_patience is not None or self.eval_steps
        )
        if needs_validation and not self.validation:
            raise ValueError("the recipe judges by validation, but has no validation data")

    def _check_numbers(self) -> None:
        for name in _COUNTS:
            value = self.lora.r if name == "lora.r" else getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is a whole number from 1 on, not {value}")
        if self.no_repeat_ngram_size is not None and self.no_repeat_ngram_size < 0:
            raise ValueError(f"no_repeat_ngram_size is a whole number from 0 on, not {self.no_repeat_ngram_size}")
        for name in ("num_train_epochs", "learning_rate", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is more than 0, not {getattr(self, name)}")
        for name in ("warmup_ratio", "lora.dropout"):
            value = self.lora.dropout if name == "lora.dropout" else getattr(self, name)
            if not 0 <= value < 1:
                raise ValueError(f"{name} is a part, from 0 to below 1, not {value}")
        for name in ("weight_decay", "dataloader_num_workers"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is from 0 on, not {getattr(self, name)}")
        for task, weight in self.task_weights.items():
            if not weight >= 0:
                raise ValueError(f"task_weights: {task} is from 0 on, not {weight}")


_COUNTS = (
    *("per_device_train_batch_size", "gradient_accumulation_steps", "logging_steps", "save_steps", "save_total_limit"),
    *("lora.r", "max_steps", "eval_steps", "eval_samples", "early_stopping_patience"),
)


def load_recipe(path: Path | None, overrides: Sequence[str] = ()) -> Recipe:
    """The YAML file with `key=value` settings over it, checked. Raises ValueError that says what is wrong where.

    Relative paths of data in the file start from its folder; those of the command line from here.
    """
    hint = "`florence2 train --help` lists the settings"
    recipe = read_settings(Recipe, path, hint, overrides, _from_its_folder)
    recipe.check()
    return recipe


def save_recipe(recipe: Recipe, path: Path) -> None:
    from omegaconf import OmegaConf

    write_whole(path, OmegaConf.to_yaml(OmegaConf.structured(recipe)))


def saved_recipe(path: Path) -> Recipe:
    """As it was given to `save_recipe`: its relative paths start from where the run was started."""
    from omegaconf import OmegaConf

    recipe = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Recipe), OmegaConf.load(path)))
    assert isinstance(recipe, Recipe)
    return recipe


def settings(of: Any = Recipe, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Of every setting its name, its default and what it does."""
    for entry in fields(of):
        if dataclasses.is_dataclass(entry.default_factory):
            yield from settings(entry.default_factory, f"{prefix}{entry.name}.")
            continue
        default = entry.default_factory() if callable(entry.default_factory) else entry.default
        yield prefix + entry.name, str(default), entry.metadata["help"]
        if entry.name == "train":
            yield from settings(Source, "train[].")


def _from_its_folder(config: Any, folder: Path) -> Any:
    """Paths beside the recipe work from anywhere; what is no path there (a hub id) stays."""

    def resolved(value: Any) -> Any:
        if isinstance(value, str) and (folder / Path(value).expanduser()).exists():
            return str((folder / Path(value).expanduser()).resolve())
        return value

    for name in ("train", "validation", "replay"):
        for source in config.get(name) or []:
            for key in ("data", "images"):
                if source.get(key):
                    source[key] = resolved(source[key])
    if config.get("model"):
        config["model"] = resolved(config["model"])
    return config


def _one_of(what: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{what} is one of {', '.join(allowed)}, not {value!r}")


def _help(of: Any, name: str) -> str:
    return next(entry.metadata["help"] for entry in fields(of) if entry.name == name)
