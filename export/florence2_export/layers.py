"""What the graphs' modules share: attention spelled out in plain operators, which ONNX Runtime and TensorRT both read.

ONNX Runtime's fused MultiHeadAttention is no more than 4% faster on a CPU, and slower beside int8 weights.
"""

from typing import Any

import torch
from torch import Tensor, nn


def split_heads(hidden: Tensor, heads: int) -> Tensor:
    batch, length, width = hidden.shape
    return hidden.reshape(batch, length, heads, width // heads).transpose(1, 2)


def softmax_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """Softmax attention, [B, heads, Q, head_dim] x [B, heads, K, head_dim] -> [B, Q, heads * head_dim]."""
    weights = torch.softmax(query @ key.transpose(2, 3) + bias, dim=-1)
    return (weights @ value).transpose(1, 2).flatten(2)


def mask_bias(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    # Half of the least number: where nothing is allowed, a sum of -inf in every column would give NaN.
    return torch.where(allowed, 0.0, torch.finfo(dtype).min / 2).to(dtype)


def dtype_of(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


def learned_positions(stack: Any, positions: Tensor) -> Tensor:
    # BART's learned positions start at row 2 (BartLearnedPositionalEmbedding.offset).
    table = stack.embed_positions
    return nn.functional.embedding(positions + table.offset, table.weight)
