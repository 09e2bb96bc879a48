"""Where the beams of a step stand: which belong together, and where cross-attention finds what they read."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from florence2.generation.request import Request

Ids = NDArray[np.int64]


class Seats:
    """Of R beams of N requests, in the order of these; the same from step to step as long as nobody comes or goes."""

    def __init__(self, requests: Sequence[Request], slots: Sequence[int], shape: tuple[int, int]) -> None:
        """`slots`: where in the cross-attention caches each request is. `shape`: how many slots and columns of them a
        step reads."""
        self.requests, self._slots = list(requests), list(slots)
        beams = np.array([request.num_beams for request in requests], np.int64)
        self._ends = np.cumsum(beams)
        self.first_beams: Ids = np.repeat(self._ends - beams, beams)
        """[R]: the first beam of each beam's request."""
        self.beams = int(beams.max(initial=0))
        """Of the request that has most."""
        self.places: Ids = np.repeat(slots, beams) * self.beams + np.arange(len(self.first_beams)) - self.first_beams
        """[R]: of each beam, counted through all slots, as if each had `beams`."""
        self.mask = np.zeros(shape, np.int64)
        """`encoder_attention_mask`"""
        for request, slot in zip(requests, slots, strict=True):
            self.mask[slot, : request.encoder_length] = 1

    def are(self, requests: Sequence[Request], slots: Sequence[int], shape: tuple[int, int]) -> bool:
        return (self.requests, self._slots, self.mask.shape) == (requests, slots, shape)

    def rows_of(self, request: Request, rows: Ids) -> Ids:
        """Of `rows` [R], its own."""
        end = self._ends[self.requests.index(request)]
        return rows[end - request.num_beams : end]
