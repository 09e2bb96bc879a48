"""Generation against transformers' `generate`, and by hand where the rules can be counted out."""

import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import checkpoints
import numpy as np
import pytest
import torch
from florence2_export.checkpoint import Checkpoint
from florence2_export.export import _write_graph, sizes_of
from florence2_export.graphs import DECODER, ENCODER, RELAYOUT
from florence2_export.parity import reference_generate
from numpy.typing import NDArray
from transformers import Florence2ForConditionalGeneration, GenerationConfig

import florence2.generation.engine as engine_module
import florence2.generation.runner as runner_module
from florence2.errors import Cancelled, TimeIsOver, Unavailable
from florence2.generation import decoder_steps
from florence2.generation.beam_search import Candidates, Generation, Searches, new_searches
from florence2.generation.caches import CacheSizes
from florence2.generation.device_memory import Cache
from florence2.generation.engine import Engine, Runner
from florence2.generation.request import Request
from florence2.generation.runner import GraphRunner
from florence2.generation.scheduler import Scheduler
from florence2.generation.settings import GenerationSettings

EOS, BOS = 2, 0
IMAGE_TOKENS, POSITIONS = 5, 64
ROOM = CacheSizes(rows=8, decoder_entries=8 * POSITIONS, encoder_entries=8 * POSITIONS, entry_values=1)
"""For one request, whatever it asks for."""
DISTINCT = 240
"""Requests per model that transformers answers once."""


@dataclass(frozen=True)
class Question:
    """A request and what transformers answers."""

    features: NDArray[np.float32]
    prompt: NDArray[np.int64]
    asked: dict[str, Any]
    expected: Generation

    @property
    def settings(self) -> GenerationSettings:
        return settings_of(**self.asked)

    def check(self, found: Generation | Exception) -> None:
        try:
            assert isinstance(found, Generation), found
            assert_same(found, self.expected)
        except AssertionError as error:
            raise AssertionError(f"{self.asked}, prompt {self.prompt}: {error}") from None


@dataclass
class Exported:
    """A tiny random model and its encoder and decoder in ONNX Runtime."""

    model: Any
    folder: Path
    rows: int
    runner: GraphRunner
    questions: list[Question] = field(default_factory=list)

    def request(self, rng: np.random.Generator, length: int = 6) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Image features and a prompt."""
        features = rng.normal(size=(IMAGE_TOKENS, 16)).astype(np.float32)
        return features, rng.integers(3, self.rows, length)


def decided_model(rows: int, seed: int, eos_bonus: float) -> Any:
    """Weights so large that answers differ and no two are nearly tied; `eos_bonus` lets some end by themselves.

    Two decoder layers: in the second, what a token leaves in the caches depends on all before it.
    """
    config: Any = checkpoints.random_model(rows=rows, positions=POSITIONS).config
    config.text_config.decoder_layers = 2
    torch.manual_seed(seed)
    model: Any = Florence2ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "language_model" in name:
                parameter.normal_(std=0.2 if "shared" in name else 0.5)
            elif parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
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
    for graph in (ENCODER, DECODER, RELAYOUT):
        _write_graph(graph, checkpoint, sizes_of(checkpoint), folder, "fp32")
    exported = Exported(model, folder, rows, GraphRunner(folder, ROOM, threads=1))
    choose, rng = random.Random(seed), np.random.default_rng(seed)
    for _ in range(DISTINCT):
        asked = random_settings(choose, rows)
        features, prompt = exported.request(rng, choose.choice([2, 3, 4, 5, 6, 7, 8, 16, 40]))
        exported.questions.append(Question(features, prompt, asked, reference(exported, features, prompt, asked)))
    return exported


def random_settings(rng: random.Random, rows: int) -> dict[str, Any]:
    """HF's names and values; None is HF's "not asked for"."""
    tokens = range(3, rows)
    return {
        "num_beams": rng.choice([1, 1, 2, 3, 3, 4, 5, 6, 7, 8]),
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


def settings_of(**asked: Any) -> GenerationSettings:
    return GenerationSettings.from_config(IDS | asked, positions=POSITIONS)


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


def generate(runner: Runner, features: Any, prompt: Any, settings: GenerationSettings) -> Generation:
    """One request by itself."""
    answers: list[Generation | Exception] = []
    engine = Engine(runner, Scheduler(ROOM, max_waiting=1, encoder_batch=1))
    engine.submit(Request(features, prompt, settings, answers.append))
    engine.finish()
    (answer,) = answers
    if isinstance(answer, Exception):
        raise answer
    return answer


@pytest.mark.parametrize("part", range(10))
def test_equals_transformers(exported: Exported, part: int) -> None:
    for question in exported.questions[part::10]:
        question.check(generate(exported.runner, question.features, question.prompt, question.settings))


def test_any_row_of_the_vocabulary_can_be_chosen(exported: Exported) -> None:
    """Native checkpoints pad the vocabulary; HF does not mask those rows."""
    last = exported.rows - 1
    asked = {"num_beams": 3, "suppress_tokens": list(range(last)), "max_new_tokens": 4, "length_penalty": 1.0}
    features, prompt = exported.request(np.random.default_rng(0))
    found = generate(exported.runner, features, prompt, settings_of(**asked))
    assert found.token_ids.tolist() == [EOS, last, last, last, last]
    assert_same(found, reference(exported, features, prompt, asked))


@pytest.mark.parametrize("head_start", [0, 1, 4])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_requests_that_share_steps_equal_single_ones(exported: Exported, num_beams: int, head_start: int) -> None:
    """Prompts of different lengths; each starts `head_start` steps after the one before."""
    rng = np.random.default_rng(5)
    settings = settings_of(num_beams=num_beams, max_new_tokens=12, no_repeat_ngram_size=2, suppress_tokens=[EOS])
    requests = [exported.request(rng, length) for length in (2, 9, 5, 3)]
    alone = [generate(exported.runner, *request, settings) for request in requests]
    caches = CacheSizes(rows=12, decoder_entries=ROOM.decoder_entries, encoder_entries=64, entry_values=1)
    runner = GraphRunner(exported.folder, caches, threads=1)
    # What this one leaves in all rows must never be read.
    generate(runner, *exported.request(rng), settings_of(num_beams=8, suppress_tokens=[EOS]))
    engine = Engine(runner, Scheduler(caches, max_waiting=4, encoder_batch=4))
    found: dict[int, Any] = {}
    for index, request in enumerate(requests):
        engine.submit(Request(*request, settings, partial(found.__setitem__, index)))
        for _ in range(head_start):
            engine.step()
    engine.finish()
    assert engine.counters.steps == 12 + 3 * head_start
    for index, expected in enumerate(alone):
        assert_same(found[index], expected)


def test_slots_are_filled_side_by_side_and_close_up(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    """One run of the encoder for all that start together; the decoder doesn't go on over slots that are empty."""
    runner = GraphRunner(exported.folder, ROOM, threads=1)
    engine = Engine(runner, Scheduler(ROOM, max_waiting=8, encoder_batch=4))
    filled: list[tuple[int, int]] = []
    run_encoder = runner._run_encoder

    def run_encoder_noted(requests: Sequence[Request], slot: int) -> None:
        filled.append((slot, len(requests)))
        run_encoder(requests, slot)

    monkeypatch.setattr(runner, "_run_encoder", run_encoder_noted)
    features, prompt = exported.request(np.random.default_rng(0))
    found: list[Any] = []

    def submit(max_new_tokens: int) -> None:
        settings = settings_of(max_new_tokens=max_new_tokens, suppress_tokens=[EOS])
        engine.submit(Request(features, prompt, settings, found.append))

    for max_new_tokens in (1, 8, 2, 8):
        submit(max_new_tokens)
    engine.step()
    assert filled == [(0, 4)]
    engine.step()
    # The first and the third have ended.
    for _ in range(3):
        submit(2)
    engine.step()
    assert filled == [(0, 4), (0, 1), (2, 1), (4, 1)]
    engine.step()
    assert list(runner._slots.values()) == [1, 3]
    engine.step()
    assert list(runner._slots.values()) == [0, 1]
    engine.finish()
    longest = max((answer.token_ids.tolist() for answer in found), key=len)
    assert [answer.token_ids.tolist() for answer in found] == [longest[: len(answer.token_ids)] for answer in found]
    assert [len(answer.token_ids) for answer in found] == [2, 3, 3, 3, 3, 9, 9]


@pytest.mark.parametrize("failing", [5, 8, 11])
def test_a_binding_that_failed_half_way_is_made_again(
    exported: Exported, failing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four caches are bound for the encoder, then eight for the decoder."""
    runner = GraphRunner(exported.folder, ROOM, threads=1)
    request = exported.request(np.random.default_rng(0))
    one, three = (settings_of(num_beams=num_beams, max_new_tokens=8) for num_beams in (1, 3))
    expected = generate(exported.runner, *request, three)
    generate(runner, *request, one)
    calls: list[str] = []
    bind = Cache.bind

    def fails_once(cache: Cache, *args: Any, **names: Any) -> None:
        calls.append("")
        if len(calls) == failing:
            raise MemoryError("no binding")
        bind(cache, *args, **names)

    monkeypatch.setattr(Cache, "bind", fails_once)
    with pytest.raises(MemoryError, match="no binding"):
        generate(runner, *request, three)
    assert_same(generate(runner, *request, three), expected)


def test_caches_that_do_not_fit_are_refused_at_once(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is given when it is first written to; nobody's answer is to find out that there is none."""
    caches = CacheSizes(rows=8, decoder_entries=4096, encoder_entries=1000, entry_values=512)
    monkeypatch.setattr(runner_module, "available_bytes", lambda: caches.bytes)
    GraphRunner(exported.folder, caches, threads=1)
    monkeypatch.setattr(runner_module, "available_bytes", lambda: caches.bytes - 1)
    with pytest.raises(ValueError, match=r"caches of at most 10 MB: 8 rows .* don't fit: 10 MB are free .* lower rows"):
        GraphRunner(exported.folder, caches, threads=1)


@dataclass(eq=False)
class Visit:
    """A question on its way, with what is over at which step."""

    question: Question
    deadline: float
    leaves: float
    answers: list[tuple[int, Generation | Exception]] = field(default_factory=list)


class Traffic:
    """Requests that come at random, want random things, and go at random; a step is a second."""

    def __init__(self, runner: GraphRunner, questions: Sequence[Question], seed: int) -> None:
        self.runner, self.questions, self.choose = runner, questions, random.Random(seed)
        scheduler = Scheduler(runner.caches, max_waiting=8, encoder_batch=self.choose.randint(1, 4))
        self.engine = Engine(runner, scheduler)
        self.now = 0
        self.visits: list[Visit] = []
        self.failures: dict[int, list[Exception]] = defaultdict(list)
        """By step."""
        self.outcomes: Counter[str] = Counter()

    def run(self, requests: int) -> None:
        while len(self.visits) < requests:
            rush = self.now // 50 % 2
            for _ in range(self.choose.choice([0, 0, 1, 2, 5] if rush else [0, 0, 0, 0, 0, 1])):
                self._arrive()
            self._step()
        while not self.engine.is_idle:
            self._step()
        for visit in self.visits:
            self._check(visit)

    def _arrive(self) -> None:
        """Some are late when they come."""
        deadline = self.now + self.choose.randint(0, 25) if self.choose.random() < 0.1 else np.inf
        leaves = self.now + self.choose.randint(0, 25) if self.choose.random() < 0.1 else np.inf
        visit = Visit(self.choose.choice(self.questions), deadline, leaves)
        request = Request(
            visit.question.features,
            visit.question.prompt,
            visit.question.settings,
            respond=lambda answer: visit.answers.append((self.now, answer)),
            deadline=deadline,
            is_cancelled=lambda: self.now >= leaves,
        )
        full = len(self.engine.scheduler.waiting) == self.engine.scheduler.max_waiting
        try:
            self.engine.submit(request)
        except Unavailable:
            assert full
            self.outcomes["refused"] += 1
        else:
            assert not full
            self.visits.append(visit)

    def _step(self) -> None:
        self.engine.step()
        self.now += 1

    def _check(self, visit: Visit) -> None:
        ((then, answer),) = visit.answers
        self.outcomes[type(answer).__name__] += 1
        if then >= visit.deadline:
            assert isinstance(answer, TimeIsOver)
        elif then >= visit.leaves:
            assert isinstance(answer, Cancelled)
        elif isinstance(answer, (RuntimeError, MemoryError)):
            assert type(answer) in map(type, self.failures[then])
        else:
            visit.question.check(answer)


@pytest.fixture
def traffic(exported: Exported, seed: int, monkeypatch: pytest.MonkeyPatch) -> Traffic:
    """Through caches of which a few requests fill every row, or every entry, and which change shape all the time."""
    choose = random.Random(seed)
    block = choose.choice([1, 2, 5, 16])
    # What the largest question takes, and up to three times as much.
    columns, encoder_columns = (-(-longest // block) * block for longest in (25, IMAGE_TOKENS + 40))
    caches = CacheSizes(
        rows=choose.choice([8, 9, 12, 24]),
        decoder_entries=8 * columns + choose.randint(0, 16 * columns),
        encoder_entries=encoder_columns + choose.randint(0, 2 * encoder_columns),
        entry_values=1,
        block=block,
    )
    bind = Cache.bind

    def bind_inside(cache: Cache, binding: Any, rows: int, *, first: int = 0, **names: str) -> None:
        """A graph that wrote behind the end would most often be noticed by nobody."""
        assert (first + rows) * cache.columns <= cache._entries
        bind(cache, binding, rows, first=first, **names)

    monkeypatch.setattr(Cache, "bind", bind_inside)
    traffic = Traffic(GraphRunner(exported.folder, caches, threads=1), exported.questions, seed)
    clock = SimpleNamespace(monotonic=lambda: traffic.now, perf_counter=lambda: 0.0)
    monkeypatch.setattr(engine_module, "time", clock)
    monkeypatch.setattr(engine_module, "ASKED_EVERY", 0)
    return traffic


@pytest.mark.parametrize("seed", range(8))
def test_random_traffic_equals_transformers(traffic: Traffic, monkeypatch: pytest.MonkeyPatch) -> None:
    past, cross = (
        note_shapes(next(iter(caches.values())), monkeypatch)
        for caches in (traffic.runner._past, traffic.runner._cross)
    )
    traffic.run(requests=400)
    assert min(len(past), len(cross)) > 5
    assert traffic.outcomes["Generation"] > 300
    assert min(traffic.outcomes[name] for name in ("Cancelled", "TimeIsOver", "refused")) > 0
    assert (traffic.engine.scheduler.running, traffic.runner._slots, traffic.runner._seats.requests) == ([], {}, [])


@pytest.mark.parametrize("seed", range(11, 14))
def test_on_a_gpu_shapes_are_rounded_and_steps_captured(traffic: Traffic, monkeypatch: pytest.MonkeyPatch) -> None:
    """As there, but for the graphs themselves: while ONNX Runtime captures one, the step is taken twice."""
    captured = 200
    monkeypatch.setattr(traffic.runner, "_rounds", True)
    monkeypatch.setattr(traffic.runner._decoder, "graphs_left", captured)
    run, graphs = decoder_steps.Step.run, set()

    def run_twice_at_first(step: Any, *args: Any) -> Any:
        if step.graph > 0 and step.graph not in graphs:
            graphs.add(step.graph)
            run(step, *args)
        return run(step, *args)

    monkeypatch.setattr(decoder_steps.Step, "run", run_twice_at_first)
    traffic.run(requests=400)
    assert traffic.outcomes["Generation"] > 300
    # Every combination of shapes that came a third time, with all that a step can move.
    assert len(graphs) > 8
    assert any(
        step.graph > 0 and len(step._inputs.parts["moved_from"]) for step in traffic.runner._decoder.steps.values()
    )
    most = traffic.runner.caches.rows
    rows = {len(step._inputs.parts["input_ids"]) for step in traffic.runner._decoder.steps.values()}
    assert rows <= {1, 2, 4, 8, 16, most} | {
        traffic.runner.caches.decoder_entries // columns for columns, *_ in traffic.runner._decoder.steps
    }
    assert len(traffic.runner._decoder.steps) <= decoder_steps.STEPS


def test_a_graph_that_cannot_be_captured_is_done_without(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = GraphRunner(exported.folder, ROOM, threads=1)
    request = exported.request(np.random.default_rng(0))
    settings = settings_of(num_beams=3, max_new_tokens=12, suppress_tokens=[EOS])
    expected = generate(exported.runner, *request, settings)
    monkeypatch.setattr(runner._decoder, "graphs_left", 8)
    run, before = decoder_steps.Step.run, runner._decoder.session

    def fails(step: Any, *args: Any) -> Any:
        if step.graph > 0:
            raise RuntimeError("operation not permitted when stream is capturing")
        return run(step, *args)

    monkeypatch.setattr(decoder_steps.Step, "run", fails)
    assert_same(generate(runner, *request, settings), expected)
    assert runner._decoder.graphs_left == 0
    assert runner._decoder.session is not before


def test_more_graphs_than_steps_are_refused(exported: Exported) -> None:
    with pytest.raises(ValueError, match="cuda_graphs is 256; at most 255 are kept"):
        GraphRunner(exported.folder, ROOM, threads=1, cuda_graphs=256)


def note_shapes(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every number of columns that it was given, one after the other."""
    noted: list[int] = []
    reshape = cache.reshape

    def reshape_noted(rows: NDArray[np.int64], columns: int) -> None:
        noted.append(columns)
        reshape(rows, columns)

    monkeypatch.setattr(cache, "reshape", reshape_noted)
    return noted


@pytest.mark.parametrize("seed", range(8, 11))
def test_what_fails_hurts_nobody_later(traffic: Traffic, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs that fail, and memory that runs out while caches change shape: after every such step all others' answers
    are still transformers'. Three in a row would end the engine."""
    monkeypatch.setattr(engine_module.Faults, "failed", lambda *_: False)
    choose = random.Random(0)

    def sometimes(function: Any, error: Exception, share: float = 0.05) -> Any:
        def called(*args: Any, **more: Any) -> Any:
            if choose.random() < share:
                traffic.failures[traffic.now].append(error)
                raise error
            return function(*args, **more)

        return called

    for owner, name in ((traffic.runner, "_encoder"), (traffic.runner._decoder, "session")):
        graph = getattr(owner, name)
        run = sometimes(graph.run_with_iobinding, RuntimeError(f"{name} failed"))
        kept = {each: getattr(graph, each) for each in ("io_binding", "get_inputs", "get_outputs")}
        stand_in = SimpleNamespace(run_with_iobinding=run, **kept)
        monkeypatch.setattr(owner, name, stand_in)
    monkeypatch.setattr(Cache, "_run", sometimes(Cache._run, MemoryError("no memory")))
    monkeypatch.setattr(Cache, "bind", sometimes(Cache.bind, MemoryError("no binding"), share=0.01))
    traffic.run(requests=300)
    assert traffic.outcomes["Generation"] > 30
    assert min(traffic.outcomes[name] for name in ("RuntimeError", "MemoryError")) > 10
    assert (traffic.engine.scheduler.running, traffic.runner._slots, traffic.runner._seats.requests) == ([], {}, [])


class Table:
    """A runner whose next token depends on the last one only: {last: {next: probability}}."""

    def __init__(self, table: dict[int, dict[int, float]], rows: int = 16) -> None:
        self.logprobs = np.full((rows, rows), -1e4, np.float32)
        for last, following in table.items():
            for token, probability in following.items():
                self.logprobs[last, token] = np.log(probability)

    def encode(self, requests: Sequence[Request]) -> None:
        pass

    def decode(self, searches: Sequence[Searches[Request]]) -> list[Candidates]:
        return [self._candidates(own) for own in searches]

    def release(self, request: Request) -> None:
        pass

    def _candidates(self, searches: Searches[Request]) -> Candidates:
        logprobs = self.logprobs[searches.input_ids]
        beams, tokens = searches.banned_tokens()
        logprobs[(*np.divmod(beams, searches.num_beams), tokens)] = -np.inf
        ids = np.argsort(-logprobs, axis=2, kind="stable")
        return ids, np.take_along_axis(logprobs, ids, axis=2)


def answer(table: dict[int, dict[int, float]], **asked: Any) -> Generation:
    return generate(Table(table), np.zeros((1, 1), np.float32), np.zeros(1, np.int64), settings_of(**asked))


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


def bans_after(sequences: list[list[int]], **asked: Any) -> list[list[int]]:
    """Per beam, where these [K, L] were generated."""
    beams = len(sequences)
    searches = new_searches(beams)
    searches.add("request", settings_of(num_beams=beams, max_new_tokens=20, **asked))
    state = searches._state
    for token in np.array(sequences).T[1:]:
        searches._write(token[None], np.zeros((1, beams), np.float32))
    assert state.sequences[0, :, : state.longest].tolist() == sequences
    rows, tokens = searches.banned_tokens()
    return [sorted(set(tokens[rows == beam].tolist())) for beam in range(beams)]


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
    assert bans_after([sequence], **asked) == [banned]


def test_bans_are_per_beam() -> None:
    assert bans_after([[2, 5, 6, 5], [2, 5, 5, 6]], no_repeat_ngram_size=2) == [[6], []]


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
    settings = settings_of(num_beams=num_beams, max_new_tokens=6).override(length_penalty=length_penalty)
    found = generate(Table(FORK), np.zeros((1, 1), np.float32), np.zeros(1, np.int64), settings)
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
