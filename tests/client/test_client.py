"""The client without a server: what it takes for a picture, what it refuses, when it tries again."""

import asyncio
import gc
import http.server
import io
import multiprocessing
import os
import pickle
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import DEMO_CHECKPOINT
from florence2_client import AsyncFlorence2Client, Florence2Client, ServerRefused, client, connection
from florence2_client.connection import Endpoint, Reply
from florence2_client.pictures import encoded
from PIL import ExifTags, Image

from florence2.errors import InvalidRequest
from florence2.images import decode, upright_size

PICTURE = DEMO_CHECKPOINT.parent / "pictures" / "scene-1.png"
NOWHERE = "localhost:1"


# --- pictures ---


@pytest.mark.parametrize("kind", ["path", "str", "bytes", "file", "PIL", "array"])
def test_every_kind_of_picture_is_sent_with_the_same_pixels(kind: str) -> None:
    image = Image.open(PICTURE).convert("RGB")
    given: Any = {
        "path": PICTURE,
        "str": str(PICTURE),
        "bytes": PICTURE.read_bytes(),
        "file": io.BytesIO(PICTURE.read_bytes()),
        "PIL": image,
        "array": np.asarray(image),
    }[kind]
    assert (np.asarray(decode(encoded(given))) == np.asarray(image)).all()


def test_a_grey_array_and_a_16_bit_image_keep_their_values() -> None:
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert (np.asarray(decode(encoded(grey)))[..., 0] == grey).all()
    deep = Image.fromarray((np.arange(256, dtype=np.uint16) << 8).reshape(16, 16))
    assert (np.asarray(decode(encoded(deep)))[..., 0] == grey).all()


@pytest.mark.parametrize(
    "given", [np.zeros((4, 4, 3)), np.zeros((4, 4, 2), np.uint8), 7, io.StringIO("text")], ids=type
)
def test_what_is_no_picture_is_refused_with_what_is(given: Any) -> None:
    with pytest.raises(ValueError, match=r"uint8 \[H, W, 3\]|give a path, a URL, bytes"):
        encoded(given)


class Site(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        answers: dict[str, Callable[[], None]] = {
            "/scene.png": lambda: self._send(200, PICTURE.read_bytes()),
            "/moved": lambda: self._send(302, b"", Location="/scene.png"),
            "/to-a-file": lambda: self._send(302, b"", Location=f"file://{PICTURE}"),
            "/endless": lambda: self._send(200, bytes(51 * 10**6)),
            "/a%20b.png": lambda: self._send(200, PICTURE.read_bytes()),
            "/%C3%A4.png": lambda: self._send(200, PICTURE.read_bytes()),
            "/short": lambda: self._send(200, PICTURE.read_bytes(), claims=10**6),
            "/garbled": lambda: self.wfile.write(b"no HTTP at all\r\n\r\n") and None,
        }
        answers.get(self.path, lambda: self._send(404, b""))()

    def _send(self, status: int, body: bytes, claims: int | None = None, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(claims or len(body)))
        self.end_headers()
        try:
            self.wfile.write(body)
        except ConnectionError:
            return

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_urls_are_fetched_by_the_client(site: str) -> None:
    for path in ("scene.png", "moved", "a b.png", "a%20b.png", "ä.png"):
        assert encoded(f"{site}/{path}") == PICTURE.read_bytes()


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/none.png", "404"),
        ("/to-a-file", "file"),
        ("/endless", "more than 50 MB"),
        ("/short", "bytes early"),
        ("/garbled", "no HTTP"),
    ],
)
def test_urls_that_give_no_picture(site: str, path: str, reason: str) -> None:
    with pytest.raises((OSError, ValueError), match=reason) as told:
        encoded(site + path)
    assert site + path in str(told.value)


FORMATS = {"JPEG": {}, "PNG": {}, "WEBP": {}, "TIFF": {}, "BMP": None, "GIF": None}


@pytest.mark.parametrize("orientation", [None, 1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("name", FORMATS)
def test_the_size_from_the_head_is_that_of_the_upright_picture(name: str, orientation: int | None) -> None:
    buffer, exif = io.BytesIO(), Image.Exif()
    if orientation is not None:
        exif[ExifTags.Base.Orientation] = orientation
    options = {} if FORMATS[name] is None else {"exif": exif}
    Image.new("RGB", (40, 24)).save(buffer, name, **options)
    assert upright_size(buffer.getvalue()) == decode(buffer.getvalue()).size


# --- what is refused before anything is sent ---


@pytest.mark.parametrize(
    "region", [(1, 2, 3), (3, 2, 1, 4), (1, 4, 3, 2), (1, 2, 3, float("nan")), (1, 2, 1, 4)], ids=str
)
def test_a_region_is_a_box(region: tuple[float, ...]) -> None:
    with Florence2Client(NOWHERE) as client, pytest.raises(ValueError, match="x1, y1, x2, y2"):
        client.run("<REGION_TO_CATEGORY>", PICTURE, region=region)


def test_a_region_needs_a_picture_to_be_a_region_of() -> None:
    with Florence2Client(NOWHERE) as client, pytest.raises(InvalidRequest, match="can't be read"):
        client.run("<REGION_TO_CATEGORY>", b"<html>", region=(1, 2, 3, 4))


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda client: client.run("<OD>", PICTURE, region=(1, 2, 3, 4)), "takes no region; these do: <REGION_TO_"),
        (lambda client: client.run("<CAPTION>", PICTURE, min_score=0.5), "in words, which have no scores"),
        (lambda client: client.run("what is it?", PICTURE, min_score=0.5), "in words, which have no scores"),
        (lambda client: client.detect(PICTURE, min_score=1.5), "from 0 to 1, not 1.5"),
        (lambda client: client.caption(PICTURE, "long"), "one of short, detailed, more_detailed"),
        (lambda client: client.run(7, PICTURE), "a prompt is a text"),
        (lambda client: client.detect(PICTURE, num_beams="many"), "num_beams='many'"),
        (lambda client: client.detect(PICTURE, timeout=0), "finite and more than 0"),
        (lambda client: list(client.run_many([("<OD>", PICTURE)], in_flight=0)), "in_flight is a number"),
        (lambda client: client.run_tasks(["<OD>", "<OCR>"], PICTURE, num_beams=1.5j), "num_beams"),
        (lambda client: client.run_tasks("<OD>", PICTURE), "a list of texts"),
        (lambda client: client.ocr(PICTURE, (5000, 10, 6000, 20)), "no pixel of the picture"),
        (lambda client: client.ocr(PICTURE, (0.1, 0.1, 0.5, 0.5)), "no pixel of the picture"),
        (lambda client: client.ocr(PICTURE, "abcd"), "could not convert"),
    ],
)
def test_arguments_that_cannot_be(call: Callable[[Florence2Client], Any], reason: str) -> None:
    with Florence2Client(NOWHERE, retries=0) as client, pytest.raises(ValueError, match=reason):
        call(client)


def test_a_misspelt_setting_is_named() -> None:
    with Florence2Client(NOWHERE) as client, pytest.raises(TypeError, match=r"num_beam; there are .*num_beams"):
        client.detect(PICTURE, num_beam=2)  # type: ignore[call-arg]


@pytest.mark.parametrize("beams", [2**31, 2**32 + 3, -(2**31) - 1, "3", 3.5])
def test_a_whole_number_is_sent_as_it_is_or_not_at_all(beams: Any) -> None:
    with Florence2Client(NOWHERE, retries=0) as client, pytest.raises(ValueError, match=f"num_beams={beams!r}: "):
        client.detect(PICTURE, num_beams=beams)


def test_a_picture_that_is_not_there() -> None:
    with Florence2Client(NOWHERE) as client, pytest.raises(FileNotFoundError, match=r"nowhere\.png"):
        client.detect("nowhere.png")


@pytest.mark.parametrize(
    ("url", "options", "reason"),
    [
        ("rest://localhost:1", {}, "http://"),
        ("localhost", {}, "names no port"),
        ("", {}, "HOST:PORT"),
        ("localhost:1", {"ca": PICTURE}, "grpcs:// or https://"),
        ("https://localhost:1", {"key": PICTURE}, "belong together"),
        (NOWHERE, {"retries": -1}, "0 or more"),
        (NOWHERE, {"next_share": 2}, "from 0 to 1"),
    ],
)
def test_clients_that_cannot_be(url: str, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Florence2Client(url, **options)


@pytest.mark.parametrize("timeout", [0, -1, float("inf"), float("nan")])
def test_a_timeout_is_a_number_of_seconds(timeout: float) -> None:
    with pytest.raises(ValueError, match="finite and more than 0"):
        Florence2Client(timeout=timeout)


@pytest.mark.parametrize("scheme", ["", "http://"])
def test_nobody_there(scheme: str) -> None:
    with (
        Florence2Client(scheme + NOWHERE, retries=0) as client,
        pytest.raises(ServerRefused, match="is the server running there") as told,
    ):
        client.detect(PICTURE)
    assert told.value.status == "UNAVAILABLE"


# --- tries, pauses, deadlines ---


class Script:
    """Connections that answer as they are told: a status is an error, None an answer, a number seconds before one."""

    def __init__(self, *outcomes: Any) -> None:
        self.outcomes = list(outcomes)
        self.asked: list[tuple[str, float]] = []
        self.running = self.most = 0

    async def infer(self, model: str, tensors: Any, seconds: float) -> Reply:
        self.asked.append((model, seconds))
        self.running += 1
        self.most = max(self.most, self.running)
        outcome = self.outcomes.pop(0) if self.outcomes else None
        try:
            if isinstance(outcome, str):
                raise ServerRefused("no", outcome)
            await asyncio.sleep(outcome or 0)
        finally:
            self.running -= 1
        prompt = tensors["prompt"][1].item().decode()
        values = {"answer": f'{{"{prompt}": "yes"}}'.encode(), "text": b"yes", "finish_reason": b"stop"}
        return Reply(
            "3",
            {name: np.array([value], np.object_) for name, value in values.items()}
            | {"token_ids": np.array([2]), "token_logprobs": np.zeros(0), "sequence_score": np.zeros(1)},
        )

    async def close(self) -> None:
        pass


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Script]:
    def play(*outcomes: Any) -> Script:
        made = Script(*outcomes)
        monkeypatch.setattr(Endpoint, "connect", lambda self: made)
        return made

    return play


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What would have been slept between tries."""
    slept: list[float] = []
    real = asyncio.sleep

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        await real(0)

    monkeypatch.setattr(client.asyncio, "sleep", sleep)
    return slept


def test_a_busy_server_is_asked_again_after_growing_pauses(script: Any, pauses: list[float]) -> None:
    played = script(*["UNAVAILABLE"] * 4)
    with Florence2Client(NOWHERE, timeout=100) as asking:
        assert str(asking.caption(b"x")) == "yes"
    assert len(played.asked) == 5
    spans = [0.1, 0.2, 0.4, 0.8]
    assert all(span / 2 <= pause <= span for span, pause in zip(spans, pauses, strict=False)), pauses


def test_pauses_differ_between_clients(script: Any, pauses: list[float]) -> None:
    for _ in range(20):
        script("UNAVAILABLE")
        with Florence2Client(NOWHERE) as asking:
            asking.caption(b"x")
    assert len({round(pause, 6) for pause in pauses if pause}) > 10


@pytest.mark.parametrize("status", ["INVALID_ARGUMENT", "INTERNAL", "DEADLINE_EXCEEDED", "NOT_FOUND"])
def test_nothing_else_is_asked_again(script: Any, status: str) -> None:
    played = script(status)
    with Florence2Client(NOWHERE) as asking, pytest.raises(ServerRefused):
        asking.caption(b"x")
    assert len(played.asked) == 1


def test_retries_are_counted(script: Any, pauses: list[float]) -> None:
    played = script(*["UNAVAILABLE"] * 9)
    with Florence2Client(NOWHERE, retries=2) as asking, pytest.raises(ServerRefused):
        asking.caption(b"x")
    assert len(played.asked) == 3


def test_tries_and_pauses_stay_within_the_timeout(script: Any) -> None:
    played = script(*["UNAVAILABLE"] * 9)
    with Florence2Client(NOWHERE, timeout=0.5, retries=9) as asking, pytest.raises(ServerRefused):
        asking.caption(b"x")
    assert 2 <= len(played.asked) < 9
    seconds = [left for _, left in played.asked]
    assert seconds == sorted(seconds, reverse=True)
    assert 0 < seconds[-1] < seconds[0] <= 0.5


def test_the_next_release_is_tried_and_its_trouble_is_nobodys(script: Any) -> None:
    played = script("INTERNAL")
    with Florence2Client(NOWHERE, next_share=1, timeout=10) as asking:
        assert str(asking.caption(b"x")) == "yes"
    (first, half), (second, rest) = played.asked
    assert (first, second) == ("florence2_next", "florence2")
    assert 4 < half <= 5 < rest <= 10


def test_the_next_release_has_half_of_the_timeout_and_no_more(script: Any) -> None:
    played = script(60)
    with Florence2Client(NOWHERE, next_share=1, timeout=2) as asking:
        assert str(asking.caption(b"x")) == "yes"
    (first, half), (second, rest) = played.asked
    assert (first, second) == ("florence2_next", "florence2")
    assert 0 < rest <= half <= 1


def test_nothing_is_sent_after_the_timeout(script: Any) -> None:
    """A caption that came late, in the grace that servers have, leaves no time for its phrases."""
    played = script(0.6)
    with (
        Florence2Client(NOWHERE, timeout=0.5) as asking,
        pytest.raises(ServerRefused, match="no answer within the timeout; allow more time") as told,
    ):
        asking.caption_and_ground(b"x")
    assert told.value.status == "DEADLINE_EXCEEDED"
    assert len(played.asked) == 1


# --- many ---


def test_many_come_in_order_with_at_most_so_many_under_way(script: Any) -> None:
    rng = random.Random(0)
    played = script(*[rng.choice([0.0, 0.01, 0.03]) for _ in range(60)])
    read = 0

    def asked() -> Iterator[tuple[str, bytes]]:
        nonlocal read
        for number in range(60):
            read += 1
            yield f"<CAPTION>{number}", b"x"

    with Florence2Client(NOWHERE) as asking:
        for number, answer in enumerate(asking.run_many(asked(), in_flight=4)):
            assert answer.prompt == f"<CAPTION>{number}"
            assert read <= number + 9
    assert number == 59
    assert played.most == 4


def test_many_awaited(script: Any) -> None:
    played = script(*[0.02, 0.0] * 10)

    async def ask() -> list[str]:
        async with AsyncFlorence2Client(NOWHERE) as asking:
            asked = ((f"<CAPTION>{number}", b"x") for number in range(20))
            return [answer.prompt async for answer in asking.run_many(asked, in_flight=3)]

    assert asyncio.run(ask()) == [f"<CAPTION>{number}" for number in range(20)]
    assert played.most == 3


def test_one_of_many_that_fails(script: Any) -> None:
    def ask(**options: Any) -> list[Any]:
        script(0, "INTERNAL", 0, 0)
        with Florence2Client(NOWHERE) as asking:
            return list(asking.run_many([("<CAPTION>", b"x")] * 4, in_flight=1, **options))

    with pytest.raises(ServerRefused):
        ask()
    answers = ask(return_exceptions=True)
    assert [isinstance(answer, ServerRefused) for answer in answers] == [False, True, False, False]


def test_who_stops_reading_cancels_the_rest(script: Any) -> None:
    played = script(0, *[60] * 50)
    with Florence2Client(NOWHERE) as asking:
        answers = asking.run_many((("<CAPTION>", b"x") for _ in range(50)), in_flight=5)
        next(answers)
        answers.close()
        asking._wait(asyncio.sleep(0.05))
        assert played.running == 0


def test_what_is_done_comes_before_more_is_read(script: Any) -> None:
    script()
    read = []

    def asked() -> Iterator[tuple[str, bytes]]:
        for number in range(20):
            read.append(number)
            yield "<CAPTION>", b"x"
            time.sleep(0.02)

    with Florence2Client(NOWHERE) as asking:
        next(asking.run_many(asked(), in_flight=8))
        assert len(read) < 4


def test_a_closed_client_says_so(script: Any) -> None:
    script()
    asking = Florence2Client(NOWHERE)
    asking.caption(b"x")
    asking.close()
    asking.close()
    with pytest.raises(RuntimeError, match="closed"):
        asking.caption(b"x")


def test_garbage_collected_clients_stop_nobody(script: Any) -> None:
    """Where the collector runs in the thread that all clients share, too."""
    script()
    kept = Florence2Client(NOWHERE)

    async def drop() -> None:
        class Service:
            def __init__(self) -> None:
                self.client, self.itself = Florence2Client(NOWHERE), self

        service = Service()
        await service.client._asking.caption(b"x")
        del service
        gc.collect()

    kept._start(drop()).result(timeout=60)
    assert kept._start(kept._asking.run("<CAPTION>", b"x")).result(timeout=60)
    kept.close()


def test_who_forgets_to_close_ends_all_the_same() -> None:
    code = f"""
from florence2_client import Florence2Client, ServerRefused
unused, used = Florence2Client("{NOWHERE}"), Florence2Client("http://{NOWHERE}", retries=0)
try:
    used.caption({str(PICTURE)!r})
except ServerRefused as refused:
    print(refused.status)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr, done.returncode) == ("UNAVAILABLE\n", "", 0)


def test_a_client_of_another_event_loop_says_so(script: Any) -> None:
    script()
    asking = AsyncFlorence2Client(NOWHERE)
    asyncio.run(asking.caption(b"x"))
    with pytest.raises(RuntimeError, match="another event loop"):
        asyncio.run(asking.caption(b"x"))


def test_refusals_come_through_worker_processes() -> None:
    refused = pickle.loads(pickle.dumps(ServerRefused("no room", "UNAVAILABLE")))
    assert (str(refused), refused.status) == ("no room", "UNAVAILABLE")


def test_reading_a_picture_stays_within_the_timeout(script: Any, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with Florence2Client(NOWHERE) as asking:
        with pytest.raises(TimeoutError, match="not read within the timeout"):
            asking.run("<CAPTION>", tmp_path / "pipe.png", timeout=0.1)
        # Lets the thread that reads go.
        (tmp_path / "pipe.png").open("wb").close()


def test_threads_share_a_client(script: Any) -> None:
    script(*[0.01] * 40)
    found: list[str] = []
    with Florence2Client(NOWHERE) as asking:
        threads = [
            threading.Thread(target=lambda: found.extend(str(asking.caption(b"x")) for _ in range(5))) for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == ["yes"] * 40


def _in_a_child(asking: Florence2Client, told: Any) -> None:
    try:
        asking.caption(b"x")
    except RuntimeError as error:
        told.put(str(error))


def test_a_forked_process_is_told_to_make_its_own(script: Any) -> None:
    script()
    forked = multiprocessing.get_context("fork")
    told = forked.Queue()
    with Florence2Client(NOWHERE) as asking:
        asking.caption(b"x")
        child = forked.Process(target=_in_a_child, args=(asking, told))
        child.start()
        assert "make one in every process" in told.get(timeout=60)
        child.join()


def test_grpc_is_refused_where_it_would_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process that is forked from one that used it."""
    monkeypatch.setitem(connection._grpc_in, "process", -1)
    with Florence2Client(NOWHERE) as asking, pytest.raises(RuntimeError, match="take http://"):
        asking.caption(PICTURE)
    with Florence2Client(f"http://{NOWHERE}", retries=0) as asking, pytest.raises(ServerRefused):
        asking.caption(PICTURE)


def test_the_picture_of_a_file_object_can_be_drawn_later(script: Any, tmp_path: Path) -> None:
    script()
    with Florence2Client(NOWHERE) as asking, PICTURE.open("rb") as file:
        answer = asking.caption(file)
    assert answer.draw().size == Image.open(PICTURE).size
