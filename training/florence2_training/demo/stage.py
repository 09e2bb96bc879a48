"""One stage of the training: a fixed number of AdamW steps, shared by processes, resumed after a break."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.distributed
import torch.multiprocessing
from torch import nn
from tqdm import tqdm

_SAVE_EVERY = 100


@dataclass(frozen=True)
class Stage:
    name: str
    steps: int
    batch: int
    rate: float
    warm_up: int = 66
    """Steps in which the rate rises."""
    decay: float = 0.3
    """The part of the steps, at the end, in which it falls; in between it is constant."""

    def rate_at(self, step: int) -> float:
        left = (self.steps - step - 1) / max(self.decay * self.steps, 1)
        return self.rate * min(1.0, (step + 1) / self.warm_up, left + 1e-3)


@dataclass(frozen=True)
class Share:
    """Which process this is. Each takes its part of every batch; one thread each, as small operators gain
    little from a second thread and lose much when another program has its core."""

    rank: int = 0
    processes: int = 1

    def of(self, batch: Sequence[int]) -> Sequence[int]:
        return batch[self.rank :: self.processes]


def shared(work: Callable[..., None], processes: int, *arguments: object) -> None:
    """`work(share, *arguments)` in every process."""
    if processes == 1:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        work(Share(), *arguments)
        torch.set_num_threads(threads)
        return
    with TemporaryDirectory() as folder:
        meeting = f"file://{folder}/meeting"
        torch.multiprocessing.spawn(_join, (processes, meeting, work, arguments), nprocs=processes)


def _join(rank: int, processes: int, meeting: str, work: Callable[..., None], arguments: tuple) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=processes)
    work(Share(rank, processes), *arguments)
    torch.distributed.destroy_process_group()


def batch_at(step: int, size: int, count: int, seed: int) -> list[int]:
    """Batches walk through one shuffle of `count` after another; a resumed run meets the same ones."""
    places = np.arange(step * size, (step + 1) * size)
    shuffles = {epoch: np.random.default_rng([seed, epoch]).permutation(count) for epoch in set(places // count)}
    return [int(shuffles[place // count][place % count]) for place in places]


def fit(
    module: nn.Module,
    loss_of: Callable[[list[int], int], torch.Tensor],
    count: int,
    stage: Stage,
    seed: int,
    share: Share,
    state: Path,
) -> None:
    """Trains `module` in place. `loss_of(indices, step)` is the mean loss of this process's part."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=stage.rate, weight_decay=0.01, betas=(0.9, 0.98))
    first = _resume(module, optimiser, state)
    bar = tqdm(range(first, stage.steps), stage.name, stage.steps, initial=first, disable=share.rank > 0)
    smooth = None
    for step in bar:
        for group in optimiser.param_groups:
            group["lr"] = stage.rate_at(step)
        loss = loss_of(list(share.of(batch_at(step, stage.batch, count, seed))), step)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        _average_gradients(parameters, share)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
        bar.set_postfix(loss=f"{smooth:.3f}", refresh=False)
        if share.rank == 0 and ((step + 1) % _SAVE_EVERY == 0 or step + 1 == stage.steps):
            saved = {"step": step + 1, "module": module.state_dict(), "optimiser": optimiser.state_dict()}
            torch.save(saved, state.with_suffix(".new"))
            state.with_suffix(".new").replace(state)


def _resume(module: nn.Module, optimiser: torch.optim.Optimizer, state: Path) -> int:
    if not state.exists():
        return 0
    saved = torch.load(state, weights_only=True)
    module.load_state_dict(saved["module"])
    optimiser.load_state_dict(saved["optimiser"])
    return saved["step"]


def _average_gradients(parameters: list[nn.Parameter], share: Share) -> None:
    if share.processes == 1:
        return
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    torch.distributed.all_reduce(flat)
    flat /= share.processes
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter)
