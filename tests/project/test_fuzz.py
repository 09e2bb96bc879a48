"""The hostile inputs of `make fuzz`: that they can be made again and are what they claim, what becomes of them is told
rightly; and some hundred of them against the real server."""

import hashlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from random import Random
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from conftest import DEMO_CHECKPOINT, ROOT
from florence2_release.tritonserver import ServerError, find_tritonserver
from PIL import Image
from tokenizers import Tokenizer

from florence2.errors import InvalidRequest
from florence2.generation.settings import GenerationSettings
from florence2.images import Limits, decode
from florence2.prompts import PromptEncoder

sys.path.insert(0, str(ROOT / "benchmarks"))

from fuzz import asked, pictures
from fuzz.honest import Asked
from fuzz.kinds import KINDS, chosen, make, schedule
from fuzz.messages import Input, grpc_message, http, post
from fuzz.report import Run
from fuzz.send import Ending, Sender
from fuzz.watch import End, Fault, Watch

HARMLESS = "-direct_answer_too_long,-*MB,-many_pixels"
"""Without those that keep the server busy for long."""


def digest() -> str:
    """Of some inputs of every kind."""
    kinds = {kind: 3 if one.weight >= 10 else 1 for kind, one in KINDS.items() if "60_MB" not in kind}
    made = (make(kind, 7, number) for kind, count in kinds.items() for number in range(count))
    return hashlib.sha256(repr(list(made)).encode()).hexdigest()


def test_an_input_can_be_made_again_in_another_process():
    code = "import sys; sys.path[:0] = sys.argv[1:]; import test_fuzz; print(test_fuzz.digest())"
    found = subprocess.run(
        [sys.executable, "-c", code, str(ROOT / "tests"), str(ROOT / "tests" / "project"), str(ROOT / "benchmarks")],
        env=os.environ | {"PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == digest()


@pytest.mark.parametrize("kind", ["setting", "prompt", "picture_mutated", "json_values", "direct_beam_search"])
def test_seeds_and_numbers_make_others(kind: str):
    made = {make(kind, seed, number).data for seed in range(5) for number in range(20)}
    assert len(made) > 50


def test_shapes_in_json_are_small():
    """Triton takes memory for them whatever the data."""
    made = [make("json_values", 5, number).data for number in range(500)]
    shapes = [shape.decode() for one in made for shape in re.findall(rb'"shape": (\[[^]]*\])', one)]
    assert len(shapes) > 1000
    assert not [shape for shape in shapes if re.search(r"\d{5}|e\+", shape)]


def test_every_kind_has_its_share_of_a_schedule():
    names = chosen("*", "inputs")
    order = schedule(names, 1, 10_000)
    assert order == schedule(names, 1, 10_000) != schedule(names, 2, 10_000)
    counts = Counter(kind for kind, _ in order)
    assert counts.keys() == set(names)
    assert counts["prompt"] == pytest.approx(2 * counts["setting_beyond"], abs=1) == pytest.approx(700, rel=0.1)
    for kind, count in counts.items():
        assert sorted(number for name, number in order if name == kind) == list(range(count))


def test_kinds_are_chosen_by_patterns():
    assert chosen("picture*,-*MB", "inputs") == ["picture", "picture_mutated"]
    assert set(KINDS) - set(chosen("-prompt", "inputs")) == {
        "prompt",
        "cancelled_early",
        *chosen("*", "crashes"),
    }
    assert chosen("*", "cancels") == ["cancelled_early"]
    with pytest.raises(ValueError, match="no kind is called pictures; there are setting,"):
        chosen("pictures", "inputs")


def test_requests_over_a_limit_are():
    settings = GenerationSettings(2, 2, 20, asked.POSITIONS)
    for number in range(300):
        name, value = asked.beyond(Random(number))
        with pytest.raises(InvalidRequest, match=f"^{name} must be"):
            settings.override(**{name: value})
    for number in range(30):
        with pytest.raises(InvalidRequest, match=r"megapixels are allowed|can't be read"):
            decode(pictures.too_many_pixels(Random(number)), Limits(megapixels=40))


def test_prompts_over_a_limit_are():
    sizes = SimpleNamespace(
        location_bins=1000,
        vocab_size=asked.VOCABULARY,
        max_position_embeddings=asked.POSITIONS,
        image_tokens=asked.IMAGE_TOKENS,
    )
    encoder = PromptEncoder(Tokenizer.from_file(str(DEMO_CHECKPOINT / "tokenizer.json")), sizes)  # type: ignore[arg-type]
    for number in range(60):
        prompt = asked.long_prompt(Random(number), 20_000).decode()
        assert len(prompt.encode()) >= 19_900
        with pytest.raises(InvalidRequest):
            encoder.encode(prompt)


def test_what_the_generators_build_is_well_formed():
    for data in pictures.pictures():
        Image.open(io.BytesIO(data)).load() if not data.startswith(b"%!PS") else None
    chunks = pictures.png_chunks(pictures.small_png())
    assert pictures.png(*chunks) == pictures.small_png()
    many = Image.open(io.BytesIO(pictures.many_pixels(Random(3))))
    many.load()
    assert 2e6 <= many.width * many.height <= 100e6
    request = asked.asked(num_beams=3)
    message = grpc_message(request)
    assert [tensor.name for tensor in message.inputs] == ["image", "prompt", "num_beams", "max_new_tokens"]
    assert message.raw_input_contents[2] == b"\3\0\0\0"
    assert http(request).data.endswith(b"".join(message.raw_input_contents))


Answering = Callable[[socket.socket], None]


@pytest.fixture
def listen() -> Iterator[Callable[[Answering], int]]:
    """Starts what answers one connection after the other, returns its port."""
    stack: list[socket.socket] = []

    def start(answer: Answering) -> int:
        listening = socket.create_server(("127.0.0.1", 0))
        stack.append(listening)

        def serve() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                with connection:
                    answer(connection)

        threading.Thread(target=serve, daemon=True).start()
        return listening.getsockname()[1]

    yield start
    for listening in stack:
        listening.close()


def saying(answer: bytes) -> Answering:
    def say(connection: socket.socket) -> None:
        connection.recv(1 << 20)
        connection.sendall(answer)

    return say


GOOD, BAD = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", b"HTTP/1.1 400 Bad\r\nContent-Length: 3\r\n\r\nwhy"
HTTP = post("/x", b"")


@pytest.mark.parametrize(
    ("answer", "sent", "expected"),
    [
        (saying(GOOD), Input("http", HTTP), ("answered", "200", "")),
        (saying(BAD), Input("http", HTTP), ("refused", "400", "why")),
        (saying(b""), Input("http", HTTP), ("lost", "", None)),
        (saying(b""), Input("http", HTTP, may_close=True), ("closed", "", None)),
        (saying(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}"), Input("http", HTTP), ("lost", "", None)),
        (saying(GOOD * 3), Input("http", HTTP * 3, answers=3), ("answered", "200", "")),
        (saying(GOOD * 2), Input("http", HTTP * 3, answers=3), ("lost", "", None)),
        (saying(GOOD + BAD), Input("http", HTTP * 2, answers=2), ("refused", "400", "why")),
        (lambda connection: time.sleep(2), Input("http", HTTP, seconds=0.2), ("silent", "", None)),
        (saying(GOOD), Input("http", HTTP, leave=("reset", 0.01)), ("left", "reset", "")),
    ],
)
def test_what_becomes_of_an_input_over_http(
    listen: Callable[[Answering], int], answer: Answering, sent: Input, expected: tuple[str, str, str | None]
):
    sender = Sender(listen(answer), 1)
    outcome, status, detail = sender.send(sent)
    sender.close()
    assert (outcome, status) == expected[:2]
    assert expected[2] in (None, detail)


def test_nothing_that_listens_is_unreached():
    sender = Sender(1, 1)
    assert sender.send(Input("http", HTTP))[0] == "unreached"
    assert sender.send(Input("grpc", b""))[0] == "unreached"
    sender.close()


def test_what_becomes_of_an_input_over_grpc():
    def answer(data: bytes, context: grpc.ServicerContext) -> bytes:
        if data == b"slow":
            time.sleep(0.5)
        if data in (b"busy", b"bad"):
            code = grpc.StatusCode.UNAVAILABLE if data == b"busy" else grpc.StatusCode.INVALID_ARGUMENT
            context.abort(code, "128 requests are waiting already")
        return b""

    class Handler(grpc.GenericRpcHandler):
        def service(self, call: grpc.HandlerCallDetails) -> Any:
            return grpc.unary_unary_rpc_method_handler(answer)

    server = grpc.server(ThreadPoolExecutor(4), handlers=[Handler()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    sender = Sender(1, port)
    sent = {
        "answered": Input("grpc", b"good"),
        "refused": Input("grpc", b"busy"),
        "silent": Input("grpc", b"slow", seconds=0.1),
        "left": Input("grpc", b"slow", leave=("cancel", 0.01)),
    }
    assert {outcome: sender.send(one)[0] for outcome, one in sent.items()} == {outcome: outcome for outcome in sent}
    assert sender.send(Input("grpc", b"bad"))[:2] == ("refused", "INVALID_ARGUMENT")
    assert sender.send(Input("grpc", b"slow", leave=("deadline", 0.01)))[0] == "left"
    sender.close()
    server.stop(None)


def test_crashes_of_which_triton_is_known_fail_a_run_when_it_stays_away():
    run = Run("cancels", 1)
    run.add(Ending("cancelled_early", 1, "lost"))
    run.add_end(End("tritonserver", 0, ""))
    run.backs = [3.0, 14.9]
    assert run.failures() == []
    assert "tritonserver ended 2 times, and was ready again after 14.9 s at most." in run.markdown()
    run.backs.append(16.0)
    run.add_end(End("beam_search", 0, ""))
    run.add(Ending("cancelled_early", 2, "silent"))
    assert [failure[:40] for failure in run.failures()] == [
        "beam_search ended by itself; resend with",
        "not ready again within 15 s, but 16.0 s",
        "cancelled_early: 1 silent, first --again",
    ]


def test_a_run_that_went_well_has_no_failures():
    run = Run("inputs", 1, attacked=10)
    run.add_honest(Asked("answered", 5, 0.1))
    run.add_honest(Asked("answered", 15, 0.2))
    for number in range(200):
        run.sent("too_many_pixels", number)
        run.add(Ending("too_many_pixels", number, "refused", "400", 1.5 if number == 7 else 0.01))
    run.add(Ending("picture_of_MB", 0, "refused", "400", 1.9, size=50_000_000))
    run.peaks = {"preprocess": 1999.0}
    assert run.failures() == []
    assert (run.alone, run.beside, run.on_way) == ([0.1], [0.2], [])
    row = "| too_many_pixels \\* | 200 | 0 | 200 | 0 | 0 | 0 | 0 | 0 | 10 | 10 | 1,500 | 7 |"
    assert row in run.markdown().splitlines()
    assert run.markdown().endswith("Nothing failed.\n")


def test_whatever_goes_wrong_fails_a_run():
    run = Run("inputs", 3)
    run.sent("prompt", 5)
    run.add_end(End("tritonserver", 0, ""))
    run.add(Ending("prompt", 5, "lost", "", 0.5, "why"))
    run.add(Ending("time", 6, "silent", "", 30.0))
    run.add(Ending("too_many_pixels", 1, "answered", "200", 2.0))
    run.add_honest(Asked("wrong", 0, 1, "<OD>: [2, 3]"))
    run.peaks = {"preprocess": 2001.0}
    assert run.failures() == [
        "tritonserver ended by itself; resend with --again prompt:3:5",
        "an honest request was wrong after 1.0 s: <OD>: [2, 3]",
        "preprocess took 2001 MB; 2000 are allowed",
        "prompt: 1 lost, first --again prompt:3:5 ( after 0.5 s) 'why'",
        "time: 1 silent, first --again time:3:6 ( after 30.0 s) ''",
        "too_many_pixels: 1 not refused, first --again too_many_pixels:3:1 (200 after 2.0 s) ''",
        "too_many_pixels: 1 refused more than 1 s after it was read, the slowest after 2.0 s: "
        "--again too_many_pixels:3:1",
    ]
    assert "- an honest request was wrong after 1.0 s: \\<OD>: [2, 3]\n" in run.markdown()


def test_with_faults_connections_may_be_lost_but_a_server_must_come_back():
    run = Run("faults", 1)
    run.faults = [
        Fault("kill", "preprocess", 14.9),
        Fault("kill", "preprocess", 15.1),
        Fault("stop", "tritonserver", None),
    ]
    run.add(Ending("prompt", 5, "lost", "", 0.5))
    assert run.failures() == [
        "preprocess: no answer again within 15 s after kill",
        "tritonserver: no answer again within 15 s after stop",
    ]
    assert "| kill | preprocess | 2 | 15.1 |" in run.markdown()
    assert "| stop | tritonserver | 1 | never |" in run.markdown()


def test_what_goes_with_a_server_is_told_once(monkeypatch: pytest.MonkeyPatch):
    told: SimpleQueue[End] = SimpleQueue()
    up = threading.Event()
    up.set()
    watch = Watch(SimpleNamespace(server_log=lambda: "its log"), up, told.put)  # type: ignore[arg-type]
    watch._tell(["preprocess"])
    watch._tell(["reaper", "tritonserver", "preprocess"])
    watch._tell(["serve"])
    assert [told.get().role, told.get().role] == ["preprocess", "tritonserver"]
    assert told.empty()
    # Nothing hostile is sent until some time after it is back.
    assert not up.is_set()
    ready = False
    monkeypatch.setattr(watch.served, "is_ready", lambda: ready, raising=False)
    monkeypatch.setattr("fuzz.watch.CALM", 0)
    watch._wait_for_calm()
    assert watch.backs == []
    ready = True
    watch._wait_for_calm()
    assert len(watch.backs) == 1
    assert not up.is_set()
    watch._wait_for_calm()
    assert up.is_set()


@pytest.mark.server
def test_some_hundred_inputs_do_no_harm(demo_export: Path, tmp_path: Path):
    try:
        find_tritonserver()
    except ServerError as error:
        pytest.skip(str(error))
    from fuzz.run import Harness

    sizes = json.loads((demo_export / "manifest.json").read_text())["sizes"]
    known = {"image_height": asked.SIDE, "image_tokens": asked.IMAGE_TOKENS, "d_model": asked.D_MODEL}
    known |= {"vocab_size": asked.VOCABULARY, "max_position_embeddings": asked.POSITIONS}
    assert sizes.items() >= known.items()
    harness = Harness(demo_export, tmp_path, 4, 1)
    try:
        order = schedule(chosen(HARMLESS, "inputs"), 2, 200)
        run = harness.run("inputs", order, 2, minutes=5, clients=2, senders=1, alone=0)
        assert run.total == len(order)
        # How soon depends on what else the machine does.
        assert [failure for failure in run.failures() if "after it was read" not in failure] == []
        assert run.honest.keys() == {"answered"}
        assert {
            "serve",
            "tritonserver",
            "preprocess",
            "vision_encoder",
            "beam_search",
            "postprocess",
        } <= run.peaks.keys()
        told: SimpleQueue[End] = SimpleQueue()
        watch = Watch(harness.served, threading.Event(), told.put)
        watch.start()
        killed = next(pid for pid, (role, _) in harness.served.tree.items() if role == "postprocess")
        os.kill(killed, signal.SIGKILL)
        assert told.get(timeout=30).role == "postprocess"
        watch.close()
    finally:
        harness.close()
