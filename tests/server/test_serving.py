"""The real server: Microsoft's answers through Triton, the demo checkpoint over gRPC and HTTP, what is refused, and
what happens under load, when time is over, when lists are full, with a cache, and when the engine fails."""

import base64
import io
import json
import random
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pytest
from conftest import DEMO_CHECKPOINT, MICROSOFT_FIXTURE
from florence2_client import Florence2Client, Result, ServerRefused
from florence2_release.install import install
from florence2_release.server import TritonServer
from florence2_release.tritonserver import ServerError, find_tritonserver
from florence2_release.watchdog import Watchdog
from google.protobuf import text_format
from PIL import Image, ImageOps
from serving import (
    ENDLESS,
    HANGS,
    PICTURES,
    PROMPTS,
    Question,
    client,
    counts,
    figures,
    figures_by_instance,
    prepare,
    serve,
    tensors,
    transformers_answers,
    wait_until,
)
from tritonclient import grpc, http
from tritonclient.grpc.model_config_pb2 import ModelConfig
from tritonclient.utils import InferenceServerException

from florence2.backend.metric_names import COUNTERS, FAILED, GAUGES
from florence2.generation.caches import CacheSizes
from florence2.manifest import Manifest

try:
    find_tritonserver()
except ServerError as error:
    pytest.skip(str(error), allow_module_level=True)

pytestmark = pytest.mark.server
SCENE = DEMO_CHECKPOINT.parent / "pictures" / "scene-1.png"
UNAVAILABLE = ("StatusCode.UNAVAILABLE", "503")
"""As gRPC and HTTP say it."""


@pytest.fixture(scope="module")
def microsoft(microsoft_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    with serve(microsoft_export, tmp_path_factory.mktemp("microsoft")) as server:
        yield server


@pytest.fixture(scope="module")
def demo(demo_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    with serve(demo_export, tmp_path_factory.mktemp("demo")) as server:
        yield server


@pytest.fixture(scope="module")
def small(demo_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """Room for one request of three beams and two that wait."""
    with serve(
        demo_export,
        tmp_path_factory.mktemp("small"),
        beam_search={"rows": 3, "max_waiting": 2},
        preprocess={"max_waiting": 8},
    ) as server:
        yield server


@pytest.fixture(scope="module")
def caching(demo_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """With a response cache; its log says when the vision encoder's graph runs."""
    folder = tmp_path_factory.mktemp("caching")
    with serve(demo_export, folder, change=tell_of_pictures, cache_size=64 * 2**20) as server:
        yield server


def tell_of_pictures(repository: Path) -> None:
    with (repository / "vision_encoder" / "1" / "model.py").open("a") as file:
        file.write("""

import triton_python_backend_utils as pb_utils
from onnxruntime import InferenceSession
run = InferenceSession.run
InferenceSession.run = lambda *args: pb_utils.Logger.log_info("a picture is looked at") or run(*args)
""")


def assert_close(found: Any, expected: Any) -> None:
    """Equal, numbers within 1e-3."""
    if isinstance(expected, dict):
        for key, value in expected.items():
            assert_close(found[key], value)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for pair in zip(found, expected, strict=True):
            assert_close(*pair)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, abs=1e-3)
    else:
        assert found == expected


def test_microsofts_answers_through_triton(microsoft: TritonServer) -> None:
    cases = json.loads((MICROSOFT_FIXTURE / "expected.json").read_text())
    assert len(cases) == 24

    def ask(case: dict[str, Any]) -> tuple[Result, Result]:
        image = MICROSOFT_FIXTURE / "images" / case["image"]
        prompt = case["task"] + case["text"]
        with client(microsoft) as connection:
            beams = connection.run(prompt, image, num_beams=3, max_new_tokens=64)
            return beams, connection.run(prompt, image, num_beams=1, max_new_tokens=64)

    with ThreadPoolExecutor(4) as pool:
        for case, (beams, greedy) in zip(cases, pool.map(ask, cases), strict=True):
            assert beams.token_ids.tolist() == case["beam3_ids"]
            assert greedy.token_ids.tolist() == case["greedy_ids"]
            assert beams.text == case["beam3_text"]
            assert beams.sequence_score == pytest.approx(case["beam3_score"], abs=1e-3)
            np.testing.assert_allclose(beams.token_logprobs, case["beam3_transition_scores"], atol=1e-3)
            assert_close(beams.answer, case["answer"])


def test_grpc_http_and_curl_agree(demo: TritonServer) -> None:
    image = SCENE
    with client(demo) as over_grpc, client(demo, "http") as over_http:
        first, second = over_grpc.run("<OD>", image), over_http.run("<OD>", image)
    assert first.answer == second.answer
    assert first.token_ids.tolist() == second.token_ids.tolist()
    assert first.model_version == second.model_version == "1"
    body = {"prompt": "<OD>", "image": base64.b64encode(image.read_bytes()).decode()}
    generated = post(demo, body)
    assert json.loads(generated["answer"]) == first.answer
    assert generated["text"] == first.text


def test_settings_of_a_request(demo: TritonServer) -> None:
    image = SCENE
    with client(demo) as over_grpc, client(demo, "http") as over_http:
        asked: dict[str, Any] = {
            "num_beams": 2,
            "max_new_tokens": 4,
            "no_repeat_ngram_size": 0,
            "length_penalty": 0.5,
            "early_stopping": False,
        }
        answers = [over_grpc.run("<OD>", image, **asked), over_http.run("<OD>", image, **asked)]
    assert answers[0].token_ids.tolist() == answers[1].token_ids.tolist()
    assert len(answers[0].token_ids) == 5
    assert answers[0].finish_reason == "length"
    generated = post(
        demo,
        {"prompt": "<OD>", "image": base64.b64encode(image.read_bytes()).decode(), **asked},
    )
    assert generated["token_ids"] == answers[0].token_ids.tolist()


def test_pictures_of_every_kind(demo: TritonServer) -> None:
    picture = Image.open(SCENE).convert("RGB")
    with client(demo) as connection:
        plain = connection.run("<OD>", picture)
        for mode in ("PNG", "BMP", "TIFF", "WEBP"):
            buffer = io.BytesIO()
            picture.save(buffer, format=mode, **({"lossless": True} if mode == "WEBP" else {}))
            assert connection.run("<OD>", buffer.getvalue()).answer == plain.answer
            assert connection.run("<OD>", base64.b64encode(buffer.getvalue())).answer == plain.answer


def test_a_region_in_pixels_is_the_region_in_locations(demo: TritonServer) -> None:
    image = SCENE.with_name("scene-2.jpg")
    with Image.open(image) as opened:
        width, height = ImageOps.exif_transpose(opened).size
    with client(demo) as connection:
        box = (0.25 * width, 0.5 * height, 0.75 * width, 0.999 * height)
        pixels = connection.run("<REGION_TO_CATEGORY>", image, region=box)
        locations = connection.run("<REGION_TO_CATEGORY><loc_250><loc_500><loc_750><loc_999>", image)
    assert pixels.token_ids.tolist() == locations.token_ids.tolist()


BAD = {
    "empty": (b"", "<OD>", "the image is empty"),
    "no image": (b"<html>", "<OD>", "can't be read"),
    "cut short": (SCENE.read_bytes()[:2000], "<OD>", "cut short"),
    "misspelt": (None, "<CAPTIN>", "did you mean <CAPTION>"),
    "text missing": (None, "<CAPTION_TO_PHRASE_GROUNDING>", "needs text"),
    "text too much": (None, "<OD>a car", "takes no text"),
    "no region": (None, "<REGION_TO_CATEGORY>a car", "needs a region"),
    "too long": (None, "word " * 1000, "shorten it"),
    "empty prompt": (None, " ", "the prompt is empty"),
}


@pytest.mark.parametrize("protocol", ["grpc", "http"])
@pytest.mark.parametrize("kind", BAD)
def test_refusals_have_a_code_and_a_reason(demo: TritonServer, protocol: str, kind: str) -> None:
    image, prompt, reason = BAD[kind]
    with client(demo, protocol) as connection, pytest.raises(ServerRefused, match=reason) as refused:
        connection.run(prompt, SCENE if image is None else image)
    assert refused.value.status == "INVALID_ARGUMENT"


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 0},
        {"num_beams": 9},
        {"max_new_tokens": 0},
        {"max_new_tokens": 512},
        {"no_repeat_ngram_size": -1},
        {"length_penalty": float("nan")},
        {"length_penalty": float("inf")},
    ],
    ids=str,
)
def test_settings_out_of_range(demo: TritonServer, settings: dict[str, Any]) -> None:
    with client(demo) as connection, pytest.raises(ServerRefused, match=f"{next(iter(settings))} must be") as refused:
        connection.run("<OD>", SCENE, **settings)
    assert refused.value.status == "INVALID_ARGUMENT"


def test_bad_requests_do_not_hurt_the_good_ones_beside_them(demo: TritonServer) -> None:
    image = SCENE
    with client(demo) as connection:
        expected = connection.run("<OD>", image).answer

    def ask(index: int) -> Any:
        with client(demo) as connection:
            try:
                return connection.run("<OD>", b"broken" * index if index % 2 else image).answer
            except ServerRefused as error:
                return error.status

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(24)))
    assert answers[0::2] == [expected] * 12
    assert answers[1::2] == ["INVALID_ARGUMENT"] * 12
    assert demo.is_ready()


def test_a_batch_in_one_request_is_refused(demo: TritonServer) -> None:
    body = {
        "inputs": [
            {"name": name, "datatype": "BYTES", "shape": [2, 1], "data": ["x", "y"]} for name in ("image", "prompt")
        ]
    }
    with pytest.raises(urllib.error.HTTPError) as refused:
        post(demo, body, "infer")
    assert refused.value.code == 400


def test_ask_prints_and_draws(demo: TritonServer, tmp_path: Path) -> None:
    drawn = tmp_path / "drawn.png"
    image = SCENE
    answer = ask_command(demo, str(image), "<OD>", "--draw", str(drawn))
    assert answer.returncode == 0, answer.stderr
    assert "drawn" in answer.stdout
    with Image.open(drawn) as picture, Image.open(image) as original:
        assert picture.size == original.size
    as_json = ask_command(demo, str(image), "<OD>", "--json")
    fields = json.loads(as_json.stdout)
    assert set(fields) == {
        *("prompt", "answer", "text", "token_ids", "token_logprobs", "sequence_score"),
        *("finish_reason", "model_version"),
    }
    assert len(fields["token_ids"]) == len(fields["token_logprobs"]) + 1
    refused = ask_command(demo, str(image), "<CAPTIN>")
    assert refused.returncode == 1
    assert refused.stderr.count("\n") == 1
    assert "did you mean <CAPTION>" in refused.stderr


def test_ask_without_a_server_says_so_in_one_line() -> None:
    answer = subprocess.run(
        [sys.executable, "-m", "florence2_cli", "ask", str(SCENE), "<OD>", "--url", "localhost:1"],
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 1
    assert answer.stderr.count("\n") == 1
    assert "localhost:1" in answer.stderr


def random_settings(rng: random.Random) -> dict[str, Any]:
    """Not no_repeat_ngram_size=1 with many tokens: it bans the end token, and among the near-equal tokens that come
    when an answer may not end, transformers itself takes others if the features change by 1e-7 of their size."""
    max_new_tokens = rng.choice([1, 2, 5, 10, 20, 40, 80])
    return {
        "num_beams": rng.randint(1, 8),
        "max_new_tokens": max_new_tokens,
        "no_repeat_ngram_size": rng.choice([0, 1, 2, 3, 4] if max_new_tokens <= 20 else [0, 2, 3, 4]),
        "length_penalty": rng.choice([-1.0, 0.0, 0.5, 1.0, 2.0]),
        "early_stopping": rng.choice([True, False]),
    }


def test_64_requests_in_flight_each_get_transformers_answer_for_their_settings(demo: TritonServer) -> None:
    rng = random.Random(0)
    questions = [(rng.choice(PICTURES), PROMPTS[i % len(PROMPTS)], random_settings(rng)) for i in range(64)]
    start = Barrier(len(questions))

    def ask(index: int) -> list[int]:
        picture, prompt, settings = questions[index]
        with client(demo, "http" if index % 2 else "grpc") as connection:
            start.wait(HANGS)
            return connection.run(prompt, picture, **settings).token_ids.tolist()

    before = figures(demo.metrics_url)
    with ThreadPoolExecutor(len(questions)) as pool:
        answers = list(pool.map(ask, range(len(questions))))
    for question, answer, expected in zip(questions, answers, transformers_answers(demo, questions), strict=True):
        assert answer == expected, question
    after = figures(demo.metrics_url)
    # They did share steps.
    tokens, steps = (after[name] - before[name] for name in ("florence2_tokens_total", "florence2_steps_total"))
    assert tokens > 2 * steps


def test_figures_on_the_metrics_endpoint(demo: TritonServer, demo_export: Path) -> None:
    wait_until(lambda: figures(demo.metrics_url)["florence2_rows_used"] == 0)
    before = figures(demo.metrics_url)
    assert set(before) == {*COUNTERS, *GAUGES} - {FAILED}
    rows = int(before["florence2_rows_free"])
    assert before["florence2_cache_bytes"] == CacheSizes.of(Manifest.read(demo_export).sizes, rows).bytes
    with client(demo) as connection:
        tokens = sum(len(connection.run("<OD>", picture, num_beams=1).token_ids) - 1 for picture in PICTURES)
    wait_until(lambda: figures(demo.metrics_url)["florence2_tokens_total"] == before["florence2_tokens_total"] + tokens)
    assert steps_until_free(demo, before) == tokens
    after = figures(demo.metrics_url)
    assert after["florence2_tokens_per_step"] == 1
    for name in ("florence2_encoder_seconds_total", "florence2_decoder_seconds_total"):
        assert before[name] < after[name] < before[name] + HANGS
    assert after["florence2_rows_free"] == rows


def steps_until_free(server: TritonServer, before: dict[str, float]) -> float:
    """Since the figures `before`, of a server with nothing to do; those of now may still be of that time."""

    def is_free() -> bool:
        now = figures(server.metrics_url)
        busy = any(now[f"florence2_{name}"] for name in ("requests_running", "requests_waiting", "rows_used"))
        return now["florence2_steps_total"] > before["florence2_steps_total"] and not busy

    wait_until(is_free)
    return figures(server.metrics_url)["florence2_steps_total"] - before["florence2_steps_total"]


def test_cancelled_requests_free_their_rows(demo: TritonServer) -> None:
    pixels, input_ids = prepare(demo, SCENE, "<OD>")
    before, requests = figures(demo.metrics_url), 20
    ended: list[Any] = []
    with grpc.InferenceServerClient(demo.grpc_url) as connection:
        features = connection.infer("vision_encoder", tensors(pixels=pixels)).as_numpy("image_features")[0]
        inputs = tensors(image_features=features, input_ids=input_ids, **ENDLESS)
        calls = [
            connection.async_infer("beam_search", inputs, lambda result, error: ended.append(error))
            for _ in range(requests)
        ]
        wait_until(lambda: figures(demo.metrics_url)["florence2_rows_used"] >= 24)
        for call in calls:
            call.cancel()
        wait_until(lambda: len(ended) == requests)
    assert [error.status() for error in ended] == ["StatusCode.CANCELLED"] * requests
    # To the end it would have been far more, with so many rows.
    at_once = before["florence2_rows_free"] // 8
    assert steps_until_free(demo, before) < requests / at_once * 511 / 2
    with client(demo) as connection:
        assert connection.run("<OD>", SCENE).finish_reason == "stop"


TIME_IS_OVER = "the request's time (is|was) over"
"""In the engine, or in the lists before it."""


@pytest.mark.parametrize("protocol", [grpc, http], ids=["grpc", "http"])
def test_a_requests_timeout_ends_it_in_the_engine(demo: TritonServer, protocol: Any) -> None:
    url = demo.grpc_url if protocol is grpc else demo.http_url.removeprefix("http://")
    inputs = tensors(protocol, image=SCENE.read_bytes(), prompt=b"<OD>", **ENDLESS)
    before = figures(demo.metrics_url)

    def ask(timeout: int) -> Any:
        with protocol.InferenceServerClient(url) as connection:
            return connection.infer("florence2", inputs, timeout=timeout).as_numpy("token_ids")

    def give_up(_: int) -> None:
        with pytest.raises(InferenceServerException, match=TIME_IS_OVER) as late:
            ask(100_000)
        assert late.value.status() in UNAVAILABLE

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(give_up, range(6)))
    assert steps_until_free(demo, before) < 511
    assert ask(10**6 * HANGS).shape == (1, 512)


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_a_client_that_gives_up_leaves_no_work_behind(demo: TritonServer, protocol: str) -> None:
    before = figures(demo.metrics_url)
    with client(demo, protocol, timeout=0.1) as connection, pytest.raises(ServerRefused):
        connection.run("<OD>", SCENE, **ENDLESS)
    assert steps_until_free(demo, before) < 511


def answer_or_status(server: TritonServer, index: int, picture: Any, **settings: Any) -> Any:
    with client(server, "http" if index % 2 else "grpc") as connection:
        try:
            return connection.run("<OD>", picture, **settings).token_ids.tolist()
        except ServerRefused as refused:
            if refused.status != "UNAVAILABLE":
                raise
            return str(refused)


def test_a_full_server_says_so_at_once_and_answers_those_it_took(small: TritonServer) -> None:
    settings = ENDLESS | {"num_beams": 3}
    with client(small) as connection:
        expected = connection.run("<OD>", SCENE, **settings).token_ids.tolist()
    ended: list[bool] = []

    def ask(index: int) -> Any:
        answer = answer_or_status(small, index, SCENE, **settings)
        ended.append(answer == expected)
        return answer

    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(ask, 0)
        # Until it runs it is one of those that wait.
        wait_until(lambda: figures(small.metrics_url)["florence2_requests_running"] == 1)
        answers = [*pool.map(ask, range(1, 8)), first.result()]
    # One ran, two waited.
    assert answers.count(expected) >= 3
    refused = [answer for answer in answers if answer != expected]
    assert refused
    assert all("already; try again later" in answer for answer in refused)
    # Nobody was refused after having waited for others to end.
    assert not any(ended[: len(refused)])


def test_what_the_engine_has_no_room_for_is_refused_at_the_front(small: TritonServer) -> None:
    buffer = io.BytesIO()
    Image.open(SCENE).convert("RGB").resize((4000, 3000)).save(buffer, format="JPEG")
    large = buffer.getvalue()
    with client(small) as connection:
        expected = connection.run("<OD>", large, max_new_tokens=1).token_ids.tolist()
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda i: answer_or_status(small, i, large, max_new_tokens=1), range(16)))
    assert expected in answers
    # Before a picture is decoded.
    refused = [answer for answer in answers if answer != expected]
    assert refused
    assert all(re.search(r"\d requests are here already; try again later", answer) for answer in refused)


def test_who_waits_too_long_is_told(small: TritonServer) -> None:
    settings = ENDLESS | {"num_beams": 3}
    inputs = tensors(image=SCENE.read_bytes(), prompt=b"<OD>")
    with ThreadPoolExecutor(2) as pool:
        before_it = [pool.submit(answer_or_status, small, index, SCENE, **settings) for index in range(2)]
        wait_until(lambda: figures(small.metrics_url)["florence2_requests_waiting"] == 1)
        with (
            grpc.InferenceServerClient(small.grpc_url) as connection,
            pytest.raises(InferenceServerException, match=TIME_IS_OVER) as late,
        ):
            connection.infer("florence2", inputs, timeout=50_000)
        assert late.value.status() == "StatusCode.UNAVAILABLE"
        assert [len(request.result(HANGS)) for request in before_it] == [512, 512]


def pictures_looked_at(server: TritonServer) -> int:
    return server.log_text().count("a picture is looked at")


def test_the_response_cache(caching: TritonServer) -> None:
    """Eight tasks on one picture cost one run of the vision encoder; the same request again is not decoded again."""
    prompts = PROMPTS[:8]
    with client(caching) as over_grpc, client(caching, "http") as over_http:
        answers = [over_grpc.run(prompt, SCENE) for prompt in prompts]
        assert counts(caching, "vision_encoder") == {
            "success": 8,
            "fail": 0,
            "cache_hit": 7,
            "cache_miss": 1,
            "computed": 1,
        }
        assert pictures_looked_at(caching) == 1
        computed = {"beam_search": counts(caching, "beam_search")["computed"]}
        again = [connection.run(prompt, SCENE) for connection in (over_grpc, over_http) for prompt in prompts]
        for name, before in computed.items():
            found = counts(caching, name)
            assert (found["cache_hit"], found["cache_miss"], found["computed"]) == (16, 8, before)
        assert [answer.to_json() for answer in again] == 2 * [answer.to_json() for answer in answers]
        # Another setting is another request.
        assert len(over_grpc.run("<OD>", SCENE, max_new_tokens=2).token_ids) == 3


def test_tasks_on_a_new_picture_at_once_look_at_it_once(caching: TritonServer) -> None:
    picture = SCENE.with_name("scene-2.jpg")
    before, start = pictures_looked_at(caching), Barrier(8)

    def ask(prompt: str) -> list[int]:
        with client(caching) as connection:
            start.wait(HANGS)
            return connection.run(prompt, picture).token_ids.tolist()

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, PROMPTS[:8]))
    assert pictures_looked_at(caching) == before + 1
    with client(caching) as connection:
        assert [connection.run(prompt, picture).token_ids.tolist() for prompt in PROMPTS[:8]] == answers


OUTPUTS = ("answer", "text", "token_ids", "token_logprobs", "sequence_score", "finish_reason")


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("protocol", [grpc, http])
def test_any_subset_of_the_outputs(demo: TritonServer, caching: TritonServer, cached: bool, protocol: Any) -> None:
    server = caching if cached else demo
    url = server.grpc_url if protocol is grpc else server.http_url.removeprefix("http://")
    inputs = tensors(protocol, image=SCENE.read_bytes(), prompt=b"<OD>")
    subsets = [names for count in range(1, 7) for names in combinations(OUTPUTS, count)]
    assert len(subsets) == 63
    with protocol.InferenceServerClient(url) as connection:
        whole = connection.infer("florence2", inputs)
        for names in subsets:
            found = connection.infer(
                "florence2", inputs, outputs=[protocol.InferRequestedOutput(name) for name in names]
            )
            for name in OUTPUTS:
                values = found.as_numpy(name)
                assert (values is not None) == (name in names)
                assert values is None or values.tolist() == whole.as_numpy(name).tolist()


def test_errors_are_not_kept_in_the_cache(caching: TritonServer) -> None:
    inputs = tensors(image=SCENE.read_bytes(), prompt=b"<CAPTION>", **ENDLESS)
    with grpc.InferenceServerClient(caching.grpc_url) as connection:
        for _ in range(2):
            with pytest.raises(InferenceServerException, match=TIME_IS_OVER):
                connection.infer("florence2", inputs, timeout=200_000)
        assert connection.infer("florence2", inputs).as_numpy("token_ids").shape == (1, 512)
        # From the cache, or it could not be there in time.
        assert connection.infer("florence2", inputs, timeout=200_000).as_numpy("token_ids").shape == (1, 512)


def fail_when_asked_for_six_tokens(repository: Path) -> None:
    with (repository / "beam_search" / "1" / "model.py").open("a") as file:
        file.write("""

from florence2.generation.engine import Engine
step = Engine.step
def fail(engine):
    if any(request.settings.max_length == 7 for request in engine.scheduler.waiting):
        raise RuntimeError("never seen before")
    step(engine)
Engine.step = fail
""")


def test_when_the_engine_fails_everyone_is_told_and_the_server_recovers(demo_export: Path, tmp_path: Path) -> None:
    with (
        serve(demo_export, tmp_path, change=fail_when_asked_for_six_tokens, beam_search={"rows": 24}) as server,
        client(server) as connection,
    ):
        said: list[str] = []
        watchdog = Watchdog(server, said.append)
        watchdog.start()
        try:
            expected = connection.run("<OD>", SCENE).token_ids.tolist()
            with ThreadPoolExecutor(3) as pool:
                running = [pool.submit(answer_or_status, server, index, SCENE, **ENDLESS) for index in range(3)]
                wait_until(lambda: figures(server.metrics_url)["florence2_rows_used"] == 24)
                with pytest.raises(ServerRefused, match="the engine has failed") as told:
                    connection.run("<OD>", SCENE, max_new_tokens=6)
                assert told.value.status == "UNAVAILABLE"
                assert all("the engine has failed" in request.result(HANGS) for request in running)
            wait_until(lambda: not server.is_alive())
            assert said == ["beam_search 1 has lost its process: the server ends"]
            assert "its process ends: RuntimeError('never seen before')" in server.log_text()
            server.start()
            server.wait_ready()
            assert answer_or_none(server) == expected
        finally:
            watchdog.stop()


def twice(repository: Path) -> None:
    """Two processes of a thread each."""
    for model in ("vision_encoder", "beam_search"):
        path = repository / model / "config.pbtxt"
        config = text_format.Parse(path.read_text(), ModelConfig())
        config.instance_group[0].count = 2
        config.parameters["threads"].string_value = "1"
        path.write_text(text_format.MessageToString(config))


def test_instances_share_the_work(demo_export: Path, tmp_path: Path) -> None:
    asked = {"max_new_tokens": 15}
    questions: list[Question] = [(picture, prompt, asked) for picture in PICTURES[:4] for prompt in PROMPTS[:5]]
    with serve(demo_export, tmp_path, change=twice) as server, ThreadPoolExecutor(8) as pool, client(server) as asking:
        expected = transformers_answers(server, questions)

        def ask(number: int) -> None:
            picture, prompt, settings = questions[number % len(questions)]
            found = asking.run(prompt, picture, **settings).token_ids.tolist()
            assert found == expected[number % len(questions)], (picture.name, prompt)

        list(pool.map(ask, range(200)))
        name = "florence2_first_tokens_total"
        wait_until(lambda: figures(server.metrics_url)[name] == 200)
        answered = figures_by_instance(server.metrics_url, name)
    assert sorted(answered) == ["beam_search_0_0", "beam_search_0_1"]
    assert all(90 <= own <= 110 for own in answered.values())


def answer_or_none(server: TritonServer) -> list[int] | None:
    try:
        with client(server) as connection:
            return connection.run("<OD>", SCENE).token_ids.tolist()
    except ServerRefused:
        return None


def test_serve_lets_requests_finish_and_tells_how_much_the_cache_has_answered(
    demo_export: Path, tmp_path: Path
) -> None:
    install(demo_export, tmp_path / "repository")
    command = [sys.executable, "-m", "florence2_cli", "serve", "--repository", str(tmp_path / "repository")]
    command += ["--response-cache", "64"]
    command += [argument for name in ("http", "grpc", "metrics", "health") for argument in (f"--{name}-port", "0")]

    def ask(**settings: Any) -> list[int]:
        # Over HTTP, whose open connections tritonserver waits for. Over gRPC a stop refuses an ensemble's next step
        # (core, `DynamicBatchScheduler::Enqueue`; triton-inference-server/server#6287).
        with Florence2Client(urls["HTTP"]) as connection:
            return connection.run("<OD>", SCENE, **settings).token_ids.tolist()

    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process, ThreadPoolExecutor(1) as pool:
        try:
            assert process.stdout
            lines = iter(process.stdout.readline, "")
            urls = dict(next(line for line in lines if name in line).split() for name in ("HTTP", "gRPC", "metrics"))
            assert ask() == ask() != ask(max_new_tokens=3)
            running = pool.submit(ask, **ENDLESS)
            wait_until(lambda: figures(urls["metrics"])["florence2_rows_used"] == ENDLESS["num_beams"])
            process.send_signal(signal.SIGINT)
            assert len(running.result(HANGS)) == 512
            told = process.communicate(timeout=HANGS)[0]
        except BaseException:
            process.kill()
            raise
    # The one that runs has passed the vision encoder.
    hits = "beam_search 1 of 3 requests, vision_encoder 3 of 4 requests"
    assert f"answered from the response cache: {hits}\n" in told
    assert process.returncode == 0


def ask_command(server: TritonServer, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "florence2_cli", "ask", *arguments, "--url", f"127.0.0.1:{server.grpc_port}"]
    return subprocess.run(command, capture_output=True, text=True)


def post(server: TritonServer, body: dict[str, Any], verb: str = "generate") -> dict[str, Any]:
    url = f"{server.http_url}/v2/models/florence2/{verb}"
    with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode())) as response:
        return json.loads(response.read())
