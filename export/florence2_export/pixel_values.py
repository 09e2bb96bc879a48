"""Pixels as the model's image processor hands them to it."""

from typing import Any

import torch
from torch import Tensor


def normalised(pixels: Tensor, preprocessor: dict[str, Any]) -> Tensor:
    """u8 [P, H, W, 3] -> f32 [P, 3, H, W], as HF's image processor makes them."""
    mean, std = (
        torch.tensor(preprocessor[name], device=pixels.device).view(3, 1, 1) for name in ("image_mean", "image_std")
    )
    return (pixels.permute(0, 3, 1, 2).float() * preprocessor["rescale_factor"] - mean) / std
