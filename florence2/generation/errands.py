"""What is to be done beside the engine's steps."""

import logging
from collections.abc import Callable
from queue import SimpleQueue
from threading import Thread

logger = logging.getLogger(__name__)


class Errands:
    """Done in their order by a thread of their own, while this is entered, and else at once: an answer goes to the
    server's process and back, and nobody's next token waits for that. What fails is logged."""

    def __init__(self) -> None:
        self._waiting: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread: Thread | None = None

    @property
    def count(self) -> int:
        """How many are still to be done."""
        return self._waiting.qsize()

    def add(self, errand: Callable[[], None]) -> None:
        if self._thread:
            self._waiting.put(errand)
        else:
            self._do(errand)

    def __enter__(self) -> None:
        thread = Thread(target=self._run, name="errands", daemon=True)
        thread.start()
        self._thread = thread

    def __exit__(self, *_: object) -> None:
        """Whatever was added has been done."""
        thread, self._thread = self._thread, None
        self._waiting.put(None)
        if thread:
            thread.join()

    def _run(self) -> None:
        while errand := self._waiting.get():
            self._do(errand)
            # It holds its request, and the next one may be long in coming.
            del errand

    @staticmethod
    def _do(errand: Callable[[], None]) -> None:
        try:
            errand()
        except BaseException:
            # Without this thread nobody would be answered any more.
            logger.exception("an answer could not be delivered, or figures not be reported")
