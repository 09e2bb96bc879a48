"""The parts of a Florence-2 that are trained or left as they are, and the linear layers that adapters go to."""

import hashlib
import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

_PREFIXES = {
    "vision": "model.vision_tower.",
    "projector": "model.multi_modal_projector.",
    "embeddings": "model.language_model.shared.",
    "encoder": "model.language_model.encoder.",
    "decoder": "model.language_model.decoder.",
}
"""Names of the native class. The embeddings are the tied head, too; a head of its own belongs to the decoder."""

_TEXT = (
    r"model\.language_model\.encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|fc1|fc2)",
    r"model\.language_model\.decoder\.layers\.\d+\.((self_attn|encoder_attn)\.(q|k|v|out)_proj|fc1|fc2)",
)
_PROJECTOR = (r"model\.multi_modal_projector\.image_projection",)
_VISION = (
    r"model\.vision_tower\.blocks\.\d+\.\d+\.(spatial_block\.window_attn|channel_block\.channel_attn)\.(qkv|proj)",
    r"model\.vision_tower\.blocks\.\d+\.\d+\.(spatial|channel)_block\.ffn\.(fc1|fc2)",
)
PRESETS = {"text": _TEXT, "text+projector": _TEXT + _PROJECTOR, "all": _TEXT + _PROJECTOR + _VISION}
"""Patterns for whole module names: fc1, fc2 and proj exist in both towers."""


def part_of(name: str) -> str:
    """The part that a parameter of the native class belongs to."""
    if name.startswith("lm_head."):
        return "decoder"
    return next(part for part, prefix in _PREFIXES.items() if name.startswith(prefix))


def modules_of(model: Any) -> dict[str, nn.Module]:
    """The parts as modules."""
    language = model.model.language_model
    return {
        "vision": model.model.vision_tower,
        "projector": model.model.multi_modal_projector,
        "embeddings": language.shared,
        "encoder": language.encoder,
        "decoder": language.decoder,
    }


def targets(model: nn.Module, wanted: str | Sequence[str]) -> list[str]:
    """The names of the linear layers that a preset or a list of patterns means.

    Raises ValueError for an unknown preset, and for a pattern that matches no linear layer: an adapter that is nowhere
    trains nothing, silently. The head is tied to the embeddings and depthwise convolutions can't be merged (peft), so
    neither is ever a target.
    """
    if isinstance(wanted, str):
        if wanted not in PRESETS:
            raise ValueError(f"lora.targets is one of {', '.join(PRESETS)}, or a list of patterns, not {wanted!r}")
        wanted = PRESETS[wanted]
    if not wanted:
        raise ValueError("lora.targets is empty: nothing would be trained")
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    found: set[str] = set()
    for pattern in wanted:
        try:
            matches = [name for name in linears if re.fullmatch(pattern, name)]
        except re.error as error:
            raise ValueError(f"lora.targets: {pattern!r} is not a regular expression: {error}") from None
        if not matches:
            raise ValueError(
                f"lora.targets: {pattern!r} matches no linear layer as a whole; their names are like "
                f"{', '.join(linears[:: max(len(linears) // 4, 1)])}"
            )
        found.update(matches)
    return [name for name in linears if name in found]


def freeze(model: nn.Module, parts: Iterable[str]) -> None:
    """No gradients for the named parts; all others are trained."""
    frozen = set(parts)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) not in frozen)


def set_modes(model: nn.Module) -> None:
    """Training mode where something is trained, evaluation mode elsewhere.

    Without gradients a part in training mode would still drop paths (DaViT) and activations (BART).
    """
    trained = trained_parts(model)
    model.train()
    for part, module in modules_of(model).items():
        module.train(part in trained)


def trained_parts(model: nn.Module) -> set[str]:
    return {part_of(name) for name, parameter in model.named_parameters() if parameter.requires_grad}


def frozen_sha256(model: nn.Module) -> str:
    """Of every parameter that is not trained, and every buffer."""
    total = hashlib.sha256()
    tensors = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in sorted(tensors, key=lambda entry: entry[0]):
        if not tensor.requires_grad:
            total.update(name.encode() + b"\0")
            total.update(raw(tensor))
    return total.hexdigest()


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def counts(model: nn.Module) -> dict[str, tuple[int, int]]:
    """By part: parameters that are trained, and all."""
    found = dict.fromkeys(_PREFIXES, (0, 0))
    for name, parameter in model.named_parameters():
        trained, total = found[part_of(name)]
        found[part_of(name)] = trained + parameter.numel() * parameter.requires_grad, total + parameter.numel()
    return found
