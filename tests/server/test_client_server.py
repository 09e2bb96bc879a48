"""Every method of the clients against the real server, over gRPC and HTTP, held against plain requests."""

import asyncio
import json
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trustme
from conftest import DEMO_CHECKPOINT
from florence2_client import (
    AsyncFlorence2Client,
    CaptionedInstances,
    Florence2Client,
    Instances,
    ServerRefused,
    Text,
)
from florence2_release.install import install
from florence2_release.server import TritonServer
from florence2_release.tritonserver import ServerError, find_tritonserver
from PIL import Image
from serving import ENDLESS, HANGS, PROMPTS, counts, figures, serve, tensors, wait_until
from tritonclient import grpc
from tritonclient.utils import InferenceServerException

from florence2.locations import to_text

try:
    find_tritonserver()
except ServerError as error:
    pytest.skip(str(error), allow_module_level=True)

pytestmark = pytest.mark.server

SCENE = DEMO_CHECKPOINT.parent / "pictures" / "scene-1.png"
PAGE = DEMO_CHECKPOINT.parent / "pictures" / "page-2.jpg"
BOX = (15.0, 90.0, 330.0, 260.0)
LOCATIONS = to_text(BOX, Image.open(SCENE).size)
PROTOCOLS = ("grpc_url", "http_url")

METHODS: dict[str, tuple[Callable[[Any], Any], str, type]] = {
    "detect": (lambda asking: asking.detect(SCENE), "<OD>", Instances),
    "detect what": (
        lambda asking: asking.detect(SCENE, "a red star"),
        "<OPEN_VOCABULARY_DETECTION>a red star",
        Instances,
    ),
    "caption": (lambda asking: asking.caption(SCENE), "<CAPTION>", Text),
    "detailed caption": (lambda asking: asking.caption(SCENE, "detailed"), "<DETAILED_CAPTION>", Text),
    "more detailed caption": (
        lambda asking: asking.caption(SCENE, detail="more_detailed"),
        "<MORE_DETAILED_CAPTION>",
        Text,
    ),
    "ocr": (lambda asking: asking.ocr(SCENE), "<OCR>", Text),
    "ocr of a region": (lambda asking: asking.ocr(SCENE, BOX), f"<REGION_TO_OCR>{LOCATIONS}", Text),
    "ocr_regions": (lambda asking: asking.ocr_regions(SCENE), "<OCR_WITH_REGION>", Instances),
    "ground": (
        lambda asking: asking.ground(SCENE, "a green cross"),
        "<CAPTION_TO_PHRASE_GROUNDING>a green cross",
        Instances,
    ),
    "segment": (
        lambda asking: asking.segment(SCENE, "a star"),
        "<REFERRING_EXPRESSION_SEGMENTATION>a star",
        Instances,
    ),
    "segment a region": (
        lambda asking: asking.segment(SCENE, BOX),
        f"<REGION_TO_SEGMENTATION>{LOCATIONS}",
        Instances,
    ),
    "describe_region": (
        lambda asking: asking.describe_region(SCENE, BOX),
        f"<REGION_TO_DESCRIPTION>{LOCATIONS}",
        Text,
    ),
    "categorize_region": (
        lambda asking: asking.categorize_region(SCENE, np.array(BOX)),
        f"<REGION_TO_CATEGORY>{LOCATIONS}",
        Text,
    ),
    "propose_regions": (lambda asking: asking.propose_regions(SCENE), "<REGION_PROPOSAL>", Instances),
    "dense_captions": (lambda asking: asking.dense_captions(SCENE), "<DENSE_REGION_CAPTION>", Instances),
    "run": (lambda asking: asking.run("what is it?", SCENE, num_beams=1), "what is it?", Text),
}


@pytest.fixture(scope="module")
def server(demo_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    with serve(demo_export, tmp_path_factory.mktemp("client")) as running:
        yield running


@pytest.fixture(scope="module", params=PROTOCOLS)
def url(request: pytest.FixtureRequest, server: TritonServer) -> str:
    return getattr(server, request.param)


@pytest.fixture(scope="module")
def asking(url: str) -> Iterator[Florence2Client]:
    with Florence2Client(url, timeout=HANGS, retries=0) as made:
        yield made


def plainly(server: TritonServer, prompt: str, picture: Path = SCENE, **settings: Any) -> Any:
    """What tritonclient alone gets."""
    with grpc.InferenceServerClient(server.grpc_url) as connection:
        return connection.infer("florence2", tensors(image=picture.read_bytes(), prompt=prompt.encode(), **settings))


def agree(answer: Any, plain: Any) -> None:
    assert answer.token_ids.tolist() == plain.as_numpy("token_ids")[0].tolist()
    assert answer.answer == json.loads(plain.as_numpy("answer")[0, 0])
    assert answer.text == plain.as_numpy("text")[0, 0].decode()
    assert answer.token_logprobs == pytest.approx(plain.as_numpy("token_logprobs")[0], abs=1e-4)
    assert answer.sequence_score == pytest.approx(float(plain.as_numpy("sequence_score")[0, 0]), abs=1e-4)
    assert answer.finish_reason == plain.as_numpy("finish_reason")[0, 0].decode()
    assert answer.model_version == plain.get_response().model_version == "1"


@pytest.mark.parametrize("method", METHODS)
def test_a_method_asks_its_task(server: TritonServer, asking: Florence2Client, method: str) -> None:
    call, prompt, kind = METHODS[method]
    answer = call(asking)
    assert type(answer) is kind
    assert answer.prompt == prompt
    agree(answer, plainly(server, prompt, **({"num_beams": 1} if method == "run" else {})))


def test_every_task_has_a_method() -> None:
    asked = {prompt.partition(">")[0] for _, prompt, _ in METHODS.values()}
    assert {prompt.partition(">")[0] for prompt in PROMPTS} <= asked


def test_awaited(server: TritonServer, url: str) -> None:
    async def ask() -> list[Any]:
        async with AsyncFlorence2Client(url, timeout=HANGS, retries=0) as asking:
            return await asyncio.gather(*(call(asking) for call, _, _ in METHODS.values()))

    for answer, (method, (_, prompt, kind)) in zip(asyncio.run(ask()), METHODS.items(), strict=True):
        assert type(answer) is kind
        agree(answer, plainly(server, prompt, **({"num_beams": 1} if method == "run" else {})))


def test_settings_reach_the_model(server: TritonServer, asking: Florence2Client) -> None:
    settings: dict[str, Any] = {
        **{"num_beams": 2, "max_new_tokens": 6, "no_repeat_ngram_size": 2},
        **{"length_penalty": 0.5, "early_stopping": False},
    }
    answer = asking.detect(SCENE, **settings)
    agree(answer, plainly(server, "<OD>", **settings))
    assert answer.finish_reason == "length"
    assert asking.detect(SCENE).finish_reason == "stop"


def test_min_score(asking: Florence2Client) -> None:
    every = asking.detect(SCENE)
    score = sorted(every.scores)[1]
    kept = asking.detect(SCENE, min_score=float(score))
    assert 0 < len(kept) < len(every)
    assert list(kept) == [one for one in every if one.score >= score]
    assert kept.text == every.text


def test_captions_phrases_are_grounded(server: TritonServer, asking: Florence2Client) -> None:
    both = asking.caption_and_ground(SCENE, "detailed")
    assert type(both) is CaptionedInstances
    agree(both.caption, plainly(server, "<DETAILED_CAPTION>"))
    agree(both, plainly(server, f"<CAPTION_TO_PHRASE_GROUNDING>{both.caption}"))
    assert len(both) > 0
    assert both.draw().size == Image.open(SCENE).size


def test_several_tasks_on_one_picture_share_its_features(server: TritonServer, asking: Florence2Client) -> None:
    prompts = ["<OD>", "<CAPTION>", "<REGION_TO_CATEGORY>", "<OCR>"]
    answers = asking.run_tasks(prompts, PAGE, region=BOX)
    assert [answer.prompt.partition("<loc")[0] for answer in answers] == prompts
    located = to_text(BOX, Image.open(PAGE).size)
    for answer, prompt in zip(answers, prompts, strict=True):
        agree(answer, plainly(server, prompt + (located if "REGION" in prompt else ""), PAGE))
        assert answer.image == PAGE


def test_many(server: TritonServer, asking: Florence2Client) -> None:
    asked = [("<OD>", SCENE), ("<CAPTION>", PAGE), ("<ODD>", PAGE), ("<OCR>", b"no picture"), ("<OD>", PAGE)] * 4
    answers = list(asking.run_many(asked, in_flight=6, return_exceptions=True))
    assert len(answers) == 20
    for (prompt, picture), answer in zip(asked, answers, strict=True):
        if isinstance(answer, Exception):
            assert (prompt, picture) in asked[2:4]
            assert isinstance(answer, ServerRefused)
            assert answer.status == "INVALID_ARGUMENT"
        else:
            agree(answer, plainly(server, prompt, Path(str(picture))))


def test_connections_are_kept(server: TritonServer, url: str) -> None:
    """Through a proxy that counts them."""
    with Proxy(url) as proxy, Florence2Client(proxy.url, timeout=HANGS) as asking:
        for _ in range(5):
            asking.caption(SCENE, max_new_tokens=2)
        assert proxy.connections == 1


def test_a_server_that_comes_back_is_found_again(server: TritonServer, url: str) -> None:
    with Proxy(url, refuse=2) as proxy:
        with Florence2Client(proxy.url, timeout=HANGS) as asking:
            assert str(asking.caption(SCENE)) == plainly_said(server)
        assert proxy.connections > 2
    with Proxy(url, refuse=100) as proxy, Florence2Client(proxy.url, timeout=HANGS, retries=0) as asking:
        with pytest.raises(ServerRefused) as told:
            asking.caption(SCENE)
        assert told.value.status == "UNAVAILABLE"


def plainly_said(server: TritonServer) -> str:
    return json.loads(plainly(server, "<CAPTION>").as_numpy("answer")[0, 0])["<CAPTION>"]


def test_past_its_deadline_a_request_ends_here_and_there(server: TritonServer, asking: Florence2Client) -> None:
    before = figures(server.metrics_url)["florence2_steps_total"]
    with pytest.raises(ServerRefused, match="no answer within the timeout; allow more time with timeout=") as told:
        asking.detect(SCENE, timeout=0.2, **ENDLESS)
    assert told.value.status == "DEADLINE_EXCEEDED"
    # The server's own word, not our patience.
    assert isinstance(told.value.__cause__, InferenceServerException)
    wait_until(lambda: figures(server.metrics_url)["florence2_rows_used"] == 0)
    assert figures(server.metrics_url)["florence2_steps_total"] - before < 511


def test_a_call_that_is_cancelled_sends_nothing_more(server: TritonServer, url: str) -> None:
    async def ask() -> None:
        async with AsyncFlorence2Client(url, timeout=3) as asking:
            task = asyncio.create_task(asking.detect(SCENE, **ENDLESS))
            await asyncio.sleep(0.3)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert (await asking.caption(SCENE)).model_version == "1"

    asked = counts(server, "florence2")
    asyncio.run(ask())
    wait_until(lambda: figures(server.metrics_url)["florence2_rows_used"] == 0)
    wait_until(lambda: sum(counts(server, "florence2").values()) > sum(asked.values()))


def test_who_waits_while_the_client_is_closed_is_told(server: TritonServer, url: str) -> None:
    with ThreadPoolExecutor(1) as threads:
        asking = Florence2Client(url, timeout=3, retries=0)
        waiting = threads.submit(asking.detect, SCENE, **ENDLESS)
        wait_until(lambda: figures(server.metrics_url)["florence2_rows_used"] > 0)
        asking.close()
        with pytest.raises(ServerRefused) as told:
            waiting.result(HANGS)
    assert told.value.status == "CANCELLED"
    wait_until(lambda: figures(server.metrics_url)["florence2_rows_used"] == 0)


def test_a_model_that_is_not_there(server: TritonServer, url: str) -> None:
    with Florence2Client(url, model="florence3") as asking, pytest.raises(ServerRefused, match="releases") as told:
        asking.detect(SCENE)
    assert told.value.status == "NOT_FOUND"


def test_a_cached_answer_is_whole_whatever_the_first_request_named(demo_export: Path, tmp_path: Path) -> None:
    with serve(demo_export, tmp_path, cache_size=2**26) as caching:
        with grpc.InferenceServerClient(caching.grpc_url) as connection:
            inputs = tensors(image=SCENE.read_bytes(), prompt=b"<CAPTION>")
            first = connection.infer("florence2", inputs, outputs=[grpc.InferRequestedOutput("token_ids")])
        with Florence2Client(caching.grpc_url, retries=0) as asking:
            assert asking.caption(SCENE).token_ids.tolist() == first.as_numpy("token_ids")[0].tolist()
        assert counts(caching, "beam_search")["computed"] == 1


# --- TLS and restricted endpoints ---


class Proxy:
    """Bytes from here to the server, over TLS where there is a context; the first connections are closed at once."""

    def __init__(self, url: str, context: ssl.SSLContext | None = None, refuse: int = 0) -> None:
        scheme, _, address = url.rpartition("://")
        host, _, port = address.partition(":")
        self._server, self._context, self._refuse = (host, int(port)), context, refuse
        self._listener = socket.create_server(("127.0.0.1", 0))
        name = "localhost" if context else "127.0.0.1"
        scheme = {"": "grpc", "http": "http"}[scheme] + ("s" if context else "")
        self.url = f"{scheme}://{name}:{self._listener.getsockname()[1]}"
        self.connections = 0

    def __enter__(self) -> "Proxy":
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self.connections += 1
                if self.connections <= self._refuse:
                    connection.close()
                    continue
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with suppress(OSError):
            if self._context:
                connection = self._context.wrap_socket(connection, server_side=True)
            behind = socket.create_connection(self._server)
            threading.Thread(target=self._pass, args=(behind, connection), daemon=True).start()
            self._pass(connection, behind)

    @staticmethod
    def _pass(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(2**16):
                target.sendall(data)
        with suppress(OSError):
            target.shutdown(socket.SHUT_RDWR)


class Guarded(TritonServer):
    """Inference is for those who have the key."""

    def _command(self, *rest: Any) -> list[str]:
        return [
            *super()._command(*rest),
            "--grpc-restricted-protocol=inference:secret=open",
            "--http-restricted-api=inference:secret=open",
        ]


@pytest.fixture(scope="module")
def guarded(demo_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    repository = tmp_path_factory.mktemp("guarded") / "repository"
    install(demo_export, repository)
    with Guarded(repository) as running:
        running.wait_ready()
        yield running


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_restricted_endpoints_take_headers(guarded: TritonServer, protocol: str) -> None:
    url = getattr(guarded, protocol)
    name = "triton-grpc-protocol-secret" if protocol == "grpc_url" else "secret"
    with Florence2Client(url, headers={name.title(): "open"}, timeout=HANGS) as asking:
        assert asking.caption(SCENE).model_version == "1"
    with Florence2Client(url, retries=0) as asking, pytest.raises(ServerRefused, match=r"secret|headers=") as told:
        asking.caption(SCENE)
    assert told.value.status in ("PERMISSION_DENIED", "UNAVAILABLE", "UNAUTHENTICATED")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_tls(server: TritonServer, protocol: str, tmp_path: Path) -> None:
    authority, stranger = trustme.CA(), trustme.CA()
    for name, made in (("ca", authority), ("stranger", stranger)):
        made.cert_pem.write_to_path(tmp_path / f"{name}.pem")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols(["h2", "http/1.1"])
    authority.issue_cert("localhost").configure_cert(context)
    # Who calls has to show a certificate, too.
    authority.configure_trust(context)
    context.verify_mode = ssl.CERT_REQUIRED
    own = authority.issue_cert("client@localhost")
    own.private_key_pem.write_to_path(tmp_path / "key.pem")
    own.cert_chain_pems[0].write_to_path(tmp_path / "certificate.pem")
    ours = {"certificate": tmp_path / "certificate.pem", "key": tmp_path / "key.pem"}
    with Proxy(getattr(server, protocol), context) as proxy:
        with Florence2Client(proxy.url, ca=tmp_path / "ca.pem", timeout=HANGS, **ours) as asking:
            assert str(asking.caption(SCENE)) == plainly_said(server)
        for wrong in ({"ca": tmp_path / "stranger.pem", **ours}, {"ca": tmp_path / "ca.pem"}):
            with Florence2Client(proxy.url, retries=0, timeout=10, **wrong) as asking, pytest.raises(ServerRefused):
                asking.caption(SCENE)
        with pytest.raises(FileNotFoundError):
            Florence2Client(proxy.url, ca=tmp_path / "none.pem")
