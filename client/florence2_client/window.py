"""Many requests, of which so many are with the server at once; the answers in their order."""

from collections.abc import Collection
from typing import Any

from florence2_client.task_methods import Settings, check_settings


def check_many(in_flight: int, settings: Settings) -> None:
    if in_flight < 1:
        raise ValueError(f"in_flight is a number of requests, 1 or more, not {in_flight}")
    check_settings(settings)


def busy(window: Collection[Any], in_flight: int) -> list[Any]:
    """Which of these tasks or futures one has to wait for before another may be sent; none if there is room."""
    running = [one for one in window if not one.done()]
    if len(window) >= 2 * in_flight:
        return running[:1]
    return running if len(running) >= in_flight else []


def outcome(done: Any, return_exceptions: bool) -> Any:
    try:
        return done.result()
    except Exception as error:
        if return_exceptions:
            return error
        raise
