"""What a recipe would do: one batch in words, what is trained, what memory it takes."""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import Accelerator

from florence2_training import trainable
from florence2_training.objective import IGNORED, Florence2Learner
from florence2_training.recipe import Recipe
from florence2_training.sampler import Batch
from florence2_training.train import Training, precision

_SHOWN = 8


def dry_run(recipe: Recipe) -> str:
    """Reads model and data as a run would and sends its first and its longest batch through the model. Nothing is
    trained and nothing is kept."""
    accelerator = Accelerator(mixed_precision=precision(recipe))
    with TemporaryDirectory() as folder:
        training = Training.prepare(recipe, Path(folder), accelerator)
        steps = training.epoch(accelerator)(0)
        size = recipe.per_device_train_batch_size
        first = training.batches[Batch(steps[0][:size])]
        longest = max(steps, key=lambda step: max(training.lengths[step]))
        longest = sorted(longest, key=lambda sample: -training.lengths[sample])[:size]
        memory = _memory(training, training.batches[Batch(longest)], accelerator)
    lines = [
        f"{sum(map(len, steps))} samples an epoch in {len(steps)} steps of up to {len(steps[0])}",
        "",
        *_batch(training, first),
        "",
        "parameters trained",
        *_parameters(training),
        "",
        *memory,
    ]
    return "\n".join(lines)


def _batch(training: Training, batch: dict[str, Any]) -> Iterator[str]:
    tokenizer = training.checkpoint.tokenizer
    yield f"the first batch: {len(batch['labels'])} samples, {len(batch['pixels'])} pictures"
    for prompt, mask, labels in list(zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True))[
        :_SHOWN
    ]:
        counted = labels[labels != IGNORED]
        yield f"  reads   {tokenizer.decode(prompt[mask == 1].tolist(), skip_special_tokens=False)}"
        yield f"  learns  {tokenizer.decode(counted.tolist(), skip_special_tokens=False)}"
        padding = f"{len(labels) - len(counted)} of {len(labels)} labels are padding and ignored"
        yield f"          {len(counted)} tokens count; {padding}"


def _parameters(training: Training) -> Iterator[str]:
    found = trainable.counts(training.model)
    for part, (trained, total) in found.items():
        yield f"  {part:<10} {trained:>12,} of {total:>13,}"
    trained, total = (sum(column) for column in zip(*found.values(), strict=True))
    yield f"  {'all':<10} {trained:>12,} of {total:>13,}  {trained / total:.2%}"


def _memory(training: Training, batch: dict[str, Any], accelerator: Accelerator) -> Iterator[str]:
    parameters = list(training.model.parameters())
    weights = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    # A gradient and AdamW's two moments, in fp32.
    states = sum(12 * parameter.numel() for parameter in parameters if parameter.requires_grad)
    kept = _kept_for_backward(training, batch, accelerator)
    yield "memory, estimated"
    yield f"  weights                             {weights / 1e9:7.2f} GB"
    yield f"  gradients and optimizer             {states / 1e9:7.2f} GB"
    yield f"  activations of the longest batch    {kept / 1e9:7.2f} GB"
    yield f"  all                                 {(weights + states + kept) / 1e9:7.2f} GB"


def _kept_for_backward(training: Training, batch: dict[str, Any], accelerator: Accelerator) -> int:
    """Bytes that autograd holds on to, each storage once, parameters left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in training.model.parameters()}
    held: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    learner = Florence2Learner(training.model, training.checkpoint.preprocessor)
    training.set_modes()
    batch = {name: value.to(accelerator.device) for name, value in batch.items()}
    with accelerator.autocast(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        # Alive to the end, so that no storage's place is taken by another.
        loss = learner(batch)
    del loss
    return sum(held.values())
