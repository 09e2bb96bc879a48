"""One request on its way through the engine."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from florence2.generation.selection import Generation, Selection, start
from florence2.generation.settings import GenerationSettings


@dataclass(eq=False)
class Request:
    image_features: NDArray[np.float32]
    """[N, D]"""
    prompt_ids: NDArray[np.int64]
    """[S]"""
    settings: GenerationSettings
    respond: Callable[[Generation | Exception], None]
    """Called once, by the engine's thread: the answer, or why there is none."""
    deadline: float = math.inf
    """On `time.monotonic`'s clock; past it the request is given up, waiting or running."""
    is_cancelled: Callable[[], bool] = lambda: False
    search: Selection = field(init=False)

    def __post_init__(self) -> None:
        self.search = start(self.settings)

    @property
    def num_beams(self) -> int:
        return self.settings.num_beams

    @property
    def encoder_length(self) -> int:
        """What cross-attention sees: image tokens and prompt."""
        return len(self.image_features) + len(self.prompt_ids)
