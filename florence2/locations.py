"""The coordinate rule of Florence-2: a picture's width and height are cut into equal bins, one token each.

Encoding takes the floor and clamps into the picture; decoding gives the centre of the bin. Source:
`BoxQuantizer(mode="floor")` in Microsoft's processing_florence2.py. It returns floats and so do we; transformers
truncates them to integers.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

Size = tuple[int, int]
"""(width, height) of a picture, in pixels."""


def quantize(points: ArrayLike, size: Size, bins: int = 1000) -> NDArray[np.int64]:
    """Pixels of a picture of `size` to bins: `[..., 2 * n]` coordinates x, y, x, y, ... to the same shape."""
    flat = np.asarray(points, dtype=np.float64)
    per_bin = _per_bin(flat.shape, size, bins)
    if np.isnan(flat).any():
        raise ValueError("a coordinate is not a number")
    return np.clip(np.floor(flat / per_bin), 0, bins - 1).astype(np.int64)


def dequantize(indices: ArrayLike, size: Size, bins: int = 1000) -> NDArray[np.float64]:
    """Bins to the pixels at their centres: the inverse of `quantize`, at most half a bin off."""
    flat = np.asarray(indices, dtype=np.float64)
    return (flat + 0.5) * _per_bin(flat.shape, size, bins)


def to_text(points: ArrayLike, size: Size, bins: int = 1000) -> str:
    """A box or polygon in pixels as the model writes it: `<loc_52><loc_333>...`."""
    return "".join(f"<loc_{index}>" for index in quantize(points, size, bins).reshape(-1))


def _per_bin(shape: tuple[int, ...], size: Size, bins: int) -> NDArray[np.float64]:
    if not shape or shape[-1] % 2:
        raise ValueError(f"coordinates come in pairs x, y; got an array of shape {shape}")
    width, height = size
    if width <= 0 or height <= 0:
        raise ValueError(f"a picture's size is (width, height) in pixels, both positive; got {size}")
    return np.tile(np.array([width / bins, height / bins]), shape[-1] // 2)
