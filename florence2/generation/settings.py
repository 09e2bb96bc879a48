"""How one request is decoded: the checkpoint's generation config, overridden by what the request says."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from florence2.errors import InvalidRequest
from florence2.fields import GENERATION, check

logger = logging.getLogger(__name__)

MAX_BEAMS = 8
DEFAULT_MAX_LENGTH = 1024


@dataclass(frozen=True)
class GenerationSettings:
    """The fields of HF's `GenerationConfig` that change what is generated; lengths in tokens."""

    decoder_start_token_id: int
    eos_token_id: int
    max_length: int
    """Decoder start included, as in HF; never more than the decoder has positions."""
    positions: int
    """How long an answer may be: what the decoder has positions for, or what the server allows."""
    max_beams: int = MAX_BEAMS
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | None = None
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    no_repeat_ngram_size: int = 0
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()

    @classmethod
    def from_config(cls, config: Mapping[str, Any], positions: int) -> "GenerationSettings":
        """A `generation_config.json` as a dict. Raises ValueError, by name, for what isn't implemented, and for a field
        that is of another kind or past the bounds of `florence2.fields`."""
        check_supported(config)
        check(config, GENERATION, "generation_config.json: ")
        given = {key: value for key, value in config.items() if value is not None}
        start = given.get("decoder_start_token_id", given.get("bos_token_id"))
        eos = _single(given.get("eos_token_id"))
        if start is None or eos is None:
            raise ValueError("generation_config.json: decoder_start_token_id and eos_token_id are needed")
        if "max_new_tokens" in given:
            max_length = given["max_new_tokens"] + 1
        else:
            max_length = given.get("max_length", DEFAULT_MAX_LENGTH)
        settings = cls(
            decoder_start_token_id=start,
            eos_token_id=eos,
            max_length=min(max_length, positions),
            positions=positions,
            forced_bos_token_id=given.get("forced_bos_token_id"),
            forced_eos_token_id=_single(given.get("forced_eos_token_id")),
            num_beams=given.get("num_beams", 1),
            length_penalty=float(given.get("length_penalty", 1.0)),
            early_stopping=given.get("early_stopping", False),
            no_repeat_ngram_size=given.get("no_repeat_ngram_size", 0),
            suppress_tokens=tuple(given.get("suppress_tokens", ())),
            begin_suppress_tokens=tuple(given.get("begin_suppress_tokens", ())),
        )
        try:
            return settings.override()
        except InvalidRequest as error:
            raise ValueError(f"generation_config.json: {error}") from None

    def within(self, max_beams: int, max_new_tokens: int) -> "GenerationSettings":
        """The same on a server that allows no more, neither to who asks for it nor to who says nothing;
        `max_new_tokens` 0 allows what there are positions for."""
        beams = min(self.max_beams, max_beams)
        positions = min(self.positions, max_new_tokens + 1) if max_new_tokens else self.positions
        return replace(
            self,
            max_beams=beams,
            positions=positions,
            num_beams=min(self.num_beams, beams),
            max_length=min(self.max_length, positions),
        )

    def override(
        self,
        *,
        num_beams: int | None = None,
        max_new_tokens: int | None = None,
        no_repeat_ngram_size: int | None = None,
        length_penalty: float | None = None,
        early_stopping: bool | str | None = None,
    ) -> "GenerationSettings":
        """The settings of a request that names some of its own. Raises InvalidRequest for one out of range."""
        changes: dict[str, Any] = {
            "num_beams": num_beams,
            "max_length": None if max_new_tokens is None else max_new_tokens + 1,
            "no_repeat_ngram_size": no_repeat_ngram_size,
            "length_penalty": length_penalty,
            "early_stopping": early_stopping,
        }
        settings = replace(self, **{key: value for key, value in changes.items() if value is not None})
        settings._check()
        return settings

    def _check(self) -> None:
        if not 1 <= self.num_beams <= self.max_beams:
            raise InvalidRequest(f"num_beams must be from 1 to {self.max_beams}, not {self.num_beams}")
        if not 2 <= self.max_length <= self.positions:
            raise InvalidRequest(
                f"max_new_tokens must be from 1 to {self.positions - 1} here, not {self.max_length - 1}"
            )
        if self.no_repeat_ngram_size < 0:
            raise InvalidRequest(f"no_repeat_ngram_size must be 0 or more, not {self.no_repeat_ngram_size}")
        if not math.isfinite(self.length_penalty):
            raise InvalidRequest(f"length_penalty must be a finite number, not {self.length_penalty}")
        if self.early_stopping not in (True, False, "never"):
            raise InvalidRequest(f'early_stopping must be true, false or "never", not {self.early_stopping!r}')


# Settings of HF's GenerationConfig that would change the answer and aren't implemented, with the values that
# change nothing. https://huggingface.co/docs/transformers/main_classes/text_generation
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "assistant_early_exit": (None,),
    "bad_words_ids": (None, []),
    "constraints": (None, []),
    "diversity_penalty": (None, 0.0),
    "dola_layers": (None,),
    "encoder_no_repeat_ngram_size": (None, 0),
    "encoder_repetition_penalty": (None, 1.0),
    "exponential_decay_length_penalty": (None,),
    "force_words_ids": (None, []),
    "forced_decoder_ids": (None, []),
    "guidance_scale": (None, 1.0),
    "max_time": (None,),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "num_beam_groups": (None, 1),
    "num_return_sequences": (None, 1),
    "penalty_alpha": (None, 0.0),
    "prompt_lookup_num_tokens": (None,),
    "remove_invalid_values": (None, False),
    "renormalize_logits": (None, False),
    "repetition_penalty": (None, 1.0),
    "sequence_bias": (None, {}, []),
    "stop_strings": (None, []),
    "token_healing": (None, False),
    "watermarking_config": (None,),
}


def check_supported(config: Mapping[str, Any]) -> None:
    """Refuse, by name, a generation config that asks for what isn't implemented; warn that sampling is dropped."""
    asked = sorted(key for key, neutral in _NEUTRAL.items() if key in config and config[key] not in neutral)
    for key in ("eos_token_id", "forced_eos_token_id"):
        if isinstance(config.get(key), list) and len(config[key]) > 1:
            asked.append(f"several {key}")
    if asked:
        raise ValueError(
            f"generation_config.json asks for {', '.join(asked)}, which would change the answers and is not "
            "implemented; remove it there if the checkpoint can do without"
        )
    if config.get("do_sample"):
        logger.warning("generation_config.json: do_sample is dropped; answers are decoded without sampling")


def _single(token: int | list[int] | None) -> int | None:
    return token[0] if isinstance(token, list) else token
