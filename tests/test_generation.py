"""Generation against transformers' `generate`, and by hand where the rules can be counted out."""

import random
from dataclasses import dataclass
from typing import Any

import checkpoints
import numpy as np
import pytest
import torch
from florence2_export.checkpoint import Checkpoint
from florence2_export.export import _write_graph, sizes_of
from florence2_export.graphs import DECODER, ENCODER
from florence2_export.parity import reference_generate
from numpy.typing import NDArray
from transformers import GenerationConfig

from florence2.generation.generate import generate
from florence2.generation.runner import Caches, GraphRunner
from florence2.generation.selection import Generation, banned_tokens, start
from florence2.generation.settings import GenerationSettings

EOS, BOS = 2, 0
IMAGE_TOKENS = 5


@dataclass
class Exported:
    """A tiny random model and its encoder and decoder in ONNX Runtime."""

    model: Any
    runner: GraphRunner
    rows: int

    def request(self, rng: np.random.Generator) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Image features and a prompt."""
        features = rng.normal(size=(IMAGE_TOKENS, 16)).astype(np.float32)
        return features, rng.integers(3, self.rows, rng.integers(2, 9))


def decided_model(rows: int, seed: int, eos_bonus: float) -> Any:
    """Weights so large that answers differ and no two are nearly tied; `eos_bonus` lets some end by themselves."""
    model: Any = checkpoints.random_model(rows=rows, positions=64, seed=seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "language_model" in name:
                parameter.normal_(std=0.2 if "shared" in name else 0.5)
        embedding = model.get_input_embeddings().weight
        last_norm = model.model.language_model.decoder.layers[-1].final_layer_norm
        last_norm.bias += eos_bonus * embedding[EOS] / embedding[EOS].norm() ** 2
    # generate() would fill what a call leaves out from here.
    model.generation_config = GenerationConfig()
    return model


@pytest.fixture(scope="module", params=[(40, 1, 1.2), (117, 2, 3.0)], ids=["40 rows", "117 rows"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    rows, seed, eos_bonus = request.param
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("graphs")
    model = decided_model(rows, seed, eos_bonus)
    checkpoint = Checkpoint(
        model=model,
        tokenizer=checkpoints.full_tokenizer(),
        preprocessor=checkpoints.PREPROCESSOR,
        generation=checkpoints.GENERATION,
        banned_grounding_phrases=[],
        layout="native",
        source="",
        revision=None,
        sha256="",
        repairs=[],
    )
    for graph in (ENCODER, DECODER):
        _write_graph(graph, checkpoint, sizes_of(checkpoint), folder)
    return Exported(model, GraphRunner(folder, threads=1), rows)


def random_settings(rng: random.Random, rows: int) -> dict[str, Any]:
    """HF's names and values; None is HF's "not asked for"."""
    tokens = range(3, rows)
    return {
        "num_beams": rng.choice([1, 1, 2, 3, 3, 4, 5, 8]),
        "length_penalty": rng.choice([0.0, 0.5, 1.0, 2.0, -1.0]),
        "early_stopping": rng.choice([True, False, "never"]),
        "no_repeat_ngram_size": rng.choice([0, 1, 2, 3, 3, 4]),
        "forced_bos_token_id": rng.choice([None, BOS]),
        "forced_eos_token_id": rng.choice([None, EOS]),
        "suppress_tokens": rng.choice([None, rng.sample(tokens, 3)]),
        "begin_suppress_tokens": rng.choice([None, rng.sample(tokens, 3)]),
        "max_new_tokens": rng.choice([1, 2, 3, 5, 8, 12, 16, 24]),
    }


IDS = {"decoder_start_token_id": EOS, "eos_token_id": EOS, "bos_token_id": BOS, "pad_token_id": 1}


def reference(exported: Exported, features: Any, prompt: Any, asked: dict[str, Any]) -> Generation:
    output = reference_generate(exported.model, features, prompt, **IDS, **asked)
    tokens = output.sequences[0].tolist()
    if asked["num_beams"] > 1:
        logprobs = exported.model.compute_transition_scores(output.sequences, output.scores, output.beam_indices)[0]
        score = float(output.sequences_scores[0])
    else:
        raw = torch.cat(output.logits).log_softmax(-1)
        # A forced token is the only one left.
        forced = torch.cat(output.scores).isfinite().sum(-1) == 1
        logprobs = raw[range(len(raw)), tokens[1:]].masked_fill(forced, 0)
        score = float(logprobs.sum()) / len(logprobs) ** asked["length_penalty"]
    return Generation(np.array(tokens), logprobs.numpy(), score, "")


def assert_same(found: Generation, expected: Generation) -> None:
    assert found.token_ids.tolist() == expected.token_ids.tolist()
    np.testing.assert_allclose(found.token_logprobs, expected.token_logprobs, atol=1e-4)
    np.testing.assert_allclose(found.sequence_score, expected.sequence_score, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("seed", range(10))
def test_equals_transformers(exported: Exported, seed: int) -> None:
    choose, rng = random.Random(seed), np.random.default_rng(seed)
    for _ in range(16):
        asked = random_settings(choose, exported.rows)
        features, prompt = exported.request(rng)
        expected = reference(exported, features, prompt, asked)
        settings = GenerationSettings.from_config(IDS | asked, positions=64)
        found = generate(exported.runner, features, prompt, settings)
        try:
            assert_same(found, expected)
        except AssertionError as error:
            raise AssertionError(f"{asked}, prompt {prompt}: {error}") from None


def test_any_row_of_the_vocabulary_can_be_chosen(exported: Exported) -> None:
    """Native checkpoints pad the vocabulary; HF does not mask those rows."""
    last = exported.rows - 1
    asked = {"num_beams": 3, "suppress_tokens": list(range(last)), "max_new_tokens": 4, "length_penalty": 1.0}
    features, prompt = exported.request(np.random.default_rng(0))
    found = generate(exported.runner, features, prompt, GenerationSettings.from_config(IDS | asked, positions=64))
    assert found.token_ids.tolist() == [EOS, last, last, last, last]
    assert_same(found, reference(exported, features, prompt, asked))


def settings_of(**asked: Any) -> GenerationSettings:
    return GenerationSettings.from_config(IDS | asked, positions=64)


def decode_together(runner: GraphRunner, caches: Caches, searches: list[Any]) -> None:
    """One step of several requests in one batch; what has finished goes along unread."""
    beams = len(searches[0].input_ids)
    ids, logprobs = runner.decode(
        caches,
        np.stack([search.input_ids for search in searches]),
        np.stack([np.full(beams, search.length - 1) for search in searches]),
        np.concatenate([search.beam_indices + beams * index for index, search in enumerate(searches)]),
        [banned for search in searches for banned in search.banned_tokens()],
    )
    for search, *candidates in zip(searches, ids, logprobs, strict=True):
        if not search.finished:
            search.advance(*candidates)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_requests_in_one_batch_equal_single_ones(exported: Exported, num_beams: int) -> None:
    rng = np.random.default_rng(5)
    settings = settings_of(num_beams=num_beams, max_new_tokens=12, no_repeat_ngram_size=2, length_penalty=2.0)
    requests = [(exported.request(rng)[0], rng.integers(3, exported.rows, length)) for length in (2, 9, 5, 3)]
    features, prompts = zip(*requests, strict=True)
    caches = exported.runner.encode(np.stack(features), prompts, num_beams)
    searches = [start(settings) for _ in requests]
    while not all(search.finished for search in searches):
        decode_together(exported.runner, caches, searches)
    for search, (picture, prompt) in zip(searches, requests, strict=True):
        assert_same(search.result(), generate(exported.runner, picture, prompt, settings))


@pytest.mark.parametrize("head_start", [1, 4])
def test_a_request_can_join_one_that_is_older(exported: Exported, head_start: int) -> None:
    """Caches are right-aligned: the younger request's is padded on the left, with what must never be read."""
    rng = np.random.default_rng(6)
    beams, settings = 2, settings_of(num_beams=2, max_new_tokens=10, suppress_tokens=[EOS])
    requests = [exported.request(rng) for _ in range(2)]
    features, prompts = zip(*requests, strict=True)
    caches = exported.runner.encode(np.stack(features), prompts, beams)
    first = Caches(
        cross={name: value[:1] for name, value in caches.cross.items()},
        encoder_attention_mask=caches.encoder_attention_mask[:1],
        past={name: value[:beams] for name, value in caches.past.items()},
    )
    searches = [start(settings) for _ in requests]
    for _ in range(head_start):
        decode_together(exported.runner, first, searches[:1])
    caches.past = {
        name: np.concatenate([value, rng.normal(0, 9, value.shape).astype(np.float32)])
        for name, value in first.past.items()
    }
    while not all(search.finished for search in searches):
        decode_together(exported.runner, caches, searches)
    for search, (picture, prompt) in zip(searches, requests, strict=True):
        assert_same(search.result(), generate(exported.runner, picture, prompt, settings))


class Table:
    """A runner whose next token depends on the last one only: {last: {next: probability}}."""

    def __init__(self, table: dict[int, dict[int, float]], rows: int = 16) -> None:
        self.logprobs = np.full((rows, rows), -1e4, np.float32)
        for last, following in table.items():
            for token, probability in following.items():
                self.logprobs[last, token] = np.log(probability)

    def encode(self, *_: Any) -> None:
        return None

    def decode(self, _: None, input_ids: Any, positions: Any, beam_indices: Any, banned: Any) -> tuple[Any, Any]:
        logprobs = self.logprobs[input_ids[0]]
        for row, tokens in zip(logprobs, banned, strict=True):
            row[tokens] = -np.inf
        ids = np.argsort(-logprobs, axis=1, kind="stable")
        return ids[None], np.take_along_axis(logprobs, ids, axis=1)[None]


def answer(table: dict[int, dict[int, float]], **asked: Any) -> Generation:
    runner: Any = Table(table)
    return generate(runner, np.zeros((1, 1), np.float32), np.zeros(1, np.int64), settings_of(**asked))


# Greedily 5 comes first, but 6 leads to the better answer.
FORK = {2: {5: 0.6, 6: 0.4}, 5: {7: 0.5, 8: 0.5}, 6: {2: 0.9, 7: 0.1}, 7: {2: 0.5}, 8: {2: 0.5}}


def test_greedy_search_takes_the_best_token_each_time() -> None:
    found = answer(FORK)
    assert found.token_ids.tolist() == [2, 5, 7, 2]
    assert found.token_logprobs == pytest.approx(np.log([0.6, 0.5, 0.5]))
    assert found.sequence_score == pytest.approx(np.log(0.6 * 0.5 * 0.5) / 3)


def test_beam_search_takes_the_best_answer() -> None:
    found = answer(FORK, num_beams=2)
    assert found.token_ids.tolist() == [2, 6, 2]
    assert found.token_logprobs == pytest.approx(np.log([0.4, 0.9]))
    assert found.sequence_score == pytest.approx(np.log(0.36) / 2)


@pytest.mark.parametrize("num_beams", [1, 2])
def test_forced_tokens_have_no_logprob(num_beams: int) -> None:
    table = {2: {5: 1.0}, 0: {5: 0.7}, 5: {6: 0.6}, 6: {7: 1.0}}
    found = answer(table, num_beams=num_beams, forced_bos_token_id=0, forced_eos_token_id=2, max_new_tokens=4)
    assert found.token_ids.tolist() == [2, 0, 5, 6, 2]
    assert found.token_logprobs == pytest.approx([0, np.log(0.7), np.log(0.6), 0])
    assert found.sequence_score == pytest.approx(np.log(0.42) / 4)
    assert found.finish_reason == "length"


@pytest.mark.parametrize("num_beams", [1, 2])
def test_the_end_wins_where_both_are_forced(num_beams: int) -> None:
    found = answer(FORK, num_beams=num_beams, forced_bos_token_id=0, forced_eos_token_id=2, max_new_tokens=1)
    assert found.token_ids.tolist() == [2, 2]
    assert found.token_logprobs.tolist() == [0]


@pytest.mark.parametrize(
    ("sequence", "asked", "banned"),
    [
        ([2, 0, 5], {}, []),
        ([2, 0, 5], {"suppress_tokens": [7, 9]}, [7, 9]),
        ([2, 0, 5, 6, 5], {"no_repeat_ngram_size": 1}, [0, 2, 5, 6]),
        ([2, 0, 5, 6, 5], {"no_repeat_ngram_size": 2}, [6]),
        ([2, 5, 6, 5, 7, 5], {"no_repeat_ngram_size": 2}, [6, 7]),
        ([2, 0, 0], {"no_repeat_ngram_size": 3}, []),
        ([2, 0, 0, 0], {"no_repeat_ngram_size": 3}, [0]),
        ([2, 5, 6, 7, 5, 6], {"no_repeat_ngram_size": 3, "suppress_tokens": [7, 9]}, [7, 9]),
        ([2, 0], {"no_repeat_ngram_size": 3}, []),
        # The first token that is free to choose: behind a forced one, if there is one.
        ([2], {"begin_suppress_tokens": [8]}, [8]),
        ([2, 5], {"begin_suppress_tokens": [8]}, []),
        ([2], {"begin_suppress_tokens": [8], "forced_bos_token_id": 0}, []),
        ([2, 0], {"begin_suppress_tokens": [8], "forced_bos_token_id": 0}, [8]),
        ([2, 0, 5], {"begin_suppress_tokens": [8], "forced_bos_token_id": 0}, []),
    ],
)
def test_banned_tokens(sequence: list[int], asked: dict[str, Any], banned: list[int]) -> None:
    assert [tokens.tolist() for tokens in banned_tokens(np.array([sequence]), settings_of(**asked))] == [banned]


def test_bans_are_per_beam() -> None:
    found = banned_tokens(np.array([[2, 5, 6, 5], [2, 5, 5, 6]]), settings_of(no_repeat_ngram_size=2))
    assert [tokens.tolist() for tokens in found] == [[6], []]


def test_a_ban_changes_the_answer() -> None:
    table = {2: {5: 1.0}, 5: {5: 0.6, 6: 0.4}, 6: {2: 1.0}}
    assert answer(table, max_new_tokens=4).token_ids.tolist() == [2, 5, 5, 5, 5]
    assert answer(table, max_new_tokens=4, no_repeat_ngram_size=2).token_ids.tolist() == [2, 5, 5, 6, 2]


@pytest.mark.parametrize(("early_stopping", "token_ids"), [(True, [2, 5, 2]), (False, [2, 6, 7, 2])])
def test_early_stopping_stops_when_enough_have_ended(early_stopping: bool, token_ids: list[int]) -> None:
    """Two answers have ended after two tokens, with log(.24) / 2 for the better; [6, 7], with log(.25) / 2, runs on."""
    table = {2: {5: 0.4, 2: 0.35, 6: 0.25}, 5: {2: 0.6, 7: 0.4}, 6: {7: 1.0}, 7: {2: 0.9, 8: 0.1}}
    found = answer(table, num_beams=2, early_stopping=early_stopping, max_new_tokens=8)
    assert found.token_ids.tolist() == token_ids


@pytest.mark.parametrize(
    ("early_stopping", "length_penalty", "token_ids"),
    [
        (False, 1.0, [2, 5, 2]),
        ("never", 1.0, [2, 5, 7, 8, 9, 10, 11, 12, 2]),
        # Longer answers can only lose.
        ("never", 0.0, [2, 5, 2]),
        ("never", -1.0, [2, 2]),
    ],
)
def test_never_waits_while_a_longer_answer_could_win(
    early_stopping: bool | str, length_penalty: float, token_ids: list[int]
) -> None:
    """After two tokens log(.45) / 2 has ended and log(.05) runs on: less now, more if it gets all of nine tokens."""
    table = {2: {5: 0.5, 2: 0.44, 6: 0.06}, 5: {2: 0.9, 7: 0.1}, 6: {7: 0.5}, 12: {2: 1.0}}
    table |= {token: {token + 1: 1.0} for token in range(7, 12)}
    asked = {"early_stopping": early_stopping, "length_penalty": length_penalty}
    assert answer(table, num_beams=2, max_new_tokens=9, **asked).token_ids.tolist() == token_ids


@pytest.mark.parametrize("num_beams", [1, 2])
@pytest.mark.parametrize("length_penalty", [1e3, -1e3, 1e300, -1e300])
def test_absurd_length_penalties_still_answer(num_beams: int, length_penalty: float) -> None:
    """HF raises OverflowError for some of these."""
    found = answer(FORK, num_beams=num_beams, length_penalty=length_penalty, max_new_tokens=6)
    assert found.token_ids[0] == 2
    assert len(found.token_ids) == len(found.token_logprobs) + 1
    assert not np.isnan(found.sequence_score)


@pytest.mark.parametrize("num_beams", [1, 2])
@pytest.mark.parametrize(
    ("asked", "token_ids", "reason"),
    [
        ({"max_new_tokens": 3}, [2, 5, 6, 2], "stop"),
        ({"max_new_tokens": 9}, [2, 5, 6, 2], "stop"),
        ({"max_new_tokens": 2}, [2, 5, 6], "length"),
        ({"max_new_tokens": 2, "forced_eos_token_id": 2}, [2, 5, 2], "length"),
        ({"max_new_tokens": 9, "forced_eos_token_id": 2}, [2, 5, 6, 2], "stop"),
    ],
)
def test_finish_reason(num_beams: int, asked: dict[str, Any], token_ids: list[int], reason: str) -> None:
    found = answer({2: {5: 1.0}, 5: {6: 1.0}, 6: {2: 1.0}}, num_beams=num_beams, **asked)
    assert (found.token_ids.tolist(), found.finish_reason) == (token_ids, reason)
