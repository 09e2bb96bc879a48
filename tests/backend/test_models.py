"""Every model.py of the model repository, without a server."""

import base64
import io
import json
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from types import SimpleNamespace
from typing import Any

import fake_triton
import numpy as np
import pytest
from conftest import DEMO_CHECKPOINT
from fake_triton import HANGS, Request, load_model, run, submit
from florence2_export.checkpoint import Checkpoint, load_checkpoint
from florence2_export.parity import reference_generate
from florence2_release.install import install
from PIL import Image

from florence2.backend.metric_names import COUNTERS, FAILED, GAUGES
from florence2.generation import engine as engine_module
from florence2.generation.caches import CacheSizes
from florence2.generation.engine import Engine
from florence2.generation.scheduler import Scheduler
from florence2.manifest import Manifest

Tensors = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def repository(demo_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "repository"
    install(demo_export, folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return load_checkpoint(str(DEMO_CHECKPOINT))


@pytest.fixture(autouse=True)
def everyone_is_answered_once() -> Iterator[None]:
    fake_triton.beam_search_with_room()
    yield
    fake_triton.end()


@contextmanager
def held(owner: Any, name: str) -> Iterator[Event]:
    """Calls of `owner.name` wait until the block ends. The event tells that one does."""
    called, let_go, original = Event(), Event(), getattr(owner, name)

    def wait(*args: Any, **options: Any) -> Any:
        called.set()
        assert let_go.wait(HANGS)
        return original(*args, **options)

    setattr(owner, name, wait)
    try:
        yield called
    finally:
        setattr(owner, name, original)
        let_go.set()


def png(width: int = 60, height: int = 40) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "teal").save(buffer, format="PNG")
    return buffer.getvalue()


def request(image: bytes, prompt: str, **options: Any) -> Request:
    return Request(image=np.array([image], np.object_), prompt=np.array([prompt.encode()], np.object_), **options)


def code_and_message(response: fake_triton.InferenceResponse) -> tuple[str, str]:
    error = response.error()
    assert error is not None
    return error.code(), error.message()


@pytest.fixture(scope="module")
def prepared(repository: Path) -> list[Tensors]:
    """What beam_search gets for the demo's pictures and three tasks: image_features and input_ids."""
    fake_triton.beam_search_with_room()
    preprocess, vision = load_model(repository, "preprocess"), load_model(repository, "vision_encoder")
    pictures = sorted((DEMO_CHECKPOINT.parent / "pictures").glob("*.[jp][pn]g"))
    inputs = []
    for picture in pictures:
        for prompt in ("<OD>", "<CAPTION>", "<OCR_WITH_REGION>"):
            (ready,) = run(preprocess, [request(picture.read_bytes(), prompt)])
            (seen,) = run(vision, [Request(pixels=ready.tensors()["pixels"][0])])
            ids, features = ready.tensors()["input_ids"][0], seen.tensors()["image_features"][0]
            inputs.append({"image_features": features, "input_ids": ids})
    fake_triton.end()
    return inputs


def search_request(inputs: Tensors, timeout_microseconds: int = 0, **settings: Any) -> Request:
    types = {float: np.float32, int: np.int32, bool: np.bool_}
    given = {name: np.array([value], types[type(value)]) for name, value in settings.items()}
    return Request(timeout_microseconds=timeout_microseconds, **inputs, **given)


ENDLESS: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 511, "no_repeat_ngram_size": 1}
"""Runs for as many steps as it may: the start token, which is the end token too, must not be repeated."""


def gauge(name: str, model: str = "beam_search") -> float:
    return fake_triton.metrics[name, model, "1"].value()


def test_preprocess_answers_the_good_requests_of_a_batch_and_refuses_the_bad(repository: Path) -> None:
    model = load_model(repository, "preprocess")
    responses = run(
        model,
        [
            request(png(), "<OD>"),
            request(b"<html>", "<OD>"),
            request(base64.b64encode(png()), "<CAPTION>"),
            request(png(), "<COPTOIN>x"),
            request(png(), "<caption>"),
            Request(image=np.array([png()], np.object_), prompt=np.array([b"\xff\xfe"], np.object_)),
        ],
    )
    first, third = responses[0].tensors(), responses[2].tensors()
    assert first["image_size"].tolist() == [[60, 40]]
    assert first["pixels"].dtype == np.uint8
    assert first["pixels"].shape == (1, 96, 96, 3)
    assert first["pixels"][0, 5, 5].tolist() == [0, 128, 128]
    assert (third["pixels"] == first["pixels"]).all()
    assert first["input_ids"].shape[0] == 1
    assert code_and_message(responses[1])[0] == "INVALID_ARG"
    assert "can't be read" in code_and_message(responses[1])[1]
    # Two letters off: it may be a task of a fine-tune.
    assert responses[3].error() is None
    assert code_and_message(responses[4]) == ("INVALID_ARG", "unknown task <caption>; did you mean <CAPTION>?")
    assert code_and_message(responses[5]) == ("INVALID_ARG", "the prompt is not UTF-8")


def test_limits_come_from_the_config(repository: Path) -> None:
    (response,) = run(load_model(repository, "preprocess", max_megapixels=0.001), [request(png(), "<OD>")])
    assert code_and_message(response) == ("INVALID_ARG", "the image has 60 x 40 pixels; 0.001 megapixels are allowed")


def test_features_tokens_and_answer(repository: Path) -> None:
    preprocess, vision, search, postprocess = (
        load_model(repository, name) for name in ("preprocess", "vision_encoder", "beam_search", "postprocess")
    )
    (ready,) = run(preprocess, [request(png(), "<OD>")])
    inputs = ready.tensors()
    (seen,) = run(vision, [Request(pixels=inputs["pixels"][0])])
    features = seen.tensors()["image_features"]
    assert features.shape == (1, 145, 128)
    asked = {"image_features": features[0], "input_ids": inputs["input_ids"][0]}
    answered, refused = run(
        search, [search_request(asked, max_new_tokens=5, num_beams=2), search_request(asked, num_beams=9)]
    )
    generated = answered.tensors()
    length = generated["token_ids"].shape[1]
    assert generated["token_ids"][0, 0] == 2
    assert 2 <= length <= 6
    assert generated["token_logprobs"].shape == (1, length - 1)
    assert generated["sequence_score"].shape == generated["finish_reason"].shape == (1, 1)
    assert code_and_message(refused) == ("INVALID_ARG", "num_beams must be from 1 to 8, not 9")
    (final,) = run(
        postprocess,
        [
            Request(
                prompt=np.array([b"<OD>"], np.object_),
                image_size=inputs["image_size"][0],
                token_ids=generated["token_ids"][0],
                token_logprobs=generated["token_logprobs"][0],
                sequence_score=generated["sequence_score"][0],
                finish_reason=generated["finish_reason"][0].astype(bytes).astype(object),
            )
        ],
    )
    for name in ("token_ids", "token_logprobs", "sequence_score"):
        assert (final.tensors()[name] == generated[name]).all()
    assert final.tensors()["finish_reason"].tolist() == [[generated["finish_reason"][0, 0].encode()]]
    answer = json.loads(final.tensors()["answer"][0, 0])
    assert set(answer["<OD>"]) == {"bboxes", "labels", "scores"}
    assert final.tensors()["text"][0, 0].startswith("</s><s>")


def test_an_exception_fails_its_request_alone(repository: Path) -> None:
    vision = load_model(repository, "vision_encoder", at_once=1)
    look = vision.graph.run

    def fails_for_black(names: Any, feeds: Any) -> Any:
        if not feeds["pixels"].any():
            raise RuntimeError("black")
        return look(names, feeds)

    vision.graph.run = fails_for_black
    bad, good = (Request(pixels=np.full((96, 96, 3), value, np.uint8)) for value in (0, 1))
    responses = run(vision, [bad, good])
    assert code_and_message(responses[0]) == ("INTERNAL", "RuntimeError: black")
    assert responses[1].error() is None
    assert "E request 0 'test' failed: RuntimeError('black')" in fake_triton.Logger.lines


def test_the_vision_encoder_looks_once_at_each_of_its_recent_pictures(repository: Path) -> None:
    vision = load_model(repository, "vision_encoder", recent_pictures=2, at_once=1)
    seen: list[int] = []
    look = vision.graph.run
    vision.graph.run = lambda names, feeds: seen.append(int(feeds["pixels"][0, 0, 0, 0])) or look(names, feeds)

    def features(*values: int) -> list[np.ndarray]:
        requests = [Request(pixels=np.full((96, 96, 3), value, np.uint8)) for value in values]
        return [response.tensors()["image_features"] for response in run(vision, requests)]

    first, second, again = features(1, 2, 1)
    assert seen == [1, 2]
    assert (first == again).all()
    assert not (first == second).all()
    # A third drops 2, the one not asked about for longest.
    features(3, 1)
    assert seen == [1, 2, 3]
    assert (features(2)[0] == second).all()
    assert seen == [1, 2, 3, 2]


def test_a_picture_of_the_wrong_shape_is_not_a_recent_one_with_the_same_bytes(repository: Path) -> None:
    vision = load_model(repository, "vision_encoder")
    wide = Request(pixels=np.zeros((48, 192, 3), np.uint8))
    good, refused = run(vision, [Request(pixels=np.zeros((96, 96, 3), np.uint8)), wide])
    assert good.error() is None
    assert code_and_message(refused) == ("INVALID_ARG", "pixels must be (96, 96, 3), not (48, 192, 3)")


def good_picture(**options: Any) -> Request:
    return request(png(), "<OD>", **options)


def good_pixels(**options: Any) -> Request:
    return Request(pixels=np.zeros((96, 96, 3), np.uint8), **options)


# What answers one request, to be held back while others come in.
WORKERS: dict[str, tuple[Callable[..., Request], Callable[[Any], tuple[Any, str]]]] = {
    "preprocess": (good_picture, lambda model: (model, "resizer")),
    "vision_encoder": (good_pixels, lambda model: (model.graph, "run")),
}


@pytest.mark.parametrize("name", WORKERS)
def test_a_full_list_refuses_at_once_and_answers_those_on_it(repository: Path, name: str) -> None:
    # Two at a time would take a third request on, sooner or later.
    model = load_model(repository, name, max_waiting=2, at_once=1)
    good, busy = WORKERS[name]
    running, waiting, refused = good(), [good(), good()], [good(), good()]
    with held(*busy(model)) as called:
        submit(model, [running])
        assert called.wait(HANGS)
        submit(model, [*waiting, *refused])
        for one in refused:
            assert code_and_message(one.answer()) == (
                "UNAVAILABLE",
                "2 requests are waiting already; try again later",
            )
        assert not any(one.get_response_sender().is_answered() for one in (running, *waiting))
    for one in (running, *waiting):
        assert one.answer().error() is None
    (after,) = run(model, [good()])
    assert after.error() is None


@pytest.mark.parametrize("name", WORKERS)
def test_a_request_whose_time_is_over_before_its_turn(repository: Path, name: str) -> None:
    model = load_model(repository, name)
    good, busy = WORKERS[name]
    running, late, in_time = good(), good(timeout_microseconds=1), good()
    with held(*busy(model)) as called:
        submit(model, [running])
        assert called.wait(HANGS)
        submit(model, [late, in_time])
    assert running.answer().error() is None
    assert code_and_message(late.answer())[0] == "UNAVAILABLE"
    assert "time was over before its turn" in code_and_message(late.answer())[1]
    assert in_time.answer().error() is None


@pytest.mark.parametrize("name", WORKERS)
def test_finalize_answers_those_that_wait(repository: Path, name: str) -> None:
    model = load_model(repository, name)
    good, busy = WORKERS[name]
    requests = [good(), good(), good()]
    with held(*busy(model)) as called:
        submit(model, requests)
        assert called.wait(HANGS)
        ending = Thread(target=fake_triton.finalize, args=(model,))
        ending.start()
    ending.join(HANGS)
    assert not ending.is_alive()
    assert all(one.get_response_sender().is_answered() for one in requests)
    assert [one.answer().error() for one in requests] == [None] * 3


def test_a_worker_survives_a_panic(repository: Path) -> None:
    """Of the tokenizers library, in Rust: no Exception."""

    class Panic(BaseException):
        pass

    model = load_model(repository, "preprocess", at_once=1)
    resizer, model.resizer = model.resizer, lambda image: (_ for _ in ()).throw(Panic("unwrap on None"))
    (panicked,) = run(model, [good_picture()])
    model.resizer = resizer
    (after,) = run(model, [good_picture()])
    assert code_and_message(panicked) == ("INTERNAL", "RuntimeError: Panic('unwrap on None')")
    assert after.error() is None


@pytest.mark.parametrize(("asked", "given"), [(0, 300), (2_000_000, 2), (500_000_000, 300)])
@pytest.mark.parametrize(
    ("arrival", "came"),
    [(None, 1000), (990_500_000_000, 990.5), (1000_000_000_001, 1000), (-5, 0), (2**63 - 1, 1000), (-(2**63), 0)],
)
def test_a_request_may_ask_for_less_time_not_for_more_from_its_arrival_on(
    asked: int, given: float, arrival: int | None, came: float, monkeypatch: Any
) -> None:
    fake_triton.install()
    from florence2.backend.tensors import Arrival

    monkeypatch.setattr(time, "monotonic_ns", lambda: 1000_000_000_000)
    told = Arrival.of({} if arrival is None else {"arrival": np.array([arrival, 7])})
    assert told.deadline(Request(timeout_microseconds=asked), timeout=300) == came + given


def test_arrival_is_handed_on_and_counts_in_every_model(repository: Path, prepared: list[Tensors]) -> None:
    preprocess = load_model(repository, "preprocess")
    before = time.monotonic_ns()
    first, second = (one.tensors()["arrival"][0] for one in run(preprocess, [good_picture(), good_picture()]))
    assert before <= first[0] <= second[0] <= time.monotonic_ns()
    assert {first[1], second[1]} == {1, 2}
    long_ago = np.array([time.monotonic_ns() - 61_000_000_000, 1])
    for name, late, in_time in (
        ("vision_encoder", good_pixels(arrival=long_ago, timeout_microseconds=60_000_000), good_pixels(arrival=first)),
        (
            "beam_search",
            search_request({**prepared[0], "arrival": long_ago}, 60_000_000),
            search_request({**prepared[0], "arrival": first}, 60_000_000),
        ),
    ):
        model = load_model(repository, name)
        too_late, answered = run(model, [late, in_time])
        assert code_and_message(too_late)[0] == "UNAVAILABLE"
        assert "time" in code_and_message(too_late)[1]
        assert answered.error() is None
        fake_triton.finalize(model)
        assert gauge(f"{FAILED} deadline", name) == 1


def random_settings(rng: random.Random) -> dict[str, Any]:
    return {
        "num_beams": rng.choice([1, 1, 2, 3, 3, 4, 5, 6, 7, 8]),
        "max_new_tokens": rng.choice([1, 2, 5, 20, 60]),
        "no_repeat_ngram_size": rng.choice([0, 1, 2, 3]),
        "length_penalty": rng.choice([0.0, 0.5, 1.0, 2.0, -1.0]),
        "early_stopping": rng.choice([True, False]),
    }


def test_requests_in_flight_get_transformers_answers_each_with_its_own_settings(
    repository: Path, prepared: list[Tensors], checkpoint: Checkpoint
) -> None:
    rng = random.Random(0)
    asked = [(rng.choice(prepared), random_settings(rng)) for _ in range(24)]
    model = load_model(repository, "beam_search")
    responses = run(model, [search_request(inputs, **settings) for inputs, settings in asked])
    for (inputs, settings), response in zip(asked, responses, strict=True):
        reference = reference_generate(checkpoint.model, inputs["image_features"], inputs["input_ids"], **settings)
        assert response.tensors()["token_ids"][0].tolist() == reference.sequences[0].tolist(), settings


def test_a_short_answer_does_not_wait_for_a_long_one(repository: Path, prepared: list[Tensors]) -> None:
    long = search_request(prepared[0], **ENDLESS)
    short = [search_request(inputs, num_beams=1, max_new_tokens=3) for inputs in prepared[:4]]
    run(load_model(repository, "beam_search"), [long, *short])
    *places, last = (one.get_response_sender().place for one in (*short, long))
    assert places == sorted(places)
    assert last > places[-1]
    assert long.answer().tensors()["token_ids"].shape == (1, 512)


def test_beam_searchs_full_list_refuses_at_once_and_answers_those_on_it(
    repository: Path, prepared: list[Tensors]
) -> None:
    model = load_model(repository, "beam_search", rows=3, max_waiting=2)
    running, *waiting, refused = (search_request(prepared[0], max_new_tokens=9) for _ in range(4))
    with held(model.engine.runner, "decode") as called:
        submit(model, [running])
        assert called.wait(HANGS)
        submit(model, [*waiting, refused])
        assert code_and_message(refused.answer()) == ("UNAVAILABLE", "2 requests are waiting already; try again later")
        assert not any(one.get_response_sender().is_answered() for one in (running, *waiting))
    answers = [one.answer().tensors()["token_ids"].tolist() for one in (running, *waiting)]
    assert answers == answers[:1] * 3


def test_requests_are_given_up_at_their_time_waiting_or_running(repository: Path, prepared: list[Tensors]) -> None:
    model = load_model(repository, "beam_search", rows=3)
    running, late, in_time = (search_request(prepared[0], 100_000_000, **ENDLESS | {"num_beams": 2}) for _ in range(3))
    with held(model.engine.runner, "decode") as called:
        before = time.monotonic()
        submit(model, [running])
        assert called.wait(HANGS)
        submit(model, [late])
        scheduler = model.engine.scheduler
        for accepted in (*scheduler.running, *scheduler.waiting):
            assert before + 100 <= accepted.deadline <= time.monotonic() + 100
            accepted.deadline = model.engine._next_deadline = time.monotonic()
        in_time = search_request(prepared[0], num_beams=2, max_new_tokens=3)
        submit(model, [in_time])
    for one in (running, late):
        code, message = code_and_message(one.answer())
        assert code == "UNAVAILABLE"
        assert "the request's time is over" in message
    assert in_time.answer().error() is None


def test_without_a_timeout_the_configs_holds(repository: Path, prepared: list[Tensors]) -> None:
    model = load_model(repository, "beam_search", timeout_seconds=0)
    for timeout in (0, 50_000_000):
        (late,) = run(model, [search_request(prepared[0], timeout)])
        assert code_and_message(late)[0] == "UNAVAILABLE"


def test_cancelled_requests_leave_their_rows(
    repository: Path, prepared: list[Tensors], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "ASKED_EVERY", 0)
    model = load_model(repository, "beam_search", rows=3)
    encoded: list[Any] = []
    encode = model.engine.runner.encode
    model.engine.runner.encode = lambda requests: encoded.extend(requests) or encode(requests)
    running, waiting = (search_request(prepared[0], **ENDLESS) for _ in range(2))
    with held(model.engine.runner, "decode") as called:
        submit(model, [running, waiting])
        assert called.wait(HANGS)
        running.cancel()
        waiting.cancel()
    for one in (running, waiting):
        assert code_and_message(one.answer()) == ("CANCELLED", "the request was cancelled")
    assert len(encoded) == 1
    (after,) = run(model, [search_request(prepared[0], max_new_tokens=5)])
    assert after.error() is None
    fake_triton.finalize(model)
    assert gauge("florence2_rows_used") == gauge("florence2_requests_running") == 0
    assert gauge("florence2_rows_free") == 3
    # One step of the first request, and what the last took.
    assert gauge("florence2_steps_total") <= 1 + 5


def bad_inputs(inputs: Tensors, positions: int, vocab_size: int) -> list[tuple[str, Tensors]]:
    features, ids = inputs["image_features"], inputs["input_ids"]

    def with_feature(value: float) -> Tensors:
        changed = features.copy()
        changed[-1, -1] = value
        return {"image_features": changed, "input_ids": ids}

    def with_ids(values: list[int]) -> Tensors:
        return {"image_features": features, "input_ids": np.array(values, np.int64)}

    room = positions - len(features)
    too_large = "image_features hold values that are not finite, or larger than any picture's"
    return [
        *(
            (f"image_features must be 145 x 128, not {part.shape}", {"image_features": part, "input_ids": ids})
            for part in (features[1:], features[:, 1:], features[:0])
        ),
        *((too_large, with_feature(value)) for value in (np.nan, np.inf, -np.inf, 1e4, -1e30)),
        (f"input_ids must be 1 to {room} tokens, not 0", with_ids([])),
        (f"input_ids must be 1 to {room} tokens, not {room + 1}", with_ids([4] * (room + 1))),
        (f"input_ids must be from 0 to {vocab_size - 1}", with_ids([0, -1, 2])),
        (f"input_ids must be from 0 to {vocab_size - 1}", with_ids([0, vocab_size, 2])),
    ]


def test_beam_search_refuses_what_no_vision_encoder_makes_and_answers_the_next(
    repository: Path, prepared: list[Tensors], demo_export: Path
) -> None:
    sizes = Manifest.read(demo_export).sizes
    bad = bad_inputs(prepared[0], sizes.max_position_embeddings, sizes.vocab_size)
    model = load_model(repository, "beam_search")
    (expected,) = run(model, [search_request(prepared[0])])
    for message, inputs in bad:
        refused, good = run(model, [search_request(inputs), search_request(prepared[0])])
        assert code_and_message(refused) == ("INVALID_ARG", message)
        assert (good.tensors()["token_ids"] == expected.tensors()["token_ids"]).all()
    for name in ("image_features", "input_ids"):
        (refused,) = run(model, [search_request({key: value for key, value in prepared[0].items() if key != name})])
        assert code_and_message(refused) == ("INVALID_ARG", f"{name} is missing")
    # The longest prompt there is room for.
    most = np.full(sizes.max_position_embeddings - sizes.image_tokens, 4)
    (longest,) = run(model, [search_request(prepared[0] | {"input_ids": most}, max_new_tokens=2)])
    assert longest.error() is None


def test_a_request_that_never_fits_is_refused_and_says_what_would(repository: Path, prepared: list[Tensors]) -> None:
    model = load_model(repository, "beam_search", rows=3)
    refused, good = run(model, [search_request(prepared[0], num_beams=4), search_request(prepared[0])])
    code, message = code_and_message(refused)
    assert code == "INVALID_ARG"
    assert message.startswith("4 beams of up to 512 tokens over ")
    assert "raise rows or cache_length" in message
    assert good.error() is None


def test_caches_that_memory_cannot_hold_are_refused_at_the_start(repository: Path) -> None:
    with pytest.raises(ValueError, match=r"caches of at most \d+ MB: 10000000 rows .* don't fit: \d+ MB are free"):
        load_model(repository, "beam_search", rows=10_000_000)


def test_metrics(repository: Path, prepared: list[Tensors], demo_export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_triton.install()
    from florence2.backend.metrics import Metrics

    monkeypatch.setattr(Metrics, "EVERY", 0)
    model = load_model(repository, "beam_search", rows=24, encoder_batch=1)
    ours = {name.split()[0] for name, *labels in fake_triton.metrics if labels == ["beam_search", "1"]}
    assert ours == {*COUNTERS, *GAUGES}
    assert gauge("florence2_rows_free") == 24
    assert gauge("florence2_cache_bytes") == CacheSizes.of(Manifest.read(demo_export).sizes, rows=24).bytes
    (first,) = run(model, [search_request(prepared[0], num_beams=1)])
    while_running: list[dict[str, float]] = []
    report = model.metrics.report
    model.metrics.report = lambda figures: while_running.append(figures) or report(figures)
    with held(model.engine.runner, "encode") as called:
        requests = [search_request(prepared[1], **ENDLESS | {"max_new_tokens": 20, "num_beams": 2}) for _ in range(2)]
        submit(model, requests)
        assert called.wait(HANGS)
    second, third = (one.answer().tensors() for one in requests)
    assert len(second["token_ids"][0]) == len(third["token_ids"][0]) == 21
    fake_triton.finalize(model)
    assert gauge("florence2_tokens_total") == len(first.tensors()["token_ids"][0]) - 1 + 20 + 20
    # One request starts per step.
    assert gauge("florence2_steps_total") == len(first.tensors()["token_ids"][0]) - 1 + 21
    assert gauge("florence2_encoder_seconds_total") > 0
    assert gauge("florence2_decoder_seconds_total") > 0
    both = [figures for figures in while_running if figures["florence2_requests_running"] == 2]
    assert len(both) == 18
    for figures in both:
        assert (figures["florence2_rows_used"], figures["florence2_rows_free"]) == (4, 20)
        assert figures["florence2_tokens_per_step"] == 2
    assert [figures["florence2_requests_waiting"] for figures in while_running].count(1) == 1
    for name in ("requests_running", "requests_waiting", "rows_used"):
        assert gauge(f"florence2_{name}") == 0
    assert gauge("florence2_rows_free") == 24


@pytest.mark.parametrize("name", ["preprocess", "vision_encoder"])
def test_times_of_models_that_answer_later(repository: Path, name: str) -> None:
    asked = [request(png(), "<OD>"), request(b"<html>", "<OD>")]
    if name == "vision_encoder":
        (ready,) = run(load_model(repository, "preprocess"), asked[:1])
        asked = [Request(pixels=ready.tensors()["pixels"][0])] * 2
    model = load_model(repository, name)
    with held(model.worker, "_answer") as called:
        submit(model, [asked[0]])
        assert called.wait(HANGS)
        time.sleep(0.05)
    asked[0].answer()
    fake_triton.finalize(model)
    assert gauge("florence2_running_seconds_total", name) >= 0.05
    assert gauge("florence2_waiting_seconds_total", name) >= 0


def test_without_metrics_requests_are_answered(
    repository: Path, prepared: list[Tensors], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Off:
        COUNTER, GAUGE = "counter", "gauge"

        def __init__(self, **_: Any) -> None:
            raise fake_triton.TritonModelException("metrics not supported")

    monkeypatch.setattr(fake_triton, "MetricFamily", Off)
    model = load_model(repository, "beam_search")
    (answered,) = run(model, [search_request(prepared[0])])
    assert answered.error() is None
    assert "I no metrics of beam_search: metrics not supported" in fake_triton.Logger.lines


@pytest.mark.parametrize("error", [RuntimeError("never seen before"), SystemExit("nor this")])
def test_when_the_engine_fails_everyone_is_told_and_the_process_ends(
    repository: Path, prepared: list[Tensors], monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    ended = monkeypatch_exit(monkeypatch)
    model = load_model(repository, "beam_search", rows=3)
    step = Engine.step

    def fail(engine: Engine) -> None:
        if engine.scheduler.running:
            raise error
        step(engine)

    running, waiting = (search_request(prepared[0], **ENDLESS) for _ in range(2))
    with held(model.engine.runner, "decode") as called:
        submit(model, [running, waiting])
        assert called.wait(HANGS)
        monkeypatch.setattr(Engine, "step", fail)
    assert ended.wait(HANGS)
    (late,) = run(model, [search_request(prepared[0])])
    for one in (running.answer(), waiting.answer(), late):
        assert code_and_message(one) == ("UNAVAILABLE", "the engine has failed")
    assert f"E beam_search 1 fails and goes on to; its process ends: {error!r}" in fake_triton.Logger.lines
    model.thread.join(HANGS)
    assert not model.is_ready()


def monkeypatch_exit(monkeypatch: pytest.MonkeyPatch) -> Event:
    """Set when the process would have ended."""
    ended = Event()

    def leave(status: int) -> None:
        assert status == 70
        ended.set()

    monkeypatch.setattr("os._exit", leave)
    return ended


def test_a_vision_encoder_that_goes_on_failing_ends(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = monkeypatch_exit(monkeypatch)
    model = load_model(repository, "vision_encoder")

    def fail(*_: Any) -> Any:
        raise RuntimeError("out of order")

    model.graph.run = fail
    for count in range(1, 4):
        (refused,) = run(model, [good_pixels()])
        assert code_and_message(refused) == ("INTERNAL", "RuntimeError: out of order")
        assert ended.wait(HANGS if count == 3 else 0) == (count == 3)


def test_a_vision_encoder_that_ends_tells_all_that_are_there(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = monkeypatch_exit(monkeypatch)
    model = load_model(repository, "vision_encoder", at_once=1)
    fails = Event()

    def fail(*_: Any) -> Any:
        assert fails.wait(HANGS)
        raise RuntimeError("CUDA error")

    model.graph.run = fail
    first, *rest = (good_pixels() for _ in range(3))
    submit(model, [first, *rest])
    fails.set()
    assert code_and_message(first.answer()) == ("INTERNAL", "RuntimeError: CUDA error")
    told = ("UNAVAILABLE", "the vision encoder has failed and is started again; try again")
    assert [code_and_message(one.answer()) for one in rest] == [told, told]
    assert ended.wait(HANGS)
    (late,) = run(model, [good_pixels()])
    assert code_and_message(late) == told


def test_features_that_are_no_numbers_are_the_servers_fault(repository: Path) -> None:
    model = load_model(repository, "vision_encoder")
    run_graph = model.graph.run
    model.graph.run = lambda *args: [np.full_like(run_graph(*args)[0], np.nan)]
    (refused,) = run(model, [good_pixels()])
    assert code_and_message(refused)[0] == "INTERNAL"
    assert not model.recent


def test_what_is_not_a_number_reaches_nobody_else(repository: Path, prepared: list[Tensors]) -> None:
    """As an overflow in half would leave it, in a column that the next request's answer does not reach."""
    model = load_model(repository, "beam_search", rows=3)
    (expected,) = run(model, [search_request(prepared[0], max_new_tokens=5)])
    runner = model.engine.runner
    name, cache = next(iter(runner._past.items()))
    values = cache._memory.numpy().copy()
    entries = values[: 3 * cache._heads * cache.columns * cache._head_dim]
    entries.reshape(3, cache._heads, cache.columns, cache._head_dim)[:, :, -1] = np.nan
    cache._memory.update_inplace(values)
    (refused,) = run(model, [search_request(prepared[0], max_new_tokens=5)])
    assert code_and_message(refused)[0] == "INTERNAL"
    assert "log-probabilities that are none" in code_and_message(refused)[1]
    (after,) = run(model, [search_request(prepared[0], max_new_tokens=5)])
    assert (after.tensors()["token_ids"] == expected.tensors()["token_ids"]).all(), name


def test_what_the_operator_allows(repository: Path, prepared: list[Tensors]) -> None:
    model = load_model(repository, "beam_search", max_beams=2, max_new_tokens=4)
    asked = [{}, {"num_beams": 2, "max_new_tokens": 4}, {"num_beams": 3}, {"max_new_tokens": 5}]
    silent, most, beams, tokens = run(model, [search_request(prepared[0], **settings) for settings in asked])
    assert (silent.tensors()["token_ids"] == most.tensors()["token_ids"]).all()
    assert silent.tensors()["token_ids"].shape == (1, 5)
    assert code_and_message(beams) == ("INVALID_ARG", "num_beams must be from 1 to 2, not 3")
    assert code_and_message(tokens) == ("INVALID_ARG", "max_new_tokens must be from 1 to 4 here, not 5")


@pytest.mark.parametrize("penalty", [0.6, 1.1, -0.3, 1e-30])
def test_a_length_penalty_is_the_number_that_was_written(
    repository: Path, prepared: list[Tensors], penalty: float
) -> None:
    """It travels in 32 bits; transformers computes with 64."""
    model = load_model(repository, "beam_search")
    accepted = model.accept(search_request(prepared[0], length_penalty=penalty), Responder())
    assert accepted.settings.length_penalty == penalty


@pytest.mark.parametrize(
    ("model", "name", "value", "least"),
    [
        ("beam_search", "max_beams", "zero", "a whole number, 1 or more"),
        ("beam_search", "threads", "-1", "a whole number, 0 or more"),
        ("preprocess", "timeout_seconds", "-1", "a number, 0 or more"),
        ("preprocess", "max_waiting_megabytes", "nan", "a number, 0 or more"),
        ("vision_encoder", "recent_pictures", "1.5", "a whole number, 0 or more"),
    ],
)
def test_a_parameter_that_is_none_is_named(repository: Path, model: str, name: str, value: str, least: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} is {value} in config.pbtxt; it must be {least}"):
        load_model(repository, model, **{name: value})


def test_who_can_be_cancelled_while_it_runs_is_asked_then(repository: Path, prepared: list[Tensors]) -> None:
    """Not behind an ensemble, which hands on when the request came."""
    model = load_model(repository, "beam_search")
    arrived = np.array([time.monotonic_ns(), 7])
    assert model.accept(search_request(prepared[0]), Responder()).may_be_cancelled_late
    assert not model.accept(search_request({**prepared[0], "arrival": arrived}), Responder()).may_be_cancelled_late


class Responder:
    def is_cancelled(self) -> bool:
        return False


# --- who comes in ---


def test_what_waits_is_bounded_in_bytes(repository: Path) -> None:
    model = load_model(repository, "preprocess", at_once=1, max_waiting_megabytes=0.003)
    large = b"x" * 2000
    with held(model, "resizer") as called:
        running = good_picture()
        submit(model, [running])
        assert called.wait(HANGS)
        waiting, refused = request(large, "<OD>"), request(large, "<OD>")
        submit(model, [waiting, refused])
        assert code_and_message(refused.answer()) == ("UNAVAILABLE", "0.00213 MB are waiting already; try again later")
    assert running.answer().error() is None
    assert code_and_message(waiting.answer())[0] == "INVALID_ARG"
    # One alone may be larger.
    (alone,) = run(model, [request(large * 2, "<OD>")])
    assert code_and_message(alone)[0] == "INVALID_ARG"
    fake_triton.finalize(model)
    assert gauge(f"{FAILED} overload", "preprocess") == 1
    assert gauge(f"{FAILED} client", "preprocess") == 2


def test_what_beam_search_has_no_room_for_is_refused_at_the_front(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("florence2.backend.occupancy.LOOKED_AT", 0)
    fake_triton.end()
    model = load_model(repository, "preprocess", at_once=1)
    (refused,) = run(model, [good_picture()])
    assert code_and_message(refused) == ("UNAVAILABLE", "beam_search is being started; try again later")
    behind = fake_triton.beam_search_with_room(2)
    behind.hold(30, free=2)
    with held(model, "resizer") as called:
        accepted, refused = [good_picture(), good_picture()], good_picture()
        submit(model, accepted[:1])
        assert called.wait(HANGS)
        submit(model, [*accepted[1:], refused])
        assert code_and_message(refused.answer()) == (
            "UNAVAILABLE",
            "32 requests are here already; try again later",
        )
    assert [one.answer().error() for one in accepted] == [None, None]
    # One that nobody comes to lends no room.
    behind.came()
    behind.hold(32, free=0)
    fake_triton.beam_search_with_room()
    (refused,) = run(model, [good_picture()])
    assert code_and_message(refused)[0] == "UNAVAILABLE"
    behind.hold(31, free=1)
    (accepted_again,) = run(model, [good_picture()])
    assert accepted_again.error() is None


def test_a_request_that_cannot_be_answered_in_its_time_is_refused_at_once(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from florence2.backend import admission
    from florence2.errors import TimeIsOver

    now = time.monotonic()
    monkeypatch.setattr(admission, "time", SimpleNamespace(monotonic=lambda: now))
    behind = fake_triton.beam_search_with_room()
    behind.hold(40, waiting=32, free=96)
    front = load_model(repository, "preprocess").admission
    front.check(now + 1)
    now += 20
    for _ in range(40):
        behind.answered()
    # Two a second, and forty are there.
    front.check(now + 21)
    with pytest.raises(TimeIsOver, match="40 requests are here already, which take about 20 s"):
        front.check(now + 19)
    # Without a queue nobody knows.
    behind.hold(8, waiting=0, free=128)
    front.check(now + 1)
    behind.hold(40, waiting=32, free=96)
    front.check(now + 1)


def test_pictures_are_decoded_side_by_side_as_far_as_there_is_room() -> None:
    from florence2.backend.preprocess import Budget

    budget, entered, leave = Budget(5_000_000), Event(), Event()

    def large() -> None:
        with budget.take(9_000_000):
            entered.set()
            leave.wait(HANGS)

    # Sums of fractions would leave something behind.
    with budget.take(1920 * 1080):
        with budget.take(640 * 480):
            one = Thread(target=large)
            one.start()
            assert not entered.wait(0.05)
        assert not entered.wait(0.05)
    assert entered.wait(HANGS)
    leave.set()
    one.join(HANGS)


# --- what no predecessor sends ---


def postprocess_request(**other: Any) -> Request:
    usual = {
        "prompt": np.array([b"<OD>"], np.object_),
        "image_size": np.array([60, 40]),
        "token_ids": np.array([2, 0, 5, 2]),
        "token_logprobs": np.zeros(3, np.float32),
        "sequence_score": np.zeros(1, np.float32),
        "finish_reason": np.array([b"stop"], np.object_),
    }
    return Request(**usual | other)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"token_ids": np.zeros(0, np.int64)}, "token_ids must be 1 to 512 tokens, not 0"),
        ({"token_ids": np.zeros(513, np.int64)}, "token_ids must be 1 to 512 tokens, not 513"),
        ({"token_ids": np.array([2, -1, 5, 2])}, "token_ids must be from 0 to 1535"),
        ({"token_ids": np.array([2, 1536, 5, 2])}, "token_ids must be from 0 to 1535"),
        ({"token_ids": np.array([2, 2**62, -(2**63), 2])}, "token_ids must be from 0 to 1535"),
        ({"token_logprobs": np.zeros(4, np.float32)}, "token_logprobs must be 3 beside 4 token_ids"),
        ({"token_logprobs": np.array([0, np.nan, 0], np.float32)}, "token_logprobs must be 0 or less"),
        ({"token_logprobs": np.array([0, 1, 0], np.float32)}, "token_logprobs must be 0 or less"),
        ({"image_size": np.array([0, 40])}, "image_size must be a picture's, not [0, 40]"),
        ({"image_size": np.array([60, 2**62])}, f"image_size must be a picture's, not [60, {2**62}]"),
        ({"sequence_score": np.array([np.nan], np.float32)}, "sequence_score must be a number"),
        ({"finish_reason": np.array([b"stop" * 9], np.object_)}, "finish_reason must be stop or length"),
        ({"prompt": np.array([b"\xff"], np.object_)}, "the prompt is not UTF-8"),
    ],
)
def test_postprocess_refuses_what_no_beam_search_makes(repository: Path, changed: dict[str, Any], message: str) -> None:
    model = load_model(repository, "postprocess")
    refused, good = run(model, [postprocess_request(**changed), postprocess_request()])
    assert code_and_message(refused) == ("INVALID_ARG", message)
    assert good.error() is None


def test_metrics_that_cannot_be_reported_stop_nothing(repository: Path, prepared: list[Tensors]) -> None:
    model = load_model(repository, "beam_search")

    def fail(_: Any) -> None:
        raise fake_triton.TritonModelException("gone")

    model.metrics.report = fail
    for response in run(model, [search_request(prepared[0]), search_request(prepared[1])]):
        assert response.error() is None


def test_finalize_tells_those_left_in_the_engine(repository: Path, prepared: list[Tensors]) -> None:
    model = load_model(repository, "beam_search", rows=3)
    running, waiting = (search_request(prepared[0], **ENDLESS) for _ in range(2))
    with held(model.engine.runner, "decode") as called:
        submit(model, [running, waiting])
        assert called.wait(HANGS)
        ending = Thread(target=fake_triton.finalize, args=(model,))
        ending.start()
        while not model.engine._closed:
            time.sleep(0.001)
        # Closed or about to be: what still comes in is told too.
        late = search_request(prepared[0], **ENDLESS)
        submit(model, [late])
    ending.join(HANGS)
    for one in (running, waiting, late):
        assert code_and_message(one.answer()) == ("UNAVAILABLE", "the server is stopping")


@pytest.mark.parametrize("times", [1, 2])
def test_an_answer_that_cannot_be_sent_is_tried_as_an_error_and_hurts_nobody_else(
    repository: Path, prepared: list[Tensors], times: int
) -> None:
    """Shared memory may have no room for the answer; when the client has gone, sending anything raises."""
    model = load_model(repository, "beam_search")
    hindered, other = (search_request(prepared[0]) for _ in range(2))
    sender = hindered.get_response_sender()
    send, tried = sender.send, []

    def refuse(response: Any, flags: int) -> None:
        tried.append(response.error())
        if len(tried) == 2:
            send(response, flags)
        if len(tried) <= times:
            raise fake_triton.TritonModelException("no room")

    sender.send = refuse
    assert model.execute([hindered, other]) == [None, None]
    assert other.answer().error() is None
    assert code_and_message(hindered.answer()) == ("INTERNAL", "TritonModelException: no room")
    assert [error is None for error in tried] == [True, False]


def test_a_refusal_is_returned_and_not_sent(repository: Path, prepared: list[Tensors]) -> None:
    """Sent, it costs another message between the processes, which is most of what a refusal costs."""
    fake_triton.beam_search_with_room()
    for name, bad in (
        ("preprocess", request(png(), "<OD>" * 9999)),
        ("vision_encoder", Request(pixels=np.zeros((1, 1, 3), np.uint8))),
        ("beam_search", search_request(prepared[0], num_beams=99)),
    ):
        (refusal,) = load_model(repository, name).execute([bad])
        assert code_and_message(refusal)[0] == "INVALID_ARG"
        sender = bad.get_response_sender()
        assert sender.sent == []
        sender.send(refusal, fake_triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def test_an_id_that_is_no_utf8_hurts_nobody(repository: Path, prepared: list[Tensors]) -> None:
    class Named(Request):
        def request_id(self) -> str:
            return b"\x80".decode()

    asked = Named(**{name: tensor.as_numpy()[0] for name, tensor in search_request(prepared[0]).tensors.items()})
    (answer,) = run(load_model(repository, "beam_search"), [asked])
    assert answer.error() is None


def test_scheduler_limits_come_from_the_config(repository: Path) -> None:
    model = load_model(repository, "beam_search", max_waiting=7, encoder_batch=4, rows=5)
    scheduler: Scheduler = model.engine.scheduler
    assert (scheduler.max_waiting, scheduler.encoder_batch, scheduler.caches.rows) == (7, 4, 5)
