"""What may stand in the fields of a checkpoint's and an export's JSON files, as one table, and its check.

No bound is a property of Florence-2: each leaves generous room over Florence-2-large, whose value stands beside it, and
keeps out what would take minutes or gigabytes. Types are as transformers' strict configs have them: neither true nor
3.0 is a whole number.
"""

import json
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol


class Rule(Protocol):
    """What a value may be; its text is what an error says to give."""

    def allows(self, value: Any) -> bool: ...


@dataclass(frozen=True)
class Whole:
    low: int
    high: int

    def allows(self, value: Any) -> bool:
        return type(value) is int and self.low <= value <= self.high

    def __str__(self) -> str:
        return f"a whole number from {self.low} to {self.high}"


@dataclass(frozen=True)
class Number:
    low: float
    high: float

    def allows(self, value: Any) -> bool:
        # NaN is neither above nor below anything.
        return type(value) in (int, float) and self.low <= value <= self.high

    def __str__(self) -> str:
        return f"a number from {self.low:g} to {self.high:g}"


@dataclass(frozen=True)
class Choice:
    values: tuple[Any, ...]

    def allows(self, value: Any) -> bool:
        return any(type(value) is type(one) and value == one for one in self.values)

    def __str__(self) -> str:
        return " or ".join(json.dumps(one) for one in self.values)


@dataclass(frozen=True)
class Text:
    longest: int = 1000
    """Characters."""

    def allows(self, value: Any) -> bool:
        return isinstance(value, str) and len(value) <= self.longest

    def __str__(self) -> str:
        return f"text of at most {self.longest} characters"


@dataclass(frozen=True)
class Items:
    each: Rule
    fewest: int
    most: int

    def allows(self, value: Any) -> bool:
        return isinstance(value, list) and self.fewest <= len(value) <= self.most and all(map(self.each.allows, value))

    def __str__(self) -> str:
        count = self.most if self.fewest == self.most else f"{self.fewest} to {self.most}"
        return f"a list of {count}, each {self.each}"


@dataclass(frozen=True)
class Object:
    """Keys are text as `each` allows it, values are as `each` allows them."""

    each: Rule | None = None

    def allows(self, value: Any) -> bool:
        return isinstance(value, dict) and (self.each is None or all(map(self.each.allows, (*value, *value.values()))))

    def __str__(self) -> str:
        return "an object" + (f" of {self.each}" if self.each else "")


@dataclass(frozen=True)
class Either:
    one: Rule
    other: Rule

    def allows(self, value: Any) -> bool:
        return self.one.allows(value) or self.other.allows(value)

    def __str__(self) -> str:
        return f"{self.one}, or {self.other}"


SWITCH = Choice((True, False))
SIDE = Whole(1, 4096)  # 768
LAYERS = Whole(1, 100)  # 12
WIDTH = Whole(1, 16384)  # 1024; of the feed-forward layers 4096
HEADS = Whole(1, 256)  # 16 in the language model, 64 in the last stage of the vision tower
VOCABULARY = Whole(1, 10**6)  # 51289
POSITIONS = Whole(1, 16384)  # 1024
IMAGE_TOKENS = Whole(1, 4096)  # 577
MAP_VALUES = Whole(1, 2**26)
"""Height x width x channels of a stage of the vision tower; 192 x 192 x 256 = 9.4 million."""
TOKEN = Whole(0, VOCABULARY.high - 1)
_ONE_OR_MORE = Either(TOKEN, Items(TOKEN, 1, VOCABULARY.high))
_SHARE = Number(0, 1)
_STAGES = 8  # 4

TOKEN_FIELDS: dict[str, Rule] = {
    **dict.fromkeys(("bos_token_id", "pad_token_id", "decoder_start_token_id", "forced_bos_token_id"), TOKEN),
    **dict.fromkeys(("eos_token_id", "forced_eos_token_id"), _ONE_OR_MORE),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens"), Items(TOKEN, 0, 10**4)),
}

GENERATION: dict[str, Rule] = {
    **TOKEN_FIELDS,
    "num_beams": Whole(1, 64),  # 3
    "max_length": Whole(2, POSITIONS.high),
    "max_new_tokens": Whole(1, POSITIONS.high),
    "no_repeat_ngram_size": Whole(0, POSITIONS.high),  # 3
    "length_penalty": Number(-100, 100),  # 1
    "early_stopping": Choice((True, False, "never")),
    "do_sample": SWITCH,
}
"""generation_config.json; what `florence2.generation.settings` reads beside it may be nothing but neutral."""

_TEXT_CONFIG: dict[str, Rule] = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    **dict.fromkeys(("encoder_layers", "decoder_layers"), LAYERS),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), HEADS),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), WIDTH),
    "max_position_embeddings": POSITIONS,
    "activation_function": Text(),
    **dict.fromkeys(("scale_embedding", "use_cache", "tie_word_embeddings"), SWITCH),
    **dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), _SHARE),
    **dict.fromkeys(("encoder_layerdrop", "decoder_layerdrop"), _SHARE),
    "init_std": Number(0, 100),
}

_VISION_CONFIG: dict[str, Rule] = {
    "in_channels": Whole(3, 3),
    "depths": Items(LAYERS, 1, _STAGES),  # 1, 1, 9, 1
    "patch_size": Items(Whole(1, 64), 1, _STAGES),  # 7, 3, 3, 3
    "patch_stride": Items(Whole(1, 64), 1, _STAGES),  # 4, 2, 2, 2
    "patch_padding": Items(Whole(0, 64), 1, _STAGES),  # 3, 1, 1, 1
    "patch_prenorm": Items(SWITCH, 1, _STAGES),
    **dict.fromkeys(("embed_dim", "dim_embed"), Items(WIDTH, 1, _STAGES)),  # 256, 512, 1024, 2048
    "num_heads": Items(HEADS, 1, _STAGES),
    "num_groups": Items(HEADS, 1, _STAGES),
    # Maps are padded to whole windows, and in a window every place attends to every other.
    "window_size": Whole(1, 32),  # 12
    "drop_path_rate": _SHARE,
    "mlp_ratio": Number(0.01, 16),  # 4
    "qkv_bias": SWITCH,
    "activation_function": Text(),
    "projection_dim": WIDTH,
    **dict.fromkeys(("max_position_embeddings", "max_pos_embeddings"), Whole(1, 1024)),  # 50
    "image_pos_embed.max_pos_embeddings": Whole(1, 1024),
    **dict.fromkeys(("max_temporal_embeddings", "visual_temporal_embedding.max_temporal_embeddings"), Whole(1, 1024)),
    "initializer_range": Number(0, 100),
}

CONFIG: dict[str, Rule] = {
    "architectures": Items(Text(), 0, 16),
    "tie_word_embeddings": SWITCH,
    **GENERATION,
    **{f"text_config.{name}": rule for name, rule in (GENERATION | _TEXT_CONFIG).items()},
    **{f"vision_config.{name}": rule for name, rule in _VISION_CONFIG.items()},
}
"""config.json."""

PREPROCESSOR: dict[str, Rule] = {
    "size.height": SIDE,
    "size.width": SIDE,
    "resample": Whole(0, 5),
    "rescale_factor": Number(1e-6, 1),  # 1 / 255
    "image_mean": Items(Number(-1000, 1000), 3, 3),
    "image_std": Items(Number(1e-4, 1000), 3, 3),
    **dict.fromkeys(("do_resize", "do_rescale", "do_normalize", "do_pad", "do_center_crop", "do_convert_rgb"), SWITCH),
    "image_seq_length": IMAGE_TOKENS,
}
"""preprocessor_config.json, or processor_config.json's image_processor."""

PHRASES = Items(Text(), 0, 10**4)

SIZES: dict[str, Rule] = {
    "image_height": SIDE,
    "image_width": SIDE,
    "image_tokens": IMAGE_TOKENS,
    "d_model": WIDTH,
    "vocab_size": VOCABULARY,
    "decoder_layers": LAYERS,
    "decoder_attention_heads": HEADS,
    "head_dim": WIDTH,
    "max_position_embeddings": POSITIONS,
    "location_bins": Whole(1, VOCABULARY.high),  # 1000
}

MODEL_SETTINGS: dict[str, Rule] = {
    **{f"sizes.{name}": rule for name, rule in SIZES.items()},
    "banned_grounding_phrases": PHRASES,
}
"""model_settings.json."""

MANIFEST: dict[str, Rule] = {
    **MODEL_SETTINGS,
    **dict.fromkeys(("source", "sha256", "layout", "precision"), Text(10**4)),
    "revision": Text(),
    "repairs": Items(Text(10**5), 0, 10**4),
    "opset": Whole(1, 100),
    **dict.fromkeys(("tools", "files"), Object(Text())),
    "parity": Object(),
}
"""manifest.json."""


def check(content: Mapping[str, Any], rules: Mapping[str, Rule], where: str, required: Iterable[str] = ()) -> None:
    """Raises ValueError, in one line that begins with `where`, for the first field of a JSON object that is something
    else than its rule says. Names with dots are of objects inside it. Absent and null are the same, and allowed but
    for what is `required`."""
    for name, rule in rules.items():
        value = value_at(content, name, where)
        if value is None and name in required:
            raise ValueError(f"{where}{name} is missing; give {rule}")
        if value is not None and not rule.allows(value):
            raise ValueError(f"{where}{name} is {short(value)}; give {rule}")


def value_at(content: Mapping[str, Any], name: str, where: str) -> Any:
    """The value of a field, None if it or what holds it is absent. Raises ValueError if what holds it is no object."""
    value: Any = content
    steps = name.split(".")
    for index, step in enumerate(steps):
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise ValueError(f"{where}{'.'.join(steps[:index])} is {short(value)}; give an object")
        value = value.get(step)
    return value


def check_tokens(generation: Mapping[str, Any], vocab_size: int, where: str) -> None:
    """Raises ValueError, naming the field, for a token id beyond the vocabulary. The fields are of the right types."""
    for name in TOKEN_FIELDS:
        value = generation.get(name)
        for token in value if isinstance(value, list) else [] if value is None else [value]:
            if token >= vocab_size:
                raise ValueError(
                    f"{where}{name} is {short(value)}; give ids from 0 to {vocab_size - 1}, which the vocabulary has"
                )


def short(value: Any) -> str:
    """What a file holds, for an error's text: one line, not long, whatever it is."""
    return _SHORT.repr(value)


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxdict, _SHORT.maxstring, _SHORT.maxlong = 3, 8, 8, 80, 40
