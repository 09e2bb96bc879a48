"""What a generation config says, what a request may change, and what is refused."""

import logging
from typing import Any

import pytest

from florence2.errors import InvalidRequest
from florence2.generation.settings import GenerationSettings

IDS = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
FLORENCE = IDS | {
    "forced_bos_token_id": 0,
    "forced_eos_token_id": 2,
    "num_beams": 3,
    "no_repeat_ngram_size": 3,
    "early_stopping": True,
    "transformers_version": "4.38.2",
    "_from_model_config": True,
}


def settings_of(positions: Any = 1024, **given: Any) -> GenerationSettings:
    return GenerationSettings.from_config(IDS | given, positions)


def test_a_published_config() -> None:
    assert GenerationSettings.from_config(FLORENCE, 1024) == GenerationSettings(
        decoder_start_token_id=2,
        eos_token_id=2,
        max_length=1024,
        positions=1024,
        forced_bos_token_id=0,
        forced_eos_token_id=2,
        num_beams=3,
        length_penalty=1.0,
        early_stopping=True,
        no_repeat_ngram_size=3,
    )


def test_what_is_not_said_is_as_in_transformers() -> None:
    assert settings_of() == GenerationSettings(2, 2, max_length=1024, positions=1024)
    nothing = dict.fromkeys(("forced_bos_token_id", "num_beams", "length_penalty", "suppress_tokens", "max_length"))
    assert settings_of(**nothing) == settings_of()


@pytest.mark.parametrize(
    ("given", "positions", "max_length"),
    [
        ({}, 4096, 1024),
        ({}, 64, 64),
        ({"max_length": 20}, 1024, 20),
        ({"max_length": 5000}, 1024, 1024),
        ({"max_new_tokens": 20}, 1024, 21),
        ({"max_new_tokens": 20, "max_length": 500}, 1024, 21),
        ({"max_new_tokens": 5000}, 1024, 1024),
    ],
)
def test_max_length(given: dict[str, int], positions: int, max_length: int) -> None:
    assert settings_of(positions, **given).max_length == max_length


def test_the_decoder_starts_with_bos_where_no_start_is_given() -> None:
    assert GenerationSettings.from_config({"bos_token_id": 7, "eos_token_id": 2}, 64).decoder_start_token_id == 7


@pytest.mark.parametrize("missing", ["decoder_start_token_id", "eos_token_id"])
def test_start_and_end_are_needed(missing: str) -> None:
    config = {"decoder_start_token_id": 2, "eos_token_id": 2} | {missing: None}
    with pytest.raises(ValueError, match="decoder_start_token_id and eos_token_id are needed"):
        GenerationSettings.from_config(config, 64)


def test_an_end_token_may_be_a_list_of_one() -> None:
    settings = settings_of(eos_token_id=[2], forced_eos_token_id=[2])
    assert (settings.eos_token_id, settings.forced_eos_token_id) == (2, 2)


@pytest.mark.parametrize("key", ["eos_token_id", "forced_eos_token_id"])
def test_several_end_tokens_are_refused(key: str) -> None:
    with pytest.raises(ValueError, match=f"asks for several {key}, which would change the answers"):
        settings_of(**{key: [2, 3]})


REFUSED: dict[str, Any] = {
    "assistant_early_exit": 4,
    "bad_words_ids": [[5]],
    "constraints": [{}],
    "diversity_penalty": 0.5,
    "dola_layers": "low",
    "encoder_no_repeat_ngram_size": 3,
    "encoder_repetition_penalty": 1.5,
    "exponential_decay_length_penalty": [10, 1.1],
    "force_words_ids": [[5]],
    "forced_decoder_ids": [[1, 5]],
    "guidance_scale": 1.5,
    "max_time": 10.0,
    "min_length": 5,
    "min_new_tokens": 5,
    "num_beam_groups": 2,
    "num_return_sequences": 2,
    "penalty_alpha": 0.6,
    "prompt_lookup_num_tokens": 3,
    "remove_invalid_values": True,
    "renormalize_logits": True,
    "repetition_penalty": 1.5,
    "sequence_bias": [[[5], 1.0]],
    "stop_strings": ["."],
    "token_healing": True,
    "watermarking_config": {"bias": 2.0},
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_would_change_the_answers_is_refused_by_name(key: str) -> None:
    with pytest.raises(ValueError, match=f"asks for {key}, which would change the answers and is not implemented"):
        settings_of(**{key: REFUSED[key]})
    assert settings_of(**{key: None}) == settings_of()


def test_every_name_is_told_at_once() -> None:
    with pytest.raises(ValueError, match=r"asks for min_length, repetition_penalty, several eos_token_id, which"):
        settings_of(repetition_penalty=2.0, min_length=3, eos_token_id=[2, 3])


def test_transformers_own_defaults_are_not_refused() -> None:
    """transformers 4.x writes them into every config."""
    written = {
        "bad_words_ids": None,
        "diversity_penalty": 0.0,
        "encoder_no_repeat_ngram_size": 0,
        "min_length": 0,
        "num_beam_groups": 1,
        "num_return_sequences": 1,
        "remove_invalid_values": False,
        "repetition_penalty": 1.0,
        "temperature": 1.0,
        "top_k": 50,
        "top_p": 1.0,
    }
    assert settings_of(**written) == settings_of()


def test_sampling_is_dropped_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert settings_of(do_sample=False) == settings_of()
        assert not caplog.records
        assert settings_of(do_sample=True, temperature=0.5) == settings_of()
    (record,) = caplog.records
    assert record.getMessage() == ("generation_config.json: do_sample is dropped; answers are decoded without sampling")


def test_a_request_overrides_what_it_names() -> None:
    settings = GenerationSettings.from_config(FLORENCE, 1024)
    assert settings.override() == settings
    assert settings.override(num_beams=None, max_new_tokens=None) == settings
    changed = settings.override(
        num_beams=1, max_new_tokens=7, no_repeat_ngram_size=0, length_penalty=0.0, early_stopping=False
    )
    assert changed.num_beams == 1
    assert changed.max_length == 8
    assert changed.no_repeat_ngram_size == 0
    assert changed.length_penalty == 0.0
    assert changed.early_stopping is False
    assert changed.forced_eos_token_id == settings.forced_eos_token_id
    assert settings.num_beams == 3


@pytest.mark.parametrize("edge", [{"num_beams": 1}, {"num_beams": 8}, {"max_new_tokens": 1}, {"max_new_tokens": 63}])
def test_the_ends_of_each_range_are_allowed(edge: dict[str, Any]) -> None:
    settings_of(64).override(**edge)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"num_beams": 0}, "num_beams must be from 1 to 8, not 0"),
        ({"num_beams": 9}, "num_beams must be from 1 to 8, not 9"),
        ({"max_new_tokens": 0}, "max_new_tokens must be from 1 to 63 here, not 0"),
        ({"max_new_tokens": 64}, "max_new_tokens must be from 1 to 63 here, not 64"),
        ({"max_new_tokens": -2}, "max_new_tokens must be from 1 to 63 here, not -2"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size must be 0 or more, not -1"),
        ({"length_penalty": float("nan")}, "length_penalty must be a finite number, not nan"),
        ({"length_penalty": float("inf")}, "length_penalty must be a finite number, not inf"),
        ({"early_stopping": "always"}, "early_stopping must be true, false or \"never\", not 'always'"),
    ],
)
def test_what_is_out_of_range_is_refused_with_the_range(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        settings_of(64).override(**asked)
    assert str(refused.value) == message


def test_a_config_out_of_range_is_refused_too() -> None:
    with pytest.raises(ValueError, match="num_beams must be from 1 to 8, not 20"):
        settings_of(num_beams=20)
