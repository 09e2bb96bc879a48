"""Who runs and who waits: first come, first served."""

from collections import deque

from florence2.errors import InvalidRequest, Unavailable
from florence2.generation.caches import CacheSizes
from florence2.generation.request import Request


class Scheduler:
    """`max_waiting` requests wait at most; `encoder_batch` start at most in one step."""

    def __init__(self, caches: CacheSizes, max_waiting: int, encoder_batch: int) -> None:
        self.caches = caches
        self.max_waiting, self.encoder_batch = max_waiting, encoder_batch
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []

    @property
    def rows_used(self) -> int:
        return sum(request.num_beams for request in self.running)

    def add(self, request: Request) -> None:
        """Raises InvalidRequest for one that can never run, Unavailable when too many wait."""
        if not self.caches.hold([request]):
            raise InvalidRequest(
                f"{request.num_beams} beams of up to {request.settings.max_length} tokens over "
                f"{request.encoder_length} tokens of picture and prompt don't fit into this server's caches: ask for "
                "fewer num_beams or max_new_tokens, or a shorter prompt, or raise rows or cache_length of beam_search"
            )
        if len(self.waiting) >= self.max_waiting:
            raise Unavailable(f"{self.max_waiting} requests are waiting already; try again later")
        self.waiting.append(request)

    def admit(self) -> list[Request]:
        """Those who start in this step. Nobody overtakes: what doesn't fit now gets the next rows that are free."""
        admitted: list[Request] = []
        while self.waiting and len(admitted) < self.encoder_batch:
            if not self.caches.hold([*self.running, self.waiting[0]]):
                break
            admitted.append(self.waiting.popleft())
            self.running.append(admitted[-1])
        return admitted

    def remove(self, request: Request) -> None:
        if request in self.running:
            self.running.remove(request)
        else:
            self.waiting.remove(request)
