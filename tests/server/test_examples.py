"""client/examples: Node and curl against the real server, and against one that is busy."""

import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import DEMO_CHECKPOINT, ROOT
from florence2_release.health import Health, serve_health
from florence2_release.server import TritonServer
from serving import client, serve

EXAMPLES = ROOT / "client" / "examples"
SCENE = DEMO_CHECKPOINT.parent / "pictures" / "scene-1.png"
GREEDY = {"num_beams": 1, "max_new_tokens": 30}

needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")


@pytest.fixture(scope="module")
def server(demo_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    with serve(demo_export, tmp_path_factory.mktemp("examples")) as running:
        yield running


@pytest.fixture(scope="module")
def expected(server: TritonServer) -> dict[str, Any]:
    """What the Python client gets."""
    with client(server) as python:
        return json.loads(python.run("<OD>", SCENE, **GREEDY).to_json())


def run(url: str, *command: str | Path, metrics: str = "", health: str = "") -> subprocess.CompletedProcess[str]:
    env = os.environ | {"FLORENCE2_URL": url, "FLORENCE2_METRICS": metrics.removesuffix("/metrics")}
    env["FLORENCE2_HEALTH"] = health
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)


def node(url: str, code: str) -> Any:
    """What `code` comes to, in JSON; it has `client` and `image`."""
    program = f"""
import {{ readFile }} from 'node:fs/promises';
import {{ Florence2, Refused }} from {json.dumps((EXAMPLES / "node" / "florence2.mjs").as_uri())};
const url = {json.dumps(url)}, image = await readFile({json.dumps(str(SCENE))}), client = new Florence2(url);
const failure = (request) => request.then(() => null, (error) => [error.constructor.name, error.status, error.message]);
console.log(JSON.stringify(await (async () => {code})()));
"""
    done = subprocess.run(
        ["node", "--input-type=module", "--eval", program], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@contextmanager
def busy(times: int, answer: dict[str, Any] | None) -> Iterator[tuple[str, list[Any]]]:
    """A server that is busy so many times, then gives `answer`, None being never; and the bodies it gets."""
    bodies: list[Any] = []
    over = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            if len(bodies) > times and answer is None:
                over.wait(60)
            status, content = (503, {"error": "busy"}) if len(bodies) <= times else (200, answer)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{http.server_port}", bodies
        finally:
            over.set()
            http.shutdown()
            thread.join()


# --- Node ---------------------------------------------------------------------------------------------------


@needs_node
@pytest.mark.server
def test_node_gets_what_the_python_client_gets(server: TritonServer, expected: dict[str, Any]) -> None:
    code = (
        f"{{ return [await client.generate(image, '<OD>', {GREEDY}), await client.infer(image, '<OD>', {GREEDY})]; }}"
    )
    for answer in node(server.http_url, code):
        for name in ("answer", "text", "token_ids", "finish_reason", "model_version"):
            assert answer[name] == expected[name]
        assert answer["token_logprobs"] == pytest.approx(expected["token_logprobs"], abs=1e-5)
        assert answer["sequence_score"] == pytest.approx(expected["sequence_score"], abs=1e-5)


@needs_node
@pytest.mark.server
def test_node_says_why(server: TritonServer) -> None:
    code = """{ return [
        await failure(client.generate(image, '<CAPTIOM>')),
        await failure(client.infer(image, '<OD>', { num_beams: 9 })),
        await failure(client.infer(Buffer.from('no picture!'), '<OD>')),
        await failure(client.generate(image, '<OD>', { num_beamz: 1 })),
        await failure(new Florence2(url, { model: 'florence3' }).generate(image, '<OD>')),
    ]; }"""
    task, beams, picture, name, model = node(server.http_url, code)
    assert task[:2] == beams[:2] == picture[:2] == ["Refused", 400]
    assert "did you mean <CAPTION>?" in task[2]
    assert "num_beams must be from 1 to 8, not 9" in beams[2]
    assert "can't be read" in picture[2]
    assert name[0] == "TypeError"
    assert "num_beamz" in name[2]
    assert model[:2] == ["Refused", 404]


@needs_node
@pytest.mark.server
def test_nodes_time_is_the_servers(server: TritonServer) -> None:
    """Over before its turn, whoever notices first."""
    code = "{ return failure(new Florence2(url, { timeout: 1, retries: 0 }).infer(image, '<MORE_DETAILED_CAPTION>')); }"
    kind, status, _ = node(server.http_url, code)
    assert kind == "Refused"
    assert status in (None, 503)


@needs_node
def test_node_tries_again_and_gives_up() -> None:
    answer = {"answer": '{"<OD>": {}}', "model_version": "1"}
    with busy(2, answer) as (url, bodies):
        assert node(url, "{ return client.generate(image, '<OD>'); }") == answer | {"answer": {"<OD>": {}}}
        assert len(bodies) == 3
    with busy(9, answer) as (url, bodies):
        code = "{ return failure(new Florence2(url, { retries: 1 }).generate(image, '<OD>')); }"
        assert node(url, code) == ["Refused", 503, "busy"]
        assert len(bodies) == 2
    code = "{ return failure(new Florence2(url, { retries: 1 }).generate(image, '<OD>')); }"
    assert node(url, code)[:2] == ["Refused", None]  # it is gone
    with busy(0, None) as (url, _):
        code = "{ return failure(new Florence2(url, { timeout: 200 }).generate(image, '<OD>')); }"
        assert node(url, code) == ["Refused", None, "no answer within 200 ms"]


@needs_node
@pytest.mark.server
def test_node_from_the_shell(server: TritonServer, expected: dict[str, Any]) -> None:
    ask = EXAMPLES / "node" / "ask.mjs"
    done = run(server.http_url, "node", ask, SCENE, "<OD>", "<CAPTION>")
    boxes, caption = map(json.loads, done.stdout.splitlines())
    assert boxes["<OD>"]["labels"] == expected["answer"]["<OD>"]["labels"]
    assert caption["<CAPTION>"].startswith("a red star")
    refused = run(server.http_url, "node", ask, SCENE, "<CAPTIOM>")
    assert refused.returncode == 1
    assert refused.stderr.endswith("did you mean <CAPTION>?\n")
    assert refused.stdout == ""


# --- curl ---------------------------------------------------------------------------------------------------


@needs_curl
@pytest.mark.server
def test_curl_gets_what_the_python_client_gets(server: TritonServer, expected: dict[str, Any]) -> None:
    settings = [f"{name}={value}" for name, value in GREEDY.items()]
    done = run(server.http_url, EXAMPLES / "curl" / "ask.sh", SCENE, "<OD>", *settings)
    answer = json.loads(done.stdout)
    assert answer["token_ids"] == expected["token_ids"]
    assert json.loads(answer["answer"]) == expected["answer"]
    refused = run(server.http_url, EXAMPLES / "curl" / "ask.sh", SCENE, "<OD>", "num_beams=9")
    assert refused.returncode == 1
    assert "num_beams must be from 1 to 8, not 9" in refused.stderr
    assert refused.stdout == ""


@needs_curl
@pytest.mark.server
def test_curl_asks_several_tasks(server: TritonServer) -> None:
    prompts = ["<OD>", 'say "\\" twice', "<CAPTION>"]
    done = run(server.http_url, EXAMPLES / "curl" / "tasks.sh", SCENE, *prompts)
    assert done.returncode == 0, done.stderr
    keys = [key for line in done.stdout.splitlines() for key in json.loads(json.loads(line)["answer"])]
    assert keys == prompts
    assert run(server.http_url, EXAMPLES / "curl" / "tasks.sh", SCENE, "<OD>", "<CAPTIOM>").returncode == 1


@needs_curl
@pytest.mark.server
def test_curl_sees_how_the_server_is(server: TritonServer) -> None:
    with serve_health(Health(server), "127.0.0.1", 0) as endpoint:
        health = f"http://127.0.0.1:{endpoint.server_port}"
        done = run(server.http_url, EXAMPLES / "curl" / "status.sh", metrics=server.metrics_url, health=health)
        endpoint.shutdown()
    assert done.returncode == 0, done.stderr
    ready, inputs, *figures = done.stdout.splitlines()
    assert ready == "ready"
    assert {tensor["name"] for tensor in json.loads(inputs)["inputs"]} >= {"image", "prompt", "num_beams"}
    assert figures
    assert all(line.startswith("florence2_") for line in figures)
    assert run("http://127.0.0.1:9", EXAMPLES / "curl" / "status.sh").returncode != 0


@needs_curl
def test_curl_tries_again() -> None:
    with busy(1, {"answer": "{}"}) as (url, bodies):
        done = run(url, EXAMPLES / "curl" / "ask.sh", SCENE, "<OD>")
    assert json.loads(done.stdout) == {"answer": "{}"}
    assert len(bodies) == 2
    assert bodies[0] == bodies[1]
