"""The kinds of inputs, and any of them again from its kind, seed and number."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from random import Random

from fuzz import asked, bodies, pictures
from fuzz.messages import Input


@dataclass(frozen=True)
class Kind:
    make: Callable[[Random], Input]
    weight: float
    """Inputs in a thousand, about."""
    over_limit: bool = False
    """More than is allowed, which can be told from its size: must be refused, and soon."""
    group: str = "inputs"
    """Kinds of another than this one have runs of their own."""
    ends: str = ""
    """The process that an input may end, by a fault that is none of ours."""


def _picture(make: Callable[[Random], bytes]) -> Callable[[Random], Input]:
    return lambda rng: asked.sent(rng, asked.asked(image=make(rng)))


def _prompt(least: int, most: int) -> Callable[[Random], Input]:
    return lambda rng: asked.sent(rng, asked.asked(asked.long_prompt(rng, rng.randint(least, most))))


def _direct(least: int, most: int) -> Callable[[Random], Input]:
    return lambda rng: asked.direct_of(rng, rng.randint(least, most))


MB = 10**6
KINDS: dict[str, Kind] = {
    "setting": Kind(asked.setting, 80),
    "setting_beyond": Kind(asked.setting_beyond, 40, over_limit=True),
    "setting_damaged": Kind(asked.setting_damaged, 80),
    "prompt": Kind(asked.prompt, 80),
    "prompt_of_100_kB": Kind(_prompt(20_000, 200_000), 3, over_limit=True),
    "prompt_of_MB": Kind(_prompt(MB, 6 * MB), 0.5, over_limit=True),
    "outputs": Kind(asked.outputs, 30),
    "time": Kind(asked.time, 30),
    "strings": Kind(asked.strings, 30),
    "picture": Kind(_picture(pictures.any_picture), 40),
    "picture_mutated": Kind(_picture(pictures.mutated), 120),
    "png_mutated": Kind(_picture(pictures.png_mutated), 40),
    "base64": Kind(_picture(pictures.in_base64), 50),
    "too_many_pixels": Kind(_picture(pictures.too_many_pixels), 20, over_limit=True),
    "many_pixels": Kind(_picture(pictures.many_pixels), 0.7),
    "many_frames": Kind(_picture(pictures.many_frames), 5),
    "much_metadata": Kind(_picture(pictures.much_metadata), 5),
    "picture_of_MB": Kind(
        _picture(lambda rng: asked.megabytes(rng, rng.randint(51 * MB, 60 * MB))), 0.3, over_limit=True
    ),
    "json_values": Kind(bodies.json_values, 50),
    "json_damaged": Kind(bodies.json_damaged, 30),
    "json_nested": Kind(partial(bodies.json_nested, least=1.5, most=4), 3),
    "binary_lengths": Kind(bodies.binary_lengths, 40),
    "framing": Kind(bodies.framing, 40),
    "paths": Kind(bodies.paths, 20),
    "headers": Kind(bodies.headers, 10),
    "pipelined": Kind(bodies.pipelined, 5),
    "generate": Kind(bodies.generate, 30),
    "packed": Kind(bodies.packed, 20),
    "dropped": Kind(bodies.dropped, 30),
    "protobuf_damaged": Kind(bodies.protobuf_damaged, 30),
    "protobuf_contents": Kind(bodies.protobuf_contents, 30),
    "cancelled_late": Kind(partial(bodies.cancelled, least=-1, most=0), 10),
    "direct_preprocess": Kind(asked.direct_preprocess, 30),
    "direct_vision_encoder": Kind(asked.direct_vision_encoder, 30),
    "direct_beam_search": Kind(asked.direct_beam_search, 30),
    "direct_postprocess": Kind(asked.direct_postprocess, 40),
    "direct_answer_too_long": Kind(asked.direct_answer_too_long, 0.5, over_limit=True),
    "direct_of_MB": Kind(_direct(MB, 5 * MB), 2, over_limit=True),
    "direct_of_60_MB": Kind(_direct(55 * MB, 62 * MB), 0.2, over_limit=True),
    # Triton before 24.12 crashes of early ones (triton-inference-server/server#7840).
    "cancelled_early": Kind(partial(bodies.cancelled, least=-5, most=-1.3), 1000, group="cancels", ends="tritonserver"),
    # Triton's parser calls itself for each level (triton-inference-server/common#156, merged in April 2026).
    "json_nested_deep": Kind(partial(bodies.json_nested, least=5.3, most=6), 1, group="crashes", ends="tritonserver"),
    # Before 25.07 Triton takes stack for each chunk (CVE-2025-23310).
    "chunked_much": Kind(bodies.chunked_much, 1, group="crashes", ends="tritonserver"),
    # Triton (24.10) unpacks all that there is.
    "packed_much": Kind(bodies.packed_much, 1, group="crashes", ends="tritonserver"),
    # Triton (24.10) takes strings for numbers.
    "classified": Kind(asked.classified, 1, group="crashes", ends="tritonserver"),
    # Triton (24.10) counts bytes in 64 bits; its python backend ends the process over what NumPy says.
    "direct_overflowing": Kind(asked.direct_overflowing, 1, group="crashes", ends="beam_search"),
}


def make(kind: str, seed: int, number: int) -> Input:
    return KINDS[kind].make(Random(f"{kind} {seed} {number}"))


def chosen(patterns: str, group: str) -> list[str]:
    """Names of the group's kinds that match one of the patterns, which commas separate; with a minus before it, a
    pattern leaves out. ValueError for one that matches nothing."""
    wanted = patterns.split(",")
    for pattern in wanted:
        if not any(fnmatch(name, pattern.removeprefix("-")) for name in KINDS):
            raise ValueError(f"no kind is called {pattern}; there are {', '.join(KINDS)}")
    left_out = [pattern[1:] for pattern in wanted if pattern.startswith("-")]
    taken = [pattern for pattern in wanted if not pattern.startswith("-")] or ["*"]
    return [
        name
        for name, kind in KINDS.items()
        if kind.group == group
        and any(fnmatch(name, one) for one in taken)
        and not any(fnmatch(name, one) for one in left_out)
    ]


def schedule(names: Sequence[str], seed: int, inputs: int) -> list[tuple[str, int]]:
    """Kinds and numbers, mixed; every kind at least once."""
    whole = sum(KINDS[name].weight for name in names)
    counts = {name: max(1, round(inputs * KINDS[name].weight / whole)) for name in names}
    order = [(name, number) for name, count in counts.items() for number in range(count)]
    Random(seed).shuffle(order)
    return order
