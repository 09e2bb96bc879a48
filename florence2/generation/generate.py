"""Decoding one request from its image features to its answer's tokens."""

import numpy as np
from numpy.typing import NDArray

from florence2.generation.runner import GraphRunner
from florence2.generation.selection import Generation, start
from florence2.generation.settings import GenerationSettings


def generate(
    runner: GraphRunner,
    image_features: NDArray[np.float32],
    prompt_ids: NDArray[np.int64],
    settings: GenerationSettings,
) -> Generation:
    """`image_features` [N, D], `prompt_ids` [S] -> what transformers' `generate` gives for the same settings."""
    search = start(settings)
    beams = settings.num_beams
    caches = runner.encode(image_features[None], [prompt_ids], beams)
    while not search.finished:
        positions = np.full((1, beams), search.length - 1)
        ids, logprobs = runner.decode(
            caches, search.input_ids[None], positions, search.beam_indices, search.banned_tokens()
        )
        search.advance(ids[0], logprobs[0])
    return search.result()
