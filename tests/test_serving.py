"""The real server: Microsoft's answers through Triton, the demo checkpoint over gRPC and HTTP, and what is refused."""

import base64
import io
import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import DEMO_CHECKPOINT, MICROSOFT_FIXTURE
from florence2_client import Answer, Florence2Client, ServerRefused
from florence2_release.install import install
from florence2_release.installation import ServerError, find_tritonserver
from florence2_release.server import TritonServer
from PIL import Image, ImageOps

try:
    find_tritonserver()
except ServerError as error:
    pytest.skip(str(error), allow_module_level=True)

pytestmark = pytest.mark.server
PICTURES = DEMO_CHECKPOINT.parent / "pictures"


def serve(export: Path, folder: Path) -> Iterator[TritonServer]:
    install(export, folder / "repository")
    with TritonServer(folder / "repository") as server:
        server.wait_ready()
        yield server


@pytest.fixture(scope="module")
def microsoft(microsoft_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    yield from serve(microsoft_export, tmp_path_factory.mktemp("microsoft"))


@pytest.fixture(scope="module")
def demo(demo_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    yield from serve(demo_export, tmp_path_factory.mktemp("demo"))


def client(server: TritonServer, protocol: str = "grpc") -> Florence2Client:
    port = server.grpc_port if protocol == "grpc" else server.http_port
    return Florence2Client(f"127.0.0.1:{port}", protocol=protocol)


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

    def ask(case: dict[str, Any]) -> tuple[Answer, Answer]:
        image = MICROSOFT_FIXTURE / "images" / case["image"]
        prompt = case["task"] + case["text"]
        with client(microsoft) as connection:
            beams = connection.ask(image, prompt, num_beams=3, max_new_tokens=64)
            return beams, connection.ask(image, prompt, num_beams=1, max_new_tokens=64)

    with ThreadPoolExecutor(4) as pool:
        for case, (beams, greedy) in zip(cases, pool.map(ask, cases), strict=True):
            assert beams.token_ids.tolist() == case["beam3_ids"]
            assert greedy.token_ids.tolist() == case["greedy_ids"]
            assert beams.text == case["beam3_text"]
            assert beams.sequence_score == pytest.approx(case["beam3_score"], abs=1e-3)
            np.testing.assert_allclose(beams.token_logprobs, case["beam3_transition_scores"], atol=1e-3)
            assert_close(beams.answer, case["answer"])


def test_grpc_http_and_curl_agree(demo: TritonServer) -> None:
    image = PICTURES / "scene-1.png"
    with client(demo) as grpc, client(demo, "http") as http:
        first, second = grpc.ask(image, "<OD>"), http.ask(image, "<OD>")
    assert first.answer == second.answer
    assert first.token_ids.tolist() == second.token_ids.tolist()
    assert first.model_version == second.model_version == "1"
    body = {"prompt": "<OD>", "image": base64.b64encode(image.read_bytes()).decode()}
    generated = post(demo, body)
    assert json.loads(generated["answer"]) == first.answer
    assert generated["text"] == first.text


def test_settings_of_a_request(demo: TritonServer) -> None:
    image = PICTURES / "scene-1.png"
    with client(demo) as grpc, client(demo, "http") as http:
        asked: dict[str, Any] = {
            "num_beams": 2,
            "max_new_tokens": 4,
            "no_repeat_ngram_size": 0,
            "length_penalty": 0.5,
            "early_stopping": False,
        }
        answers = [grpc.ask(image, "<OD>", **asked), http.ask(image, "<OD>", **asked)]
    assert answers[0].token_ids.tolist() == answers[1].token_ids.tolist()
    assert len(answers[0].token_ids) == 5
    assert answers[0].finish_reason == "length"
    generated = post(
        demo,
        {"prompt": "<OD>", "image": base64.b64encode(image.read_bytes()).decode(), **asked},
    )
    assert generated["token_ids"] == answers[0].token_ids.tolist()


def test_pictures_of_every_kind(demo: TritonServer) -> None:
    picture = Image.open(PICTURES / "scene-1.png").convert("RGB")
    with client(demo) as connection:
        plain = connection.ask(picture, "<OD>")
        for mode in ("PNG", "BMP", "TIFF", "WEBP"):
            buffer = io.BytesIO()
            picture.save(buffer, format=mode, **({"lossless": True} if mode == "WEBP" else {}))
            assert connection.ask(buffer.getvalue(), "<OD>").answer == plain.answer
            assert connection.ask(base64.b64encode(buffer.getvalue()), "<OD>").answer == plain.answer


def test_a_region_in_pixels_is_the_region_in_locations(demo: TritonServer) -> None:
    image = PICTURES / "scene-2.jpg"
    with Image.open(image) as opened:
        width, height = ImageOps.exif_transpose(opened).size
    with client(demo) as connection:
        box = (0.25 * width, 0.5 * height, 0.75 * width, 0.999 * height)
        pixels = connection.ask(image, "<REGION_TO_CATEGORY>", region=box)
        locations = connection.ask(image, "<REGION_TO_CATEGORY><loc_250><loc_500><loc_750><loc_999>")
    assert pixels.token_ids.tolist() == locations.token_ids.tolist()


BAD = {
    "empty": (b"", "<OD>", "the image is empty"),
    "no image": (b"<html>", "<OD>", "can't be read"),
    "cut short": ((PICTURES / "scene-1.png").read_bytes()[:2000], "<OD>", "cut short"),
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
        connection.ask((PICTURES / "scene-1.png") if image is None else image, prompt)
    assert refused.value.status in ("StatusCode.INVALID_ARGUMENT", "400")


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
        connection.ask(PICTURES / "scene-1.png", "<OD>", **settings)
    assert refused.value.status == "StatusCode.INVALID_ARGUMENT"


def test_bad_requests_do_not_hurt_the_good_ones_beside_them(demo: TritonServer) -> None:
    image = PICTURES / "scene-1.png"
    with client(demo) as connection:
        expected = connection.ask(image, "<OD>").answer

    def ask(index: int) -> Any:
        with client(demo) as connection:
            try:
                return connection.ask(b"broken" * index if index % 2 else image, "<OD>").answer
            except ServerRefused as error:
                return error.status

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(24)))
    assert answers[0::2] == [expected] * 12
    assert answers[1::2] == ["StatusCode.INVALID_ARGUMENT"] * 12
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
    image = PICTURES / "scene-1.png"
    answer = ask_command(demo, str(image), "<OD>", "--draw", str(drawn))
    assert answer.returncode == 0, answer.stderr
    assert "drawn" in answer.stdout
    with Image.open(drawn) as picture, Image.open(image) as original:
        assert picture.size == original.size
    as_json = ask_command(demo, str(image), "<OD>", "--json")
    fields = json.loads(as_json.stdout)
    assert set(fields) == {"answer", "text", "token_ids", "token_logprobs", "sequence_score"}
    assert len(fields["token_ids"]) == len(fields["token_logprobs"]) + 1
    refused = ask_command(demo, str(image), "<CAPTIN>")
    assert refused.returncode == 1
    assert refused.stderr.count("\n") == 1
    assert "did you mean <CAPTION>" in refused.stderr


def test_ask_without_a_server_says_so_in_one_line() -> None:
    answer = subprocess.run(
        [sys.executable, "-m", "florence2.cli", "ask", str(PICTURES / "scene-1.png"), "<OD>", "--url", "localhost:1"],
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 1
    assert answer.stderr.count("\n") == 1
    assert "localhost:1" in answer.stderr


def ask_command(server: TritonServer, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "florence2.cli", "ask", *arguments, "--url", f"127.0.0.1:{server.grpc_port}"]
    return subprocess.run(command, capture_output=True, text=True)


def post(server: TritonServer, body: dict[str, Any], verb: str = "generate") -> dict[str, Any]:
    url = f"{server.http_url}/v2/models/florence2/{verb}"
    with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode())) as response:
        return json.loads(response.read())
