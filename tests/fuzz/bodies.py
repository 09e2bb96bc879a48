"""What is no proper request: HTTP and protobuf messages that are cut, framed wrongly, packed, or dropped halfway."""

import functools
import gzip
import json
import struct
import zlib
from base64 import b64encode
from dataclasses import replace
from random import Random
from typing import Any

from fuzz import messages
from fuzz.asked import asked, some_prompt
from fuzz.messages import Input, head, http, http_body, infer_path, post
from fuzz.pictures import mutated, small_png

INFER, GENERATE = "/v2/models/florence2/infer", "/v2/models/florence2/generate"
VALUES: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    2**31,
    2**63,
    2**64,
    1e400,
    0.5,
    "",
    "a",
    [],
    {},
    [[]],
    [None],
    {"a": 1},
    "\0",
    "\ud800",
)


def _wholly(rng: Random) -> dict[str, Any]:
    """A request in JSON alone."""
    picture = b64encode(rng.choice((small_png(), mutated(rng)))).decode()
    text = some_prompt(rng).decode("utf-8", "replace")
    inputs = [
        ("image", "BYTES", picture),
        ("prompt", "BYTES", text),
        ("num_beams", "INT32", 1),
        ("max_new_tokens", "INT32", 1),
    ]
    return {
        "id": "one",
        "inputs": [{"name": n, "datatype": kind, "shape": [1, 1], "data": [value]} for n, kind, value in inputs],
    }


def _changed(rng: Random, document: Any) -> Any:
    """One value somewhere replaced, left out or doubled."""
    if not isinstance(document, dict | list) or not document or rng.random() < 0.2:
        return rng.choice(VALUES)
    document = document.copy()
    key = rng.choice(list(document)) if isinstance(document, dict) else rng.randrange(len(document))
    if rng.random() < 0.1:
        del document[key]
    elif rng.random() < 0.1 and isinstance(document, dict):
        document["x" * rng.randint(0, 99)] = document[key]
    else:
        document[key] = _changed(rng, document[key])
    return document


def json_values(rng: Random) -> Input:
    document = _wholly(rng)
    for _ in range(rng.randint(0, 3)):
        document = _changed(rng, document)
    return Input("http", post(INFER, json.dumps(_small(document)).encode()))


def _small(document: Any, below_shape: bool = False) -> Any:
    """Without sizes in shapes over a thousand: Triton (24.10) takes the memory before it looks for the data."""
    if isinstance(document, dict):
        return {key: _small(value, below_shape or key == "shape") for key, value in document.items()}
    if isinstance(document, list):
        return [_small(one, below_shape) for one in document]
    return min(document, 1000) if below_shape and isinstance(document, int | float) else document


def json_damaged(rng: Random) -> Input:
    body = bytearray(json.dumps(_wholly(rng)).encode())
    for _ in range(rng.randint(1, 4)):
        body[rng.randrange(len(body))] = rng.choice(b'{}[]":,\\ntfu09-.eE \0\x80')
    return Input("http", post(INFER, mutated(rng, body) if rng.random() < 0.2 else bytes(body)))


def json_nested(rng: Random, least: float, most: float) -> Input:
    """10 to the power of `least` to `most` deep: parsers that call themselves run out of stack."""
    depth = int(10 ** rng.uniform(least, most))
    start, end = rng.choice((("[", "]"), ('{"a":', "}")))
    nested = start * depth + "1" + (end * depth if rng.random() < 0.8 else "")
    documents = (
        nested,
        f'{{"inputs": {nested}}}',
        f'{{"inputs": [], "parameters": {{"a": {nested}}}}}',
        f'{{"inputs": [{{"name": "image", "datatype": "BYTES", "shape": [1, 1], "data": {nested}}}]}}',
        f'{{"image": {nested}, "prompt": "<OD>"}}',
    )
    return Input("http", post(rng.choice((INFER, INFER, GENERATE)), rng.choice(documents).encode()))


def binary_lengths(rng: Random) -> Input:
    """Of the JSON before the tensors, and of each tensor."""
    request = asked()
    start, tail = http_body(request)
    document = head(request)
    for tensor in document["inputs"]:
        if rng.random() < 0.4:
            size = tensor["parameters"]["binary_data_size"]
            tensor["parameters"]["binary_data_size"] = rng.choice(
                (0, size - 1, size + 1, -1, 2**31, 2**63, 2**64 - 1, None, "9")
            )
    start = json.dumps(document).encode() if rng.random() < 0.6 else start
    lengths = (
        len(start),
        len(start),
        len(start),
        0,
        len(start) - 1,
        len(start) + 1,
        len(start + tail),
        10**6,
        -1,
        2**31,
        2**64,
        "",
        "a",
        "9 9",
    )
    return Input(
        "http", post(infer_path(request), start + tail, f"Inference-Header-Content-Length: {rng.choice(lengths)}")
    )


def framing(rng: Random) -> Input:
    """Lengths of the whole that are wrong, lines that are no HTTP, bodies that end too early."""
    whole = http(asked()).data
    lines, body = whole.split(b"\r\n\r\n", 1)
    length = b"Content-Length: %d" % len(body)
    lengths = (0, len(body) // 2, len(body) - 1, len(body) + 1, 2 * len(body), -1, 2**31, 2**63, 2**64, 10**30)
    chunked = lines.replace(length, b"Transfer-Encoding: chunked") + b"\r\n\r\n"
    sizes = (b"%x" % len(body), b"0", b"-1", b"ffffffffffffffff", b"7fffffffffffffff", b"x", b"%x;a=b" % len(body), b"")
    starts = (b"POST", b"post", b"GET", b"HEAD", b"PUT", b"TRACE", b"CONNECT", b"OPTIONS", b"", b"\0", b"A" * 70_000)
    made = rng.choice(
        (
            lines.replace(length, b"Content-Length: %d" % rng.choice(lengths)) + b"\r\n\r\n" + body,
            lines.replace(length, length + b"\r\nContent-Length: %d" % rng.choice(lengths)) + b"\r\n\r\n" + body,
            lines.replace(length, b"X: 1") + b"\r\n\r\n" + body,
            chunked + rng.choice(sizes) + b"\r\n" + body + rng.choice((b"\r\n0\r\n\r\n", b"", b"\r\n")),
            chunked + b"".join(b"1\r\n%c\r\n" % byte for byte in body[:3000]) + b"0\r\n\r\n",
            whole[: rng.randrange(len(whole))],
            mutated(rng, lines) + b"\r\n\r\n" + body,
            rng.choice(starts) + whole[4:],
            whole.replace(
                b"HTTP/1.1", rng.choice((b"HTTP/0.9", b"HTTP/1.0", b"HTTP/2.0", b"HTTP/9999999999.1", b"")), 1
            ),
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + rng.randbytes(99),
            rng.randbytes(rng.randint(1, 5000)),
        )
    )
    return Input("http", made, may_close=True, half=True)


def chunked_much(rng: Random) -> Input:
    """In 300,000 to a million chunks of a byte."""
    head = f"POST {INFER} HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n"
    return Input("http", head.encode() + b"1\r\nA\r\n" * rng.randint(300_000, 1_000_000) + b"0\r\n\r\n", may_close=True)


def paths(rng: Random) -> Input:
    """What can only be read, and what there is not."""
    names = (
        "florence2",
        "preprocess",
        "beam_search",
        "",
        "..",
        "%00",
        "%2e%2e%2f",
        "a" * 5000,
        "florence2/versions/99",
        "*",
    )
    of_models = ("", "config", "stats", "ready", "infer", "x", "versions/1/ready")
    others = ("", "health/live", "health/ready", "x", "models", "models/stats", "../..", "models/../health")
    path = rng.choice(
        (
            f"/v2/models/{rng.choice(names)}/{rng.choice(of_models)}",
            f"/v2/{rng.choice(others)}",
            "/" + rng.randbytes(rng.randint(0, 30)).hex() * rng.randint(1, 200),
            f"http://127.0.0.1/v2?{'a=b&' * rng.randint(0, 999)}",
        )
    )
    method = rng.choice(("GET", "GET", "GET", "POST", "HEAD", "DELETE"))
    return Input(
        "http", f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 0\r\n\r\n".encode(), may_close=True
    )


def headers(rng: Random) -> Input:
    count = int(10 ** rng.uniform(0, 3.8))
    odd = (
        *(f"X-{number}: {number}" for number in range(count)),
        "A" * rng.choice((1, 1000, 100_000)) + ": b",
        "X: " + "b" * int(10 ** rng.uniform(0, 6)),
        rng.choice(
            (
                "X:",
                ": x",
                "X: \0",
                "X\t: x",
                " folded",
                "X: \udcff",
                "Expect: 100-continue",
                "Upgrade: h2c",
                "Connection: close",
            )
        ),
    )
    chosen = odd[:count] if rng.random() < 0.5 else rng.sample(odd, min(3, len(odd)))
    start, tail = http_body(asked())
    made = post(INFER, start + tail, f"Inference-Header-Content-Length: {len(start)}", *chosen)
    return Input("http", made, may_close=True)


def pipelined(rng: Random) -> Input:
    count = rng.randint(2, 20)
    return Input("http", b"".join(http(asked()).data for _ in range(count)), 120, answers=count, may_close=True)


def generate(rng: Random) -> Input:
    picture = b64encode(rng.choice((small_png(), mutated(rng)))).decode()
    document: Any = {
        "image": picture,
        "prompt": some_prompt(rng).decode("utf-8", "replace"),
        "num_beams": 1,
        "max_new_tokens": 1,
    }
    for _ in range(rng.randint(0, 2)):
        document = _changed(rng, document)
    path = rng.choice((GENERATE, GENERATE, f"{GENERATE}_stream", GENERATE.replace("florence2", "preprocess")))
    body = json.dumps(document).encode()
    return Input("http", post(path, mutated(rng, body) if rng.random() < 0.2 else body))


def packed(rng: Random) -> Input:
    start, tail = http_body(asked())
    whole = gzip.compress(start + tail, mtime=0) if rng.random() < 0.5 else zlib.compress(start + tail)
    body = rng.choice((whole, whole, mutated(rng, whole), whole[: rng.randrange(len(whole))], start + tail))
    encoding = rng.choice(("gzip", "gzip", "deflate", "deflate", "br", "gzip, gzip", "identity", "", "x"))
    rest = (f"Content-Encoding: {encoding}", f"Accept-Encoding: {encoding}")[: rng.randint(1, 2)]
    return Input("http", post(INFER, body, f"Inference-Header-Content-Length: {len(start)}", *rest))


def packed_much(rng: Random) -> Input:
    """100 to 200 MB in a thousandth of that."""
    block, count = rng.choice((b"\0", b" ")) * (1 << 20), rng.randint(100, 200)
    packer = zlib.compressobj(1, wbits=-15)
    # Blocks that start anew are made once.
    blocks = (packer.compress(block) + packer.flush(zlib.Z_FULL_FLUSH)) * count + packer.flush()
    total = functools.reduce(lambda found, _: zlib.crc32(block, found), range(count), 0)
    body = gzip.compress(b"", mtime=0)[:10] + blocks + struct.pack("<II", total, count << 20)
    return Input("http", post(rng.choice((INFER, GENERATE)), body, "Content-Encoding: gzip"))


def dropped(rng: Random) -> Input:
    """A request that is whole or cut, and a sender who goes away."""
    whole = http(asked(max_new_tokens=rng.choice((1, 20)))).data
    data = whole if rng.random() < 0.7 else whole[: rng.randrange(1, len(whole))]
    return Input("http", data, leave=(rng.choice(("close", "reset")), 10 ** rng.uniform(-6, -0.3)))


def protobuf_damaged(rng: Random) -> Input:
    whole = messages.grpc(asked()).data
    return Input("grpc", rng.choice((mutated(rng, whole), mutated(rng, whole), rng.randbytes(rng.randint(0, 500)))))


def protobuf_contents(rng: Random) -> Input:
    """Typed contents beside raw ones, more or fewer raw ones than inputs."""
    message = messages.grpc_message(asked())
    for _ in range(rng.randint(1, 3)):
        one = rng.choice(message.inputs) if message.inputs else message.inputs.add()
        change = rng.randrange(8)
        if change == 0:
            one.contents.int_contents.extend([1] * rng.choice((1, 2, 1000)))
        elif change == 1:
            one.contents.bytes_contents.extend([b"<OD>"] * rng.choice((1, 2, 1000)))
        elif change == 2:
            del message.raw_input_contents[rng.randint(0, 4) :]
        elif change == 3:
            message.raw_input_contents.append(b"")
        elif change == 4:
            message.inputs.append(one)
        elif change == 5:
            one.parameters["shared_memory_region"].string_param = rng.choice(("", "x"))
        elif change == 6:
            message.outputs.add(name="token_ids").parameters["classification"].int64_param = rng.choice((1, -1, 2**62))
        else:
            message.model_name, message.model_version = rng.choice(
                (("", ""), ("florence2", "-1"), ("florence2", "99"), ("x" * 9999, "1"))
            )
    return Input("grpc", message.SerializeToString(deterministic=True))


def cancelled(rng: Random, least: float, most: float) -> Input:
    """After 10 ** `least` to 10 ** `most` seconds."""
    made = messages.grpc(asked(max_new_tokens=rng.choice((1, 20, 200)), num_beams=rng.choice((1, 3))))
    return replace(made, leave=(rng.choice(("cancel", "deadline")), 10 ** rng.uniform(least, most)))
