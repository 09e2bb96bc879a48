"""Picture files -> pixels, the way serving reads them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from florence2.errors import InvalidRequest
from florence2.images import Resizer, decode


def read_pixels(pictures: Sequence[str], preprocessor: dict[str, Any]) -> NDArray[np.uint8]:
    """u8 [P, H, W, 3]. Raises ValueError, naming the file, for one that can't be read."""
    resize = Resizer(preprocessor)
    return np.stack([_read(picture, resize) for picture in pictures])


def _read(picture: str, resize: Resizer) -> NDArray[np.uint8]:
    try:
        return resize(decode(Path(picture).read_bytes()))
    except (InvalidRequest, OSError) as error:
        raise ValueError(f"{picture}: {error}; `florence2 data check` finds all such pictures") from None
