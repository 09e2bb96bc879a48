"""What a run learns from and in what order: samples read and refused, epochs drawn, steps made and shared out."""

import json
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import runs
from florence2_data.parsing import name_of
from florence2_export.checkpoint import Checkpoint
from florence2_training.corpus import Corpus, draw_epoch, read_corpus
from florence2_training.recipe import Source
from florence2_training.sampler import Batch, share_of, steps_of, steps_of_all
from numpy.typing import NDArray

LOC = "<loc_1><loc_2><loc_3><loc_4>"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return runs.loaded(tmp_path_factory.mktemp("base"))


def corpus_of(tasks: list[int], folder: Path = Path(), names: str = "abcdef") -> Corpus:
    """Without files: what the order is drawn from."""
    count = len(tasks)
    return Corpus(
        folder / "none.jsonl",
        np.arange(count),
        np.ones(count, np.int32),
        np.array(tasks, np.int32),
        np.arange(count, dtype=np.int32),
        [f"<{name}>" for name in names[: max(tasks) + 1]],
        [f"{index}.png" for index in range(count)],
        sha256="",
        repeating=0,
    )


# --- samples ---


def test_samples_are_read_as_they_are(checkpoint: Checkpoint, tmp_path: Path) -> None:
    corpus = runs.corpus(checkpoint, tmp_path)
    names = [str(path.resolve()) for path in runs.pictures(tmp_path / "pictures")]
    assert len(corpus) == len(runs.SAMPLES)
    again = pickle.loads(pickle.dumps(corpus))
    for index, (picture, prompt, answer) in enumerate(runs.SAMPLES):
        for one in (corpus[index], again[index]):
            assert (str(one.image), one.prefix, one.suffix) == (names[picture], prompt, answer)
        assert corpus.lengths[index] == len(checkpoint.tokenizer.encode(answer).ids)
        assert corpus.picture_files[corpus.pictures[index]] == names[picture]
        assert corpus.task_names[corpus.tasks[index]] == name_of(prompt)
    assert corpus.task_names == ["<CAPTION>", "<OD>", "text", "<OCR>"]
    assert corpus.sha256 == runs.corpus(checkpoint, tmp_path).sha256
    assert corpus.sha256 != runs.corpus(checkpoint, tmp_path, runs.SAMPLES[1:]).sha256


def test_samples_outside_ascii_are_found_again(checkpoint: Checkpoint, tmp_path: Path) -> None:
    samples = [(0, "<CAPTION>", "Äpfel — 苹果"), (1, "<CAPTION>", "two"), (2, "<OCR>", "a\nb\u2028c")]
    corpus = runs.corpus(checkpoint, tmp_path, samples)
    assert [corpus[index].suffix for index in range(3)] == [answer for _, _, answer in samples]


@pytest.mark.parametrize(
    ("prompt", "task"),
    [
        ("<OD>", "<OD>"),
        ("<CAPTION_TO_PHRASE_GROUNDING>a cat", "<CAPTION_TO_PHRASE_GROUNDING>"),
        ("<OCR_WITH_REGION>", "<OCR_WITH_REGION>"),
        ("<DETAILED_CAPTION>", "<DETAILED_CAPTION>"),
        ("<DocVQA>what is it?", "<DocVQA>"),
        ("what is it?", "text"),
        ("<loc_1><loc_2> there", "text"),
        ("<", "text"),
        ("a > b", "text"),
    ],
)
def test_the_task_of_a_prompt(prompt: str, task: str) -> None:
    assert name_of(prompt) == task


def test_problems_are_named_with_file_and_line(checkpoint: Checkpoint, tmp_path: Path) -> None:
    data = runs.lines(tmp_path / "bad.jsonl", runs.SAMPLES)
    rows = data.read_text().splitlines()
    good = json.loads(rows[0])
    rows[1] = json.dumps(good | {"image": "gone.png"})
    rows[3] = json.dumps(good | {"prefix": "<OD>with words"})
    rows[4] = '{"image": "x'
    rows[5] = json.dumps(good | {"suffix": "long " * 60})
    data.write_text("\n".join(rows) + "\n")
    with pytest.raises(ValueError, match="4 samples can't be used: ") as caught:
        read_corpus([Source(data=str(data))], runs.tokens(checkpoint), tmp_path / "corpus.jsonl")
    message = str(caught.value)
    assert "bad.jsonl:2: " in message
    assert "gone.png is missing" in message
    assert "bad.jsonl:4: " in message
    assert "bad.jsonl:5: " in message
    assert "bad.jsonl:6: the answer has more than the 128 tokens that the decoder has positions for; set" in message
    assert message.endswith("`florence2 data check --json` lists them all")
    rows = [json.dumps(good | {"image": f"gone{index}.png"}) for index in range(7)]
    data.write_text("\n".join(rows) + "\n")
    with pytest.raises(ValueError, match=r"7 samples can't be used: .*; and 2 more\."):
        read_corpus([Source(data=str(data))], runs.tokens(checkpoint), tmp_path / "corpus.jsonl")


def test_no_samples_and_splits_are_named(checkpoint: Checkpoint, tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    with pytest.raises(ValueError, match=r"empty\.jsonl"):
        read_corpus([Source(data=str(empty), format="prefix")], runs.tokens(checkpoint), tmp_path / "corpus.jsonl")
    folder = tmp_path / "data"
    for split, samples in (("train", runs.SAMPLES), ("valid", runs.SAMPLES[:2])):
        (folder / split).mkdir(parents=True)
        runs.lines(folder / split / "annotations.jsonl", samples)
    tokens = runs.tokens(checkpoint)
    with pytest.raises(ValueError, match="has the splits train, valid; say which with split"):
        read_corpus([Source(data=str(folder))], tokens, tmp_path / "corpus.jsonl")
    with pytest.raises(ValueError, match="has the splits train, valid; say which with split"):
        read_corpus([Source(data=str(folder), split="test")], tokens, tmp_path / "corpus.jsonl")
    assert len(read_corpus([Source(data=str(folder), split="valid")], tokens, tmp_path / "corpus.jsonl")) == 2
    assert len(read_corpus([Source(data=str(folder), split="train")], tokens, tmp_path / "corpus.jsonl", limit=3)) == 3
    both = [Source(data=str(folder), split=split) for split in ("valid", "train")]
    assert len(read_corpus(both, tokens, tmp_path / "corpus.jsonl")) == 9


# --- answers past the decoder's positions ---


def test_a_long_answer_is_cut_after_a_whole_box_and_is_not_told_to_stop(checkpoint: Checkpoint) -> None:
    tokens = runs.tokens(checkpoint, "truncate")
    vocabulary = checkpoint.tokenizer.get_vocab()
    box = [vocabulary[f"<loc_{place}>"] for place in (1, 2, 3, 4)]
    word = checkpoint.tokenizer.encode("cat", add_special_tokens=False).ids
    one = [*word, *box]
    whole = (128 - 1) // len(one)
    cut = tokens.answer(f"cat{LOC}" * 40)
    assert cut == [0, *one * whole]
    exact = f"cat{LOC}" * 5
    assert tokens.answer(exact) == [0, *one * 5, 2]
    assert tokens.answer("x" * 126) == checkpoint.tokenizer.encode("x" * 126).ids
    assert tokens.answer("x" * 127) == checkpoint.tokenizer.encode("x" * 127).ids[:128]
    assert not tokens.is_too_long("x" * 126)
    assert tokens.is_too_long("x" * 127)


def test_many_boxes_of_one_phrase_are_cut_after_a_whole_one(checkpoint: Checkpoint) -> None:
    tokens = runs.tokens(checkpoint, "truncate")
    vocabulary = checkpoint.tokenizer.get_vocab()
    box = [vocabulary[f"<loc_{place}>"] for place in (1, 2, 3, 4)]
    # <s>, c, a, t and 31 boxes are 128 tokens; with one letter more the last box does not fit.
    assert tokens.answer("cat" + LOC * 40) == [0, *checkpoint.tokenizer.encode("cat").ids[1:-1], *box * 31]
    assert tokens.answer("cats" + LOC * 40) == [0, *checkpoint.tokenizer.encode("cats").ids[1:-1], *box * 30]


def test_long_answers_are_refused_cut_or_skipped(checkpoint: Checkpoint, tmp_path: Path) -> None:
    samples = [(0, "<CAPTION>", "a"), (0, "<OD>", f"cat{LOC}" * 40), (1, "<OCR>", "b")]
    data = runs.lines(tmp_path / "long.jsonl", samples)
    source, file = [Source(data=str(data))], tmp_path / "corpus.jsonl"
    with pytest.raises(ValueError, match=r"1 samples can't be used: .*long\.jsonl:2: .*truncate or skip"):
        read_corpus(source, runs.tokens(checkpoint), file)
    cut = read_corpus(source, runs.tokens(checkpoint, "truncate"), file)
    assert len(cut) == 3
    assert cut.lengths.tolist() == [3, 127, 3]
    left = read_corpus(source, runs.tokens(checkpoint, "skip"), file)
    assert [left[index].suffix for index in range(len(left))] == ["a", "b"]


# --- epochs ---


def test_every_epoch_meets_each_sample_once() -> None:
    corpus = corpus_of([0, 1, 0, 1, 1, 2])
    for number in range(4):
        epoch = draw_epoch(corpus, [1.0, 1.0, 1.0], None, 0.3, seed=3, number=number)
        assert sorted(epoch.tolist()) == list(range(6))


def test_task_weights_say_how_often_a_sample_is_met() -> None:
    corpus = corpus_of([0] * 4 + [1] * 6 + [2] * 3)
    epochs = [draw_epoch(corpus, [0.0, 0.5, 2.0], None, 0.3, seed=1, number=number).tolist() for number in range(4)]
    assert {len(epoch) for epoch in epochs} == {3 + 6}
    for epoch in epochs:
        met = Counter(epoch)
        assert set(met) & set(range(4)) == set()
        assert {met[sample] for sample in range(10, 13)} == {2}
        assert sum(met[sample] for sample in range(4, 10)) == 3
    # 0.5: each of the six once in two epochs.
    for pair in (epochs[:2], epochs[2:]):
        met = Counter(sample for epoch in pair for sample in epoch)
        assert {met[sample] for sample in range(4, 10)} == {1}
    half = draw_epoch(corpus, [1.5, 1.0, 1.0], None, 0.3, seed=1, number=0).tolist()
    assert sorted(Counter(half)[sample] for sample in range(4)) == [1, 1, 2, 2]


def test_a_share_of_every_epoch_is_replay() -> None:
    corpus, replayed = corpus_of([0] * 14), corpus_of([0] * 9)
    epochs = [draw_epoch(corpus, [1.0], replayed, 0.3, seed=1, number=number) for number in range(3)]
    for epoch in epochs:
        # 6 of 20.
        assert sorted(sample for sample in epoch if sample < 14) == list(range(14))
        assert sum(sample >= 14 for sample in epoch) == 6
    met = Counter(int(sample) for epoch in epochs for sample in epoch if sample >= 14)
    # Three times 6 are two walks through all 9.
    assert met == dict.fromkeys(range(14, 23), 2)
    assert len(draw_epoch(corpus, [1.0], replayed, 0.0, seed=1, number=0)) == 14
    assert len(draw_epoch(corpus, [1.0], None, 0.3, seed=1, number=0)) == 14


def test_the_seed_decides_the_order() -> None:
    corpus, replayed = corpus_of([0] * 20), corpus_of([0] * 9)

    def drawn(seed: int, number: int) -> list[int]:
        return draw_epoch(corpus, [1.5], replayed, 0.3, seed, number).tolist()

    assert drawn(0, 0) == drawn(0, 0)
    assert drawn(0, 0) != drawn(1, 0)
    assert drawn(0, 0) != drawn(0, 1)
    assert sorted(drawn(0, 0)) != sorted(drawn(1, 0))
    assert steps_of_all(20, 4, [0]) == steps_of_all(20, 4, [0])
    assert steps_of_all(20, 4, [0]) != steps_of_all(20, 4, [1])


# --- steps ---


def lengths_of(count: int, seed: int = 0) -> NDArray[np.int32]:
    return np.random.default_rng(seed).integers(2, 200, count).astype(np.int32)


@pytest.mark.parametrize("by_length", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
def test_steps_hold_every_sample_once(by_length: bool, grouped: bool) -> None:
    count, size = 517, 8
    pictures = np.random.default_rng(1).integers(0, 100, count).astype(np.int32) if grouped else None
    samples = np.random.default_rng(2).permutation(count)
    steps = steps_of(samples, lengths_of(count), pictures, size, by_length, seed=[5])
    assert sorted(sample for step in steps for sample in step) == list(range(count))
    assert sorted(map(len, steps)) == [517 % 8] + [8] * (517 // 8)
    assert all(isinstance(sample, int) for sample in steps[0])
    assert steps == steps_of(samples, lengths_of(count), pictures, size, by_length, seed=[5])
    assert steps != steps_of(samples, lengths_of(count), pictures, size, by_length, seed=[6])


def test_a_sample_that_is_drawn_twice_is_met_twice() -> None:
    steps = steps_of(np.array([0, 0, 1, 1, 1]), lengths_of(2), np.array([0, 0], np.int32), 2, True, [0])
    assert Counter(sample for step in steps for sample in step) == {0: 2, 1: 3}


def padding(steps: list[list[int]], lengths: NDArray[np.int32]) -> float:
    """The part of all labels that is padding."""
    wide = sum(max(lengths[step]) * len(step) for step in steps)
    return 1 - sum(int(lengths[step].sum()) for step in steps) / wide


def test_like_lengths_together_are_less_padding() -> None:
    lengths, samples = lengths_of(1000), np.arange(1000)
    mixed = padding(steps_of(samples, lengths, None, 8, False, [0]), lengths)
    alike = padding(steps_of(samples, lengths, None, 8, True, [0]), lengths)
    assert mixed > 0.3
    assert alike < 0.1
    # Steps of long and of short answers come in no order.
    firsts = [max(lengths[step]) for step in steps_of(samples, lengths, None, 8, True, [0])]
    assert firsts != sorted(firsts)
    assert firsts != sorted(firsts, reverse=True)


@pytest.mark.parametrize("by_length", [False, True])
def test_samples_of_one_picture_stay_together(by_length: bool) -> None:
    pictures = np.repeat(np.arange(100), 4).astype(np.int32)
    steps = steps_of(np.arange(400), lengths_of(400), pictures, 8, by_length, [0])
    assert all(len({int(pictures[sample]) for sample in step}) == 2 for step in steps)
    apart = steps_of(np.arange(400), lengths_of(400), None, 8, by_length, [0])
    assert sum(len({int(pictures[sample]) for sample in step}) for step in apart) > 7 * len(apart)


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("count", [1, 2, 5, 12])
def test_shares_cover_a_step_once_and_keep_step(processes: int, size: int, count: int) -> None:
    step = list(range(100, 100 + count))
    shares = [share_of(step, rank, processes, size) for rank in range(processes)]
    assert len({len(share) for share in shares}) == 1
    assert len(shares[0]) == -(-count // (size * processes))
    assert sorted(sample for share in shares for batch in share if batch.counts for sample in batch.samples) == step
    for share in shares:
        for batch in share:
            assert 1 <= len(batch.samples) <= size
            if not batch.counts:
                assert batch == Batch(batch.samples, counts=False)
                assert len(batch.samples) == 1
    if processes == 1:
        assert all(batch.counts for batch in shares[0])
