"""Thousands of requests of every task, with settings of their own, over both protocols; some bad, some cancelled, some
with too little time: `make soak`."""

import json
import random
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import Any

import psutil
import pytest
from florence2_client import Florence2Client, ServerRefused
from florence2_release.server import TritonServer
from serving import (
    ENDLESS,
    HANGS,
    PICTURES,
    PROMPTS,
    Question,
    client,
    figures,
    prepare,
    serve,
    tensors,
    transformers_answers,
    wait_until,
)
from tritonclient import grpc
from tritonclient.utils import InferenceServerException

pytestmark = pytest.mark.server
BAD = ((b"", "<OD>"), (b"<html>", "<OD>"), (PICTURES[0].read_bytes()[:999], "<OD>"), (None, "<CAPTIN>"), (None, ""))
WORKERS = 8


@pytest.fixture(scope="module")
def server(demo_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    # Fewer recent pictures than there are, so that the vision encoder's graph goes on running.
    with serve(demo_export, tmp_path_factory.mktemp("soak"), vision_encoder={"recent_pictures": 3}) as running:
        yield running


def memory(server: TritonServer) -> float:
    """Resident megabytes of the server and its stubs."""
    parent = psutil.Process(server.pid)
    return sum(process.memory_info().rss for process in [parent, *parent.children(recursive=True)]) / 1e6


def random_question(rng: random.Random) -> Question:
    settings = {
        "num_beams": rng.randint(1, 8),
        "max_new_tokens": rng.choice([1, 5, 20, 80, 511]),
        "no_repeat_ngram_size": rng.choice([0, 2, 3, 4]),
        "length_penalty": rng.choice([-1.0, 0.0, 0.5, 1.0, 2.0]),
        "early_stopping": rng.choice([True, False]),
    }
    return rng.choice(PICTURES), rng.choice(PROMPTS), settings


class Asker:
    """One client's requests, each checked."""

    def __init__(self, server: TritonServer, seed: int, questions: list[Question], expected: list[list[int]]) -> None:
        self.rng = random.Random(seed)
        self.answers = list(zip(questions, expected, strict=True))
        self.client: Florence2Client = client(server, self.rng.choice(["grpc", "http"]))
        self.direct = grpc.InferenceServerClient(server.grpc_url)
        pixels, input_ids = prepare(server, PICTURES[0], "<OD>")
        features = self.direct.infer("vision_encoder", tensors(pixels=pixels)).as_numpy("image_features")[0]
        self.endless = tensors(image_features=features, input_ids=input_ids, **ENDLESS)

    def ask(self) -> str:
        kinds = (self.good, self.bad, self.late, self.cancelled)
        return self.rng.choices(kinds, weights=(80, 10, 5, 5))[0]()

    def good(self) -> str:
        (picture, prompt, settings), expected = self.rng.choice(self.answers)
        found = self.client.run(prompt, picture, **settings).token_ids.tolist()
        assert found == expected, (picture.name, prompt, settings)
        return "answered"

    def bad(self) -> str:
        image, prompt = self.rng.choice(BAD)
        with pytest.raises(ServerRefused) as refused:
            self.client.run(prompt, PICTURES[0] if image is None else image)
        assert refused.value.status == "INVALID_ARGUMENT"
        return "refused"

    def late(self) -> str:
        """In time or not, but never something else."""
        (picture, prompt, settings), expected = self.rng.choice(self.answers)
        inputs = tensors(image=picture.read_bytes(), prompt=prompt.encode(), **settings)
        try:
            found = self.direct.infer("florence2", inputs, timeout=self.rng.randint(1, 50_000))
        except InferenceServerException as error:
            assert error.status() == "StatusCode.UNAVAILABLE"  # noqa: PT017
            return "out of time"
        assert found.as_numpy("token_ids")[0].tolist() == expected
        return "answered in time"

    def cancelled(self) -> str:
        ended: Queue[Any] = Queue()
        call = self.direct.async_infer("beam_search", self.endless, lambda result, error: ended.put(error))
        time.sleep(self.rng.uniform(0, 0.05))
        call.cancel()
        assert ended.get(timeout=HANGS).status() == "StatusCode.CANCELLED"
        return "cancelled"

    def close(self) -> None:
        self.client.close()
        self.direct.close()


def ask_all(server: TritonServer, requests: int, rounds: int, distinct: int) -> tuple[Counter[str], list[float]]:
    """So many requests in each round: what became of them, and megabytes before the first round and after each."""
    rng = random.Random(0)
    questions = [random_question(rng) for _ in range(distinct)]
    expected = transformers_answers(server, questions)

    def ask_many(seed: int) -> Counter[str]:
        asker = Asker(server, seed, questions, expected)
        try:
            return Counter(asker.ask() for _ in range(requests // WORKERS))
        finally:
            asker.close()

    sizes, counted = [memory(server)], Counter[str]()
    with ThreadPoolExecutor(WORKERS) as pool:
        for number in range(rounds):
            for counts in pool.map(ask_many, range(number * WORKERS, (number + 1) * WORKERS)):
                counted += counts
            sizes.append(memory(server))
    print(json.dumps({**counted, "megabytes after each round": [round(size) for size in sizes]}))
    assert counted.total() == requests * rounds
    wait_until(lambda: figures(server.metrics_url)["florence2_rows_used"] == 0)
    return counted, sizes


@pytest.mark.soak
def test_answers_stay_the_same_and_memory_flat(server: TritonServer) -> None:
    counted, sizes = ask_all(server, requests=1000, rounds=10, distinct=500)
    assert len(counted) == 5
    # The first round fills caches and arenas; from then on nothing may grow.
    assert sizes[-1] < 1.05 * sizes[1]


def test_some_hundred_answers(server: TritonServer) -> None:
    counted, _ = ask_all(server, requests=160, rounds=1, distinct=40)
    assert {"answered", "refused", "out of time", "cancelled"} <= counted.keys()
