"""The loop of steps: whatever gives batches and a summed loss is trained here, and can be killed anywhere."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import get_scheduler

from florence2_training import run_state
from florence2_training.progress import Reporter
from florence2_training.run_state import Progress
from florence2_training.sampler import Batch, share_of


@dataclass(frozen=True)
class Schedule:
    """How long, in what steps, and what is kept on the way."""

    steps: int
    batch: int
    """Samples that a process sends through the model at once."""
    warmup_steps: int = 0
    lr_scheduler_type: str = "cosine"
    lr_scheduler_kwargs: dict[str, Any] = field(default_factory=dict)
    max_grad_norm: float = 1.0
    logging_steps: int = 10
    save_steps: int = 500
    save_total_limit: int = 2
    eval_steps: int | None = None
    early_stopping_patience: int | None = None
    workers: int = 0
    tensorboard: bool = False
    seed: int = 0


class Learnable(Protocol):
    """What a run trains, beside its module."""

    def save(self, folder: Path) -> None:
        """What is trained, into a checkpoint's folder."""

    def load(self, folder: Path) -> None: ...

    def set_modes(self) -> None:
        """Training and evaluation mode, part by part."""


@dataclass(frozen=True)
class Validation:
    scores: Callable[[], dict[str, float]]
    """Called on every process; the values are the first one's."""
    best: str
    higher_is_better: Callable[[str], bool]


def fit(
    accelerator: Accelerator,
    module: nn.Module,
    learnable: Learnable,
    groups: Sequence[dict[str, Any]],
    batches: Any,
    epoch: Callable[[int], list[list[int]]],
    schedule: Schedule,
    run: Path,
    validation: Validation | None = None,
) -> Progress:
    """Trains `module` until `schedule` ends, going on from the last whole checkpoint in `run`.

    `module(batch)` is the summed loss of a batch, `batches[Batch]` its tensors, whose "weight" is what the sum is
    divided by, summed over all batches of the step on all processes: accumulation and more processes change nothing.
    `epoch(n)` gives the steps of epoch n, always equally many. `groups` are AdamW's.
    """
    torch.manual_seed(schedule.seed + 7919 * accelerator.process_index)
    optimizer = torch.optim.AdamW([dict(group) for group in groups])
    scheduler = make_scheduler(optimizer, schedule)
    module, prepared = accelerator.prepare(module, optimizer)
    # After that: it would move AdamW's counts of steps to the GPU, where reading them waits for it.
    progress = _resume(accelerator, learnable, optimizer, scheduler, run)
    parameters = [parameter for group in groups for parameter in group["params"]]
    reporter = Reporter(run, run.name, schedule.steps, progress.step, accelerator.is_main_process, schedule.tensorboard)
    reporter.say(f"{run}: step {progress.step} of {schedule.steps}, on {accelerator.device}")
    try:
        learnable.set_modes()
        losses: list[float] = []
        for parts in () if progress.stopped_early else _steps(accelerator, batches, epoch, schedule, progress):
            loss, pictures, norm = _step(accelerator, module, prepared, parts, parameters, schedule)
            scheduler.step()
            prepared.zero_grad()
            progress.step += 1
            losses.append(loss)
            reporter.step(pictures * accelerator.num_processes)
            if progress.step % schedule.logging_steps == 0 or progress.step == schedule.steps:
                values = {"loss": sum(losses) / len(losses), **_rates(optimizer), "grad_norm": norm}
                reporter.log(progress.step, values)
                losses = []
            _look_round(accelerator, learnable, optimizer, scheduler, schedule, run, progress, validation, reporter)
            if progress.stopped_early:
                reporter.say(f"step {progress.step}: no better {validation and validation.best}; stopped early")
                break
    finally:
        reporter.close()
    return progress


def make_scheduler(optimizer: torch.optim.Optimizer, schedule: Schedule) -> LambdaLR:
    """Raises ValueError for a name or settings that transformers doesn't know, and for schedulers that want to be told
    a metric."""
    name, settings = schedule.lr_scheduler_type, schedule.lr_scheduler_kwargs
    try:
        scheduler = get_scheduler(name, optimizer, schedule.warmup_steps, schedule.steps, settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"lr_scheduler_type {name}: {error}") from None
    if not isinstance(scheduler, LambdaLR):
        raise ValueError(f"lr_scheduler_type {name} goes by a metric; take one that goes by steps, such as cosine")
    return scheduler


def _rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """One, or those of the parts where they differ."""
    rates = {group.get("name", ""): group["lr"] for group in optimizer.param_groups}
    if len(set(rates.values())) == 1:
        return {"learning_rate": next(iter(rates.values()))}
    return {f"learning_rate[{name}]": rate for name, rate in rates.items()}


def _step(
    accelerator: Accelerator,
    module: nn.Module,
    optimizer: Any,
    parts: list[dict[str, Any]],
    parameters: list[nn.Parameter],
    schedule: Schedule,
) -> tuple[float, int, float]:
    """One optimizer step -> its mean loss, the samples of this process, the gradients' norm before clipping."""
    weight = sum(part["weight"] for part in parts)
    weight = accelerator.reduce(weight.to(accelerator.device), "sum")
    total = torch.zeros((), device=accelerator.device)
    for place, part in enumerate(parts):
        last = place + 1 == len(parts)
        with nullcontext() if last else accelerator.no_sync(module):
            batch = {name: value.to(accelerator.device, non_blocking=True) for name, value in part.items()}
            loss = module(batch)
            # Gradients are averaged over processes; the loss is a sum.
            accelerator.backward(loss * accelerator.num_processes / weight)
            total += loss.detach()
    norm = accelerator.clip_grad_norm_(parameters, schedule.max_grad_norm)
    total = accelerator.reduce(total, "sum") / weight
    # Before the step: a checkpoint of weights that are no numbers could never be gone on from.
    if not torch.isfinite(total) or not torch.isfinite(torch.as_tensor(norm)):
        raise RuntimeError("the loss is no number any more; lower learning_rate, or set mixed_precision=no")
    optimizer.step()
    return float(total), sum(len(part["picture_of"]) if "picture_of" in part else 1 for part in parts), float(norm)


def _steps(
    accelerator: Accelerator,
    batches: Any,
    epoch: Callable[[int], list[list[int]]],
    schedule: Schedule,
    progress: Progress,
) -> Iterator[list[dict[str, Any]]]:
    """This process's batches of every step that is left. The order follows from the epoch's number: nothing of it has
    to be saved."""

    length = len(epoch(0))

    def shares() -> Iterator[list[Batch]]:
        for step in range(progress.step, schedule.steps):
            number, place = divmod(step, length)
            samples = epoch(number)[place]
            yield share_of(samples, accelerator.process_index, accelerator.num_processes, schedule.batch)

    loaded = loader(batches, (batch for share in shares() for batch in share), schedule.workers)
    for share in shares():
        yield [next(loaded) for _ in share]


def loader(batches: Any, order: Iterable[Any], workers: int) -> Iterator[Any]:
    """`batches[key]` for every key of `order`, read ahead by worker processes. What goes wrong there is raised as
    ValueError, without the worker's trace."""
    # Each item is a whole batch already.
    loaded = DataLoader(
        batches,
        batch_size=None,
        sampler=order,  # type: ignore[arg-type]
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        # A fork after threads were started can hang (tokenizers, torch's OpenMP).
        multiprocessing_context="spawn" if workers else None,
        prefetch_factor=4 if workers else None,
        # Its seed would be drawn from the generator that dropout draws from.
        generator=torch.Generator().manual_seed(0),
    )
    try:
        yield from loaded
    except ValueError as error:
        raise ValueError(str(error).strip().splitlines()[-1].removeprefix("ValueError: ")) from error


def _look_round(
    accelerator: Accelerator,
    learnable: Learnable,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    schedule: Schedule,
    run: Path,
    progress: Progress,
    validation: Validation | None,
    reporter: Reporter,
) -> None:
    """Validate and save where it is time to."""
    ends = progress.step == schedule.steps
    judges = validation is not None and (ends or (schedule.eval_steps and progress.step % schedule.eval_steps == 0))
    if judges and validation is not None:
        # Validation draws no random numbers that training would have drawn.
        states = run_state.random_states()
        scores = validation.scores()
        run_state.restore_random_states(states)
        learnable.set_modes()
        reporter.scores(progress.step, scores)
        _judge(progress, scores, validation, schedule)
    if judges or ends or progress.step % schedule.save_steps == 0:
        processes = gather_object([run_state.random_states()])
        if accelerator.is_main_process:
            states = {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
            run_state.save_checkpoint(run, progress, learnable.save, states, processes)
            run_state.prune(run, schedule.save_total_limit, progress.best_step)
        accelerator.wait_for_everyone()


def _judge(progress: Progress, scores: dict[str, float], validation: Validation, schedule: Schedule) -> None:
    progress.scores[progress.step] = scores
    # Absent where the answers leave it undefined, as at the beginning of a new task.
    value = scores.get(validation.best)
    sign = 1 if validation.higher_is_better(validation.best) else -1
    if value is not None and (progress.best is None or sign * value > sign * progress.best):
        progress.best, progress.best_step, progress.validations_without_better = value, progress.step, 0
    else:
        progress.validations_without_better += 1
    patience = schedule.early_stopping_patience
    progress.stopped_early = patience is not None and progress.validations_without_better >= patience


def _resume(
    accelerator: Accelerator,
    learnable: Learnable,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    run: Path,
) -> Progress:
    folder = run_state.newest_whole(run)
    if folder is None:
        return Progress()
    states, processes = run_state.load_states(folder)
    if len(processes) != accelerator.num_processes:
        raise ValueError(
            f"{folder} is of a run on {len(processes)} processes; go on with as many, or start in another folder"
        )
    learnable.load(folder)
    optimizer.load_state_dict(states["optimizer"])
    scheduler.load_state_dict(states["scheduler"])
    run_state.restore_random_states(processes[accelerator.process_index])
    return run_state.load_progress(folder)
