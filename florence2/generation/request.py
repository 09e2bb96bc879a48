"""One request on its way through the engine."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from florence2.errors import InvalidRequest
from florence2.generation.beam_search import Generation
from florence2.generation.settings import GenerationSettings
from florence2.manifest import Sizes

LARGEST_FEATURE = 1e4
"""Image features come out of a layer norm; squared in 32 bits they must stay far from the end."""


@dataclass(eq=False)
class Request:
    image_features: NDArray[np.floating]
    """[N, D]; f32, or what the runner's encoder takes."""
    prompt_ids: NDArray[np.int64]
    """[S]"""
    settings: GenerationSettings
    respond: Callable[[Generation | Exception], None]
    """Called once, by the engine's errands: the answer, or why there is none."""
    deadline: float = math.inf
    """On `time.monotonic`'s clock; past it the request is given up, waiting or running. As it was when submitted."""
    is_cancelled: Callable[[], bool] = lambda: False
    """Goes to the server and back."""
    may_be_cancelled_late: bool = True
    """Whether it is asked now and then while it runs, and not only when its turn comes."""
    submitted: float = field(init=False, default=0.0)
    """When the engine got it, on `time.perf_counter`'s clock."""
    admitted: float | None = field(init=False, default=None)
    """When its turn came, on the same clock."""

    @property
    def num_beams(self) -> int:
        return self.settings.num_beams

    @property
    def encoder_length(self) -> int:
        """What cross-attention sees: image tokens and prompt."""
        return len(self.image_features) + len(self.prompt_ids)


def check_tensors(image_features: NDArray[np.float32], prompt_ids: NDArray[np.int64], sizes: Sizes) -> None:
    """Raises InvalidRequest for tensors that no preprocessing and vision encoder of this model make."""
    expected, room = (sizes.image_tokens, sizes.d_model), sizes.max_position_embeddings - sizes.image_tokens
    if image_features.shape != expected:
        raise InvalidRequest(f"image_features must be {expected[0]} x {expected[1]}, not {image_features.shape}")
    # Anything else would spread through rows of the caches that other requests use later.
    if not np.abs(image_features).max() < LARGEST_FEATURE:
        raise InvalidRequest("image_features hold values that are not finite, or larger than any picture's")
    if not 0 < len(prompt_ids) <= room:
        raise InvalidRequest(f"input_ids must be 1 to {room} tokens, not {len(prompt_ids)}")
    if prompt_ids.min() < 0 or prompt_ids.max() >= sizes.vocab_size:
        raise InvalidRequest(f"input_ids must be from 0 to {sizes.vocab_size - 1}")
