"""In what order samples are met: batches of like length, pictures kept together, the same at every run."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_MEGABATCH = 32
"""Optimizer steps within which samples are sorted by length: what is left of chance (transformers takes 50)."""


def steps_of(
    samples: NDArray[np.int64],
    lengths: NDArray[np.int32],
    pictures: NDArray[np.int32] | None,
    size: int,
    by_length: bool,
    seed: Sequence[int],
) -> list[list[int]]:
    """Samples, [N] places in `lengths` and `pictures`, as optimizer steps of `size`; the last may have fewer.

    With `pictures`, samples of one picture stay together. Samples of a step are sorted so that slices of it are alike.
    """
    rng = np.random.default_rng(seed)
    groups = _groups(rng.permutation(samples), pictures)
    if by_length:
        groups = _sorted_in_chunks(groups, lengths, size * _MEGABATCH)
    flat = [sample for group in groups for sample in group]
    steps = [flat[start : start + size] for start in range(0, len(flat), size)]
    return [steps[place] for place in rng.permutation(len(steps))]


def steps_of_all(count: int, size: int, seed: Sequence[int]) -> list[list[int]]:
    """The samples from 0 to `count`, shuffled."""
    return steps_of(np.arange(count), np.zeros(count, np.int32), None, size, by_length=False, seed=seed)


def _groups(samples: NDArray[np.int64], pictures: NDArray[np.int32] | None) -> list[list[int]]:
    if pictures is None:
        return [[int(sample)] for sample in samples]
    groups: dict[int, list[int]] = {}
    for sample in samples:
        groups.setdefault(int(pictures[sample]), []).append(int(sample))
    return list(groups.values())


def _sorted_in_chunks(groups: list[list[int]], lengths: NDArray[np.int32], chunk: int) -> list[list[int]]:
    ordered: list[list[int]] = []
    pending: list[list[int]] = []
    count = 0
    for group in groups:
        pending.append(group)
        count += len(group)
        if count >= chunk:
            ordered += sorted(pending, key=lambda group: -max(lengths[group]))
            pending, count = [], 0
    return ordered + sorted(pending, key=lambda group: -max(lengths[group]))


@dataclass(frozen=True)
class Batch:
    """Samples that one process sends through the model at once."""

    samples: list[int]
    counts: bool = True
    """False where a process has nothing to do but must keep step with the others."""


def share_of(step: Sequence[int], rank: int, processes: int, size: int) -> list[Batch]:
    """One process's part of an optimizer step, in batches of up to `size`; all processes have equally many."""
    together = size * processes
    batches = []
    for start in range(0, len(step), together):
        chunk = list(step[start : start + together])
        own = [int(sample) for sample in np.array_split(chunk, processes)[rank]]
        batches.append(Batch(own) if own else Batch(chunk[:1], counts=False))
    return batches
