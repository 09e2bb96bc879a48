"""A request is sent again while the server is busy or not there, after a pause that grows."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from florence2_client.errors import ServerRefused

T = TypeVar("T")

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 8.0
"""Seconds, between two tries."""


async def with_retries(ask: Callable[[], Awaitable[T]], retries: int, until: float) -> T:
    """Raises ServerRefused: what the last try was told. `until`: time.monotonic() after which there is no other."""
    tried = 0
    while True:
        try:
            return await ask()
        except ServerRefused as error:
            # Half of it by chance, so that clients that were refused together don't come back together.
            pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2**tried) * random.uniform(0.5, 1)
            if error.status != "UNAVAILABLE" or tried == retries or time.monotonic() + pause >= until:
                raise
        await asyncio.sleep(pause)
        tried += 1
