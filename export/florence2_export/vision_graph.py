"""The torch module that becomes the vision encoder's graph: transformers' layers, run in the order of its code."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from florence2_export.layers import dtype_of


class ImageEncoder(nn.Module):
    """`pixel_values` f32 [B, 3, H, W], normalised -> `image_features` f32 [B, N, D]."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.vision_tower = model.model.vision_tower
        self.projector = model.model.multi_modal_projector

    def forward(self, pixel_values: Tensor) -> Tensor:
        hidden = pixel_values.to(dtype_of(self))
        # Not vision_tower(...): its decorators record outputs, which torch.export can't follow.
        for conv, blocks in zip(self.vision_tower.convs, self.vision_tower.blocks, strict=True):
            hidden = conv(hidden).permute(0, 2, 3, 1)
            for block in blocks:
                hidden = _vision_block(block.spatial_block, block.spatial_block.window_attn, _attend_windows, hidden)
                hidden = _vision_block(block.channel_block, block.channel_block.channel_attn, _attend_channels, hidden)
            hidden = hidden.permute(0, 3, 1, 2)
        return self.projector(hidden).float()


class VisionEncoder(ImageEncoder):
    """`pixels` u8 [B, H, W, 3], resized, RGB -> `image_features` f32 [B, N, D]."""

    def __init__(self, model: Any, preprocessor: dict[str, Any]) -> None:
        super().__init__(model)
        # (x * rescale - mean) / std as one multiply and one add per channel.
        rescale, mean, std = (preprocessor[name] for name in ("rescale_factor", "image_mean", "image_std"))
        # No buffers: they stay float32 when the weights become half.
        self.scale = torch.tensor([rescale / s for s in std])
        self.shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)])

    def forward(self, pixels: Tensor) -> Tensor:
        # First of all a cast: TensorRT takes u8 as an input, and for nothing else.
        normalised = pixels.to(torch.float32) * self.scale + self.shift
        return super().forward(normalised.permute(0, 3, 1, 2))


def _vision_block(block: Any, attention: Any, attend: Callable[..., Tensor], hidden: Tensor) -> Tensor:
    """Attention, then a feed-forward layer, each behind a depthwise convolution. `hidden` [B, H, W, C]."""
    # Channels go first around the convolutions alone: ONNX Runtime makes that part of its own rearranging for them.
    hidden = hidden + block.conv1(hidden.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    hidden = hidden + attend(attention, block.norm1(hidden))
    hidden = hidden + block.conv2(hidden.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    return hidden + block.ffn(block.norm2(hidden))


def _attend_windows(attention: Any, hidden: Tensor) -> Tensor:
    """Every head in every window for itself. `hidden` [B, H, W, C]."""
    batch, height, width, channels = hidden.shape
    side, heads = attention.window_size, attention.num_heads
    if height % side or width % side:
        hidden = nn.functional.pad(hidden, (0, 0, 0, -width % side, 0, -height % side))
    rows, columns = hidden.shape[1] // side, hidden.shape[2] // side
    # HF cuts the windows first; linear layers do not mind, and each tensor is rearranged once instead of twice.
    split = (batch, rows, side, columns, side, heads, channels // heads)
    query, key, value = (
        part.reshape(split).permute(0, 1, 3, 5, 2, 4, 6).reshape(-1, side * side, channels // heads)
        for part in attention.qkv(hidden).split(channels, dim=-1)
    )
    weights = torch.softmax(query * attention.scale @ key.transpose(1, 2), dim=-1)
    attended = (weights @ value).reshape(batch, rows, columns, heads, side, side, channels // heads)
    attended = attended.permute(0, 1, 4, 2, 5, 3, 6).reshape(batch, rows * side, columns * side, channels)
    return attention.proj(attended[:, :height, :width])


def _attend_channels(attention: Any, hidden: Tensor) -> Tensor:
    """The channels of every group among themselves. `hidden` [B, H, W, C]."""
    batch, height, width, channels = hidden.shape
    split = (batch, height * width, attention.groups, channels // attention.groups)
    # HF puts the tokens last; kept before the channels, they are moved in whole rows.
    query, key, value = (part.reshape(split).transpose(1, 2) for part in attention.qkv(hidden).split(channels, dim=-1))
    weights = torch.softmax((query * (height * width) ** -0.5).transpose(2, 3) @ key, dim=-1)
    attended = value @ weights.transpose(2, 3)
    return attention.proj(attended.transpose(1, 2).reshape(batch, height, width, channels))
