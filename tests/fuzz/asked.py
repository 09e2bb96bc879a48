"""Requests for tensors: settings, prompts, outputs and times of the ensemble, and its models called directly.

What is small is drawn from hypothesis's strategies by random bytes of our own (`fuzz_one_input`, its entry for
fuzzers), so that every input can be made again alone. What is large are random bytes."""

import json
import math
import threading
from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any, TypeVar

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from florence2.tasks import TASKS, Takes
from fuzz import messages
from fuzz.messages import Input, Request, Tensor, array, grpc, http, prefixed, text
from fuzz.pictures import any_picture, in_base64, mutated, small_png

T = TypeVar("T")
# Of the demo checkpoint, which is what is served.
SIDE, IMAGE_TOKENS, D_MODEL, VOCABULARY, POSITIONS = 96, 145, 128, 1536, 512
_lock = threading.Lock()


def drawing(strategy: st.SearchStrategy[T]) -> Callable[[Random], T]:
    found: list[T] = []

    @settings(database=None, deadline=None)
    @given(strategy)
    def keep(value: T) -> None:
        found.append(value)

    def draw(rng: Random) -> T:
        with _lock:
            for _ in range(100):
                found.clear()
                keep.hypothesis.fuzz_one_input(rng.randbytes(2048))  # type: ignore[attr-defined]
                if found:
                    return found[-1]
        raise ValueError(f"{strategy} gives nothing")

    return draw


INT32 = st.sampled_from((-(2**31), -1, 0, 9, 25, 512, 513, 1024, 2**31 - 1)) | st.integers(-(2**31), 2**31 - 1)
FLOATS = st.sampled_from(tuple(map(float, ("nan", "inf", "-inf", "1e-45", "-1e-40", "3.4e38", "-3.4e38", "-0.0", "0"))))
FLOATS = FLOATS | st.floats(width=32)
BEAMS, NEW_TOKENS = st.integers(1, 8), st.sampled_from((1, 1, 1, 2, 5, 20)) | st.just(1)
ALLOWED: dict[str, tuple[Any, st.SearchStrategy[Any]]] = {
    "num_beams": (np.int32, BEAMS),
    "max_new_tokens": (np.int32, NEW_TOKENS),
    "no_repeat_ngram_size": (np.int32, st.integers(0, 5) | st.integers(0, 2**31 - 1)),
    "length_penalty": (np.float32, st.floats(-2, 2, width=32) | st.sampled_from((0.0, 1e-45, -1e-40, 3e38, -3e38))),
    "early_stopping": (np.bool_, st.booleans()),
}
ODD = {name: FLOATS if dtype is np.float32 else INT32 for name, (dtype, _) in ALLOWED.items() if dtype is not np.bool_}
# Each alone is refused by every checkpoint.
BEYOND: dict[str, st.SearchStrategy[Any]] = {
    "num_beams": st.integers(-(2**31), 0) | st.integers(1000, 2**31 - 1),
    "max_new_tokens": st.integers(-(2**31), 0) | st.integers(POSITIONS, 2**31 - 1),
    "no_repeat_ngram_size": st.integers(-(2**31), -1),
    "length_penalty": st.sampled_from((float("nan"), float("inf"), float("-inf"))),
}
SHAPES = (
    (),
    (0,),
    (1,),
    (1, 0),
    (1, 2),
    (2, 1),
    (2, 2),
    (1, 1, 1),
    (1, -1),
    (-1,),
    (1, 2**31),
    (1, 2**62),
    (2**33, 2**33),
)
DATATYPES = ("BOOL", "UINT8", "INT8", "INT32", "INT64", "UINT64", "FP16", "FP32", "FP64", "BF16", "BYTES", "", "TEXT")
NAMES = ("image", "prompt", *ALLOWED)
DAMAGES = st.one_of(
    st.tuples(st.just("datatype"), st.sampled_from(DATATYPES)),
    st.tuples(st.just("shape"), st.sampled_from(SHAPES)),
    st.tuples(st.just("data"), st.binary(max_size=20)),
    st.tuples(st.just("name"), st.sampled_from(("", "image", "x", "NUM_BEAMS", "pixels")) | st.text(max_size=8)),
    st.tuples(st.sampled_from(("missing", "twice", "batch of 2")), st.none()),
)

TOKENS = (
    *TASKS,
    "<image>",
    "<s>",
    "</s>",
    "<pad>",
    "<mask>",
    "<unk>",
    "<loc_0>",
    "<loc_999>",
    "<loc_99999>",
    "<od>",
    "<",
    ">",
)
WORDS = (
    st.sampled_from(TOKENS)
    | st.text(max_size=20)
    | st.sampled_from(("{input}", "%s", "\0", "\x1b[2J", "‮", "\r\n", " "))
)
PROMPTS = st.one_of(
    st.lists(WORDS, max_size=8).map(lambda words: "".join(words).encode("utf-8", "surrogatepass")),
    st.sampled_from(tuple(TASKS)).flatmap(lambda task: st.text(max_size=60).map(lambda rest: (task + rest).encode())),
    st.sampled_from(tuple(TASKS)).flatmap(lambda task: st.binary(max_size=30).map(lambda rest: task.encode() + rest)),
    st.sampled_from((b"", b" ", b"\0", b"\xff\xfe", b"\xed\xa0\x80", b"<OD" * 99, b"<OD>" * 99, b"\xef\xbb\xbf<OD>")),
    st.lists(st.integers(-5, 2000), max_size=9)
    .map(lambda bins: "<REGION_TO_OCR>" + "".join(f"<loc_{n}>" for n in bins))
    .map(str.encode),
)
_AFTER = {Takes.NOTHING: "", Takes.TEXT: "a star", Takes.REGION: "<loc_1><loc_2><loc_500><loc_600>"}
GOOD_PROMPTS = tuple((task.token + _AFTER[task.takes]).encode() for task in TASKS.values())
OUTPUTS = ("answer", "text", "token_ids", "token_logprobs", "sequence_score", "finish_reason")
WANTED = st.lists(
    st.sampled_from((*OUTPUTS, *OUTPUTS, "pixels", "image_features", "", "ANSWER")) | st.text(max_size=5), max_size=8
)
TIMES = st.one_of(
    st.integers(0, 50_000),
    st.sampled_from((0, 1, -1, 2**31, 2**63 - 1, -(2**63), "1", "", "a", True, 0.5, float("nan"))),
)


def asked(prompt: bytes = b"<CAPTION>", image: bytes | None = None, **given: Any) -> Request:
    """Of the ensemble: cheap to answer, unless `given` say otherwise."""
    settings = {"num_beams": 1, "max_new_tokens": 1} | given
    picture = small_png() if image is None else image
    return Request((text("image", picture), text("prompt", prompt), *_values(settings)))


def _values(settings: dict[str, Any]) -> list[Tensor]:
    return [array(name, np.array([[value]], ALLOWED[name][0])) for name, value in settings.items()]


def sent(rng: Random, request: Request, **rest: Any) -> Input:
    return rng.choice((http, grpc))(request, **rest)


_allowed = drawing(st.fixed_dictionaries({name: st.none() | one for name, (_, one) in ALLOWED.items()}))
_odd_setting = drawing(st.one_of([st.tuples(st.just(name), values) for name, values in ODD.items()]))
some_damage, some_prompt, some_outputs, some_time = drawing(DAMAGES), drawing(PROMPTS), drawing(WANTED), drawing(TIMES)
beyond = drawing(st.one_of([st.tuples(st.just(name), values) for name, values in BEYOND.items()]))


def allowed_settings(rng: Random) -> dict[str, Any]:
    return {name: value for name, value in _allowed(rng).items() if value is not None}


def any_settings(rng: Random) -> dict[str, Any]:
    return allowed_settings(rng) | (dict([_odd_setting(rng)]) if rng.random() < 0.5 else {})


def setting(rng: Random) -> Input:
    return sent(rng, asked(**any_settings(rng)))


def setting_beyond(rng: Random) -> Input:
    name, value = beyond(rng)
    return sent(rng, asked(**allowed_settings(rng) | {name: value}))


def setting_damaged(rng: Random) -> Input:
    request = asked(**allowed_settings(rng))
    for _ in range(rng.randint(1, 2)):
        request = damaged(request, rng.choice(request.tensors), *some_damage(rng))
    return sent(rng, request)


def damaged(request: Request, tensor: Tensor, what: str, value: Any) -> Request:
    if what == "shape" and not tensor.data and overflows(value):
        # Of a kind of its own: direct_overflowing.
        return request
    if what in ("datatype", "shape", "data", "name"):
        rest = request.without(tensor.name)
        return replace(rest, tensors=(replace(tensor, **{what: value}), *rest.tensors))
    if what == "missing":
        return request.without(tensor.name)
    if what == "twice":
        return replace(request, tensors=(*request.tensors, tensor))
    twice = tuple(replace(one, shape=(2, *one.shape[1:]), data=one.data * 2) for one in request.tensors)
    return replace(request, tensors=twice)


def overflows(shape: tuple[int, ...]) -> bool:
    """Whether its bytes are counted as none in 64 bits."""
    return bool(shape) and 0 not in shape and 4 * math.prod(shape) % 2**64 == 0


def direct_overflowing(rng: Random) -> Input:
    """Without a byte, and of a shape whose bytes are counted as none in 64 bits."""
    features = _noise(rng, "image_features", (IMAGE_TOKENS, D_MODEL), np.float32)
    return sent(rng, Request((features, Tensor("input_ids", "INT64", (1, 2**62), b"")), "beam_search"))


def classified(rng: Random) -> Input:
    """The highest of an output of strings."""
    request = asked()
    if rng.random() < 0.5:
        message = messages.grpc_message(request)
        message.outputs.add(name="text").parameters["classification"].int64_param = rng.choice((1, 5))
        return Input("grpc", message.SerializeToString(deterministic=True))
    start, tail = messages.http_body(request)
    output = {"name": "text", "parameters": {"classification": rng.choice((1, 5)), "binary_data": True}}
    start = json.dumps({**json.loads(start), "outputs": [output]}).encode()
    length = f"Inference-Header-Content-Length: {len(start)}"
    return Input("http", messages.post(messages.infer_path(request), start + tail, length))


def task_or_prompt(rng: Random) -> bytes:
    return rng.choice((rng.choice(GOOD_PROMPTS), some_prompt(rng)))


def prompt(rng: Random) -> Input:
    return sent(rng, asked(some_prompt(rng)))


def long_prompt(rng: Random, size: int) -> bytes:
    """None that shrinks to a task."""
    word = rng.choice((b"a green car ", b"<loc_1>", b"<OD>", b"a", b"\xf0\x9f\x98\x80", b"\0", b" "))
    starts = (
        (b"<OPEN_VOCABULARY_DETECTION>",)
        if word in (b"<OD>", b" ")
        else (b"<OPEN_VOCABULARY_DETECTION>", b"<OD>", b"", b"<")
    )
    start = rng.choice(starts)
    return start + word * (size // len(word))


def outputs(rng: Random) -> Input:
    return sent(rng, replace(asked(), outputs=some_outputs(rng)))


def time(rng: Random) -> Input:
    return sent(rng, replace(asked(), parameters={rng.choice(("timeout", "timeout", "priority")): some_time(rng)}))


def strings(rng: Random) -> Input:
    """Tensors of strings whose lengths don't agree with what there is."""
    value = rng.choice((b"<OD>", small_png(), b""))
    name = rng.choice(("image", "prompt"))
    length = rng.choice((0, 1, len(value) + 1, 2**31 - 1, 2**31, 2**32 - 1)).to_bytes(4, "little")
    data = rng.choice((b"", b"\0\0", length, length + value, prefixed(value) * 2, prefixed(value) + b"\1", value))
    return sent(rng, asked().having(Tensor(name, "BYTES", (1, rng.choice((1, 1, 1, 2))), data)))


def direct_preprocess(rng: Random) -> Input:
    tensors = [text("image", rng.choice((any_picture, mutated, in_base64))(rng)), text("prompt", task_or_prompt(rng))]
    return _direct(rng, "preprocess", tensors)


def direct_vision_encoder(rng: Random) -> Input:
    sides = (0, 1, 2, 31, SIDE - 1, SIDE + 1, 128, 384)
    shape = rng.choice(
        ((SIDE, SIDE, 3), (SIDE, SIDE, 3), (rng.choice(sides), rng.choice(sides), 3), (SIDE, SIDE, rng.randint(0, 4)))
    )
    return _direct(rng, "vision_encoder", [_noise(rng, "pixels", shape, np.uint8), *_arrival(rng)])


def direct_beam_search(rng: Random) -> Input:
    odd = ((0, D_MODEL), (1, D_MODEL), (300, D_MODEL), (IMAGE_TOKENS, 0), (7, 7), (600, D_MODEL))
    shape = rng.choice(odd) if rng.random() < 0.2 else (IMAGE_TOKENS, D_MODEL)
    features = _noise(rng, "image_features", shape, np.float32)
    ids = _integers(rng, "input_ids", rng.choice((0, 1, 5, 5, 20, 20, 100, 300, 367, 368, 5000)), VOCABULARY)
    settings = any_settings(rng)
    if rng.random() < 0.9:
        settings["max_new_tokens"] = rng.choice((1, 2, 5))
    return _direct(rng, "beam_search", [features, ids, *_arrival(rng), *_values(settings)])


def _arrival(rng: Random) -> list[Tensor]:
    """None, or one that no preprocess tells."""
    if rng.random() < 0.5:
        return []
    odd = (0, 1, -1, 10**9, 10**15, 2**62, 2**63 - 1, -(2**63), rng.randrange(2**63))
    return [array("arrival", np.array([[rng.choice(odd), rng.choice(odd)]]))]


def _rest(rng: Random) -> list[Tensor]:
    """What postprocess hands through."""
    score = rng.choice((0.0, -1.5, -1.5, 1e30, float("nan"), float("-inf")))
    reason = rng.choice((b"stop", b"stop", b"length", b"length", b"", b"\xff", b"stop" * 20_000))
    return [array("sequence_score", np.array([[score]], np.float32)), text("finish_reason", reason)]


def direct_postprocess(rng: Random, most: int = POSITIONS) -> Input:
    count = rng.randint(0, most)
    size = _integers(rng, "image_size", 2, 5000)
    short = rng.choice((max(0, count - 1),) * 4 + (0, count, count + 1))
    logprobs = _noise(rng, "token_logprobs", (short,), np.float32)
    if rng.random() < 0.8:
        logprobs = array("token_logprobs", -np.abs(np.frombuffer(logprobs.data, np.float32))[None])
    tensors = [text("prompt", task_or_prompt(rng)), size, _integers(rng, "token_ids", count, VOCABULARY), logprobs]
    return _direct(rng, "postprocess", [*tensors, *_rest(rng)])


def direct_answer_too_long(rng: Random) -> Input:
    """More tokens than a decoder has positions."""
    count = int(10 ** rng.uniform(4, 5.2))
    one = array("token_ids", np.full((1, count), rng.randrange(4, 300)))  # a piece of text
    ids = rng.choice((one, one, _integers(rng, "token_ids", count, VOCABULARY)))
    logprobs = array("token_logprobs", np.zeros((1, count - 1), np.float32))
    size = array("image_size", np.array([[100, 100]]))
    tensors = [text("prompt", rng.choice(GOOD_PROMPTS)), size, ids, logprobs, *_rest(rng)]
    return _direct(rng, "postprocess", tensors, 0)


def direct_of(rng: Random, size: int) -> Input:
    """Tensors of about `size` bytes."""
    side = int((size / 3) ** 0.5)
    made = {
        "preprocess": lambda: [text("image", megabytes(rng, size)), text("prompt", b"<OD>")],
        "vision_encoder": lambda: [_noise(rng, "pixels", (side, side, 3), np.uint8)],
        "beam_search": lambda: [
            _noise(rng, "image_features", (size // 512, D_MODEL), np.float32),
            _integers(rng, "input_ids", 5, VOCABULARY),
        ],
    }
    model = rng.choice(tuple(made))
    return _direct(rng, model, made[model](), 0)


def _direct(rng: Random, model: str, tensors: list[Tensor], damage: float = 0.2) -> Input:
    request = Request(tuple(tensors), model)
    if rng.random() < damage:
        request = damaged(request, rng.choice(request.tensors), *some_damage(rng))
    return sent(rng, request)


def megabytes(rng: Random, size: int) -> bytes:
    """Noise that repeats."""
    return (rng.randbytes(100_003) * (size // 100_003 + 1))[:size]


def _odd(rng: Random, below: int) -> int:
    return rng.choice((-1, 0, below, 2**31, 2**32 - 1, 2**63 - 1, -(2**63), rng.randrange(-below, 2 * below)))


def _integers(rng: Random, name: str, count: int, below: int) -> Tensor:
    """[1, count], in one of five some that are out of range."""
    values = _bulk(rng).integers(0, below, (1, count))
    if rng.random() < 0.2:
        for _ in range(min(count, rng.randint(1, 5))):
            values[0, rng.randrange(count)] = _odd(rng, below)
    return array(name, values)


def _bulk(rng: Random) -> np.random.Generator:
    return np.random.default_rng(rng.getrandbits(64))


def _noise(rng: Random, name: str, shape: tuple[int, ...], dtype: Any) -> Tensor:
    """Any bytes, among them NaN for floats; or one value, or a few odd ones among usual ones."""
    noise = _bulk(rng)
    if dtype is np.uint8:
        return array(name, noise.integers(0, 256, (1, *shape), np.uint8))
    if rng.random() < 0.1:
        return array(name, np.frombuffer(noise.bytes(4 * int(np.prod(shape))), np.float32).reshape(1, *shape))
    values = noise.standard_normal((1, *shape), np.float32)
    if rng.random() < 0.1 and values.size:
        values.flat[rng.randrange(values.size)] = rng.choice((np.nan, np.inf, -np.inf, 3e38, -3e38, 1e-45))
    with np.errstate(all="ignore"):
        return array(name, values if rng.random() < 0.9 else values * np.float32(1e10))
