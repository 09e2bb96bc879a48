"""Thousands of requests, good and bad, of every task and both protocols: `make soak`."""

import json
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from conftest import DEMO_CHECKPOINT
from florence2_client import Florence2Client, ServerRefused
from florence2_release.install import install
from florence2_release.server import TritonServer

pytestmark = [pytest.mark.soak, pytest.mark.server]
PICTURES = sorted(path for path in (DEMO_CHECKPOINT.parent / "pictures").iterdir() if path.suffix in (".png", ".jpg"))
PROMPTS = (
    "<OD>",
    "<CAPTION>",
    "<OCR>",
    "<OCR_WITH_REGION>",
    "<REGION_PROPOSAL>",
    "<CAPTION_TO_PHRASE_GROUNDING>a table",
)
BAD = ((b"", "<OD>"), (b"<html>", "<OD>"), (PICTURES[0].read_bytes()[:999], "<OD>"), (None, "<CAPTIN>"), (None, ""))
REQUESTS, ROUNDS, WORKERS = 1000, 5, 8


@pytest.fixture(scope="module")
def server(demo_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    repository = tmp_path_factory.mktemp("soak") / "models"
    install(demo_export, repository)
    with TritonServer(repository) as running:
        running.wait_ready()
        yield running


def memory(server: TritonServer) -> float:
    """Resident megabytes of the server and its stubs."""
    parent = psutil.Process(server.pid)
    return sum(process.memory_info().rss for process in [parent, *parent.children(recursive=True)]) / 1e6


def test_answers_stay_the_same_and_memory_flat(server: TritonServer) -> None:
    questions = [(picture, prompt) for picture in PICTURES for prompt in PROMPTS]
    url = f"127.0.0.1:{server.grpc_port}"
    with Florence2Client(url) as client:
        expected = {question: client.ask(*question).token_ids.tolist() for question in questions}

    def ask_many(seed: int) -> tuple[int, int]:
        """Good and bad requests; each is checked."""
        rng, counts = random.Random(seed), [0, 0]
        http = rng.random() < 0.5
        port = server.http_port if http else server.grpc_port
        with Florence2Client(f"127.0.0.1:{port}", protocol="http" if http else "grpc") as client:
            for _ in range(REQUESTS // WORKERS):
                if rng.random() < 0.1:
                    image, prompt = rng.choice(BAD)
                    with pytest.raises(ServerRefused) as refused:
                        client.ask(PICTURES[0] if image is None else image, prompt)
                    assert refused.value.status in ("StatusCode.INVALID_ARGUMENT", "400")
                    counts[1] += 1
                else:
                    question = rng.choice(questions)
                    assert client.ask(*question).token_ids.tolist() == expected[question]
                    counts[0] += 1
        return counts[0], counts[1]

    sizes, answered, refused = [memory(server)], 0, 0
    with ThreadPoolExecutor(WORKERS) as pool:
        for round_number in range(ROUNDS):
            seeds = range(round_number * WORKERS, (round_number + 1) * WORKERS)
            for good, bad in pool.map(ask_many, seeds):
                answered, refused = answered + good, refused + bad
            sizes.append(memory(server))
    figures = {"answered": answered, "refused": refused, "megabytes after each round": [round(size) for size in sizes]}
    print(json.dumps(figures))
    # The first round fills caches and arenas; from then on nothing may grow.
    assert sizes[-1] < 1.05 * sizes[1]
