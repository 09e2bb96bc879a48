"""Clients that ask what is allowed, again and again, and know the answers."""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from florence2_client import Florence2Client

Question = tuple[Path, str, dict[str, Any]]
"""As in tests/serving.py, which needs transformers."""
CLIENTS = 16
TIMEOUT = 120
"""Seconds after which an honest request is lost, whatever the server went through meanwhile."""


@dataclass(frozen=True)
class Asked:
    """An honest request that has ended."""

    outcome: str
    """answered, lost or wrong."""
    began: float
    """time.monotonic()."""
    seconds: float
    detail: str = ""


def ask(client: Florence2Client, question: Question, expected: Sequence[int]) -> Asked:
    picture, prompt, settings = question
    began = time.monotonic()
    try:
        found = client.run(prompt, picture, **settings).token_ids.tolist()
    except Exception as error:
        return Asked("lost", began, time.monotonic() - began, f"{picture.name} {prompt} {settings}: {error!r}"[:500])
    if found != list(expected):
        return Asked("wrong", began, time.monotonic() - began, f"{picture.name} {prompt} {settings}: {found}"[:500])
    return Asked("answered", began, time.monotonic() - began)


def client(ports: tuple[int, int], number: int, timeout: float = TIMEOUT) -> Florence2Client:
    """Over HTTP and gRPC in turn, with the retries that every client has."""
    url = f"http://127.0.0.1:{ports[0]}" if number % 2 else f"127.0.0.1:{ports[1]}"
    return Florence2Client(url, timeout=timeout)


def ask_all(
    ports: tuple[int, int], answers: Sequence[tuple[Question, Sequence[int]]], clients: int, endings: Any, stop: Any
) -> None:
    """In a process of its own, until `stop`: each client in its own order. `endings`, a queue, gets what Asked."""

    def work(number: int) -> None:
        rng = Random(number)
        with client(ports, number) as asking:
            while not stop.is_set():
                endings.put(ask(asking, *rng.choice(answers)))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    endings.put(None)
