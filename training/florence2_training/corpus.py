"""Samples of any format, read once and kept in the words of the model: a file of lines, and what is known of each."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from florence2_data.formats import Split, examples, open_split
from florence2_data.parsing import name_of
from florence2_data.record import Example, Problem
from numpy.typing import NDArray
from tqdm import tqdm

from florence2.answer_limits import AnswerLimits, repeats
from florence2.errors import InvalidRequest
from florence2.prompts import PromptEncoder
from florence2_training.recipe import Source

_SHOWN = 5
"""Problems that are named one by one."""


class Tokens:
    """One checkpoint's way to read a prompt and to write an answer."""

    def __init__(self, prompts: PromptEncoder, long_answers: str = "refuse", ngram: int = 0) -> None:
        self.prompts = prompts
        self.answers = AnswerLimits(prompts.tokenizer, prompts.sizes.max_position_embeddings, ngram)
        self.long_answers = long_answers
        self._locations = {index for token, index in prompts.tokenizer.get_vocab().items() if token.startswith("<loc_")}

    def prompt(self, text: str) -> list[int]:
        """`<s>` and `</s>` included. Raises InvalidRequest, as serving does."""
        return self.prompts.encode(text).tolist()

    def answer(self, text: str) -> list[int]:
        """`<s>` and `</s>` included, as generation gives them; cut to the decoder's positions.

        What is cut ends after a whole box and without `</s>`: the model isn't taught to stop there.
        """
        ids, limit = self.answers.tokens(text), self.answers.limit
        if len(ids) <= limit:
            return ids
        end = limit
        while end > 1 and not (ids[end - 1] in self._locations and ids[end] not in self._locations):
            end -= 1
        if end > 1:
            return ids[:end]
        # Text without boxes, or boxes that all belong to the first phrase.
        start = limit
        while ids[start - 1] in self._locations:
            start -= 1
        return ids[: limit - (limit - start) % 4]

    def is_too_long(self, text: str) -> bool:
        return len(self.answers.tokens(text)) > self.answers.limit


@dataclass(frozen=True)
class Corpus:
    """N samples on disk. Only `file` is opened when one is read, so that it can be sent to a worker process."""

    file: Path
    offsets: NDArray[np.int64]
    """[N]"""
    lengths: NDArray[np.int32]
    """[N] tokens of the answer."""
    tasks: NDArray[np.int32]
    """[N] places in `task_names`."""
    pictures: NDArray[np.int32]
    """[N] places in `picture_files`."""
    task_names: list[str]
    picture_files: list[str]
    sha256: str
    repeating: int
    """Answers that no_repeat_ngram_size makes impossible."""

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, index: int) -> Example:
        with self.file.open("rb") as file:
            file.seek(self.offsets[index])
            line = json.loads(file.readline())
        return Example(Path(line["image"]), line["prefix"], line["suffix"], f"{self.file.name}:{index + 1}")


def read_corpus(sources: Sequence[Source], tokens: Tokens, file: Path, limit: int | None = None) -> Corpus:
    """Reads the sources into `file`: all, or the first of each, `limit` together. Raises ValueError, naming some, if
    there are samples that can't be used."""
    columns: list[tuple[int, int, int, int]] = []
    tasks: dict[str, int] = {}
    pictures: dict[str, int] = {}
    total = hashlib.sha256()
    repeating = 0
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as out:
        for example in _usable_examples(sources, tokens, limit, f"reading {file.stem}"):
            image = str(example.image.resolve())
            answer = tokens.answer(example.suffix)
            repeating += repeats(answer, tokens.answers.ngram)
            task = tasks.setdefault(name_of(example.prefix), len(tasks))
            columns.append((out.tell(), len(answer), task, pictures.setdefault(image, len(pictures))))
            line = json.dumps({"image": image, "prefix": example.prefix, "suffix": example.suffix}) + "\n"
            out.write(line.encode())
            total.update(line.encode())
    if not columns:
        raise ValueError(f"no samples in {', '.join(source.data for source in sources)}")
    offsets, lengths, task_of_each, picture_of_each = (np.array(column) for column in zip(*columns, strict=True))
    return Corpus(
        file,
        offsets.astype(np.int64),
        lengths.astype(np.int32),
        task_of_each.astype(np.int32),
        picture_of_each.astype(np.int32),
        list(tasks),
        list(pictures),
        total.hexdigest(),
        repeating,
    )


def _usable_examples(sources: Sequence[Source], tokens: Tokens, limit: int | None, doing: str) -> Iterator[Example]:
    """Raises ValueError at the end, naming some, if there were samples that can't be used."""
    problems: list[str] = []
    for found in tqdm(_all_examples(sources, limit), doing, unit=" samples", leave=False, disable=None):
        example = found if isinstance(found, Problem) else _usable(found, tokens)
        if isinstance(example, Problem):
            problems.append(str(example))
        elif example is not None:
            yield example
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise ValueError(
            f"{len(problems)} samples can't be used: {'; '.join(problems[:_SHOWN])}{more}. "
            "`florence2 data check --json` lists them all"
        )


def _all_examples(sources: Sequence[Source], limit: int | None) -> Iterable[Example | Problem]:
    for place, source in enumerate(sources):
        share = None if limit is None else (limit + place) // len(sources)
        yield from islice(examples(_split_of(source)), share)


def _split_of(source: Source) -> Split:
    images = Path(source.images).expanduser() if source.images else None
    return open_split(Path(source.data).expanduser(), source.format, images, source.split, "split")


def _usable(example: Example, tokens: Tokens) -> Example | Problem | None:
    """None for an answer that is too long and to be skipped."""
    try:
        tokens.prompt(example.prefix)
    except InvalidRequest as error:
        return Problem(example.where, str(error))
    if not example.image.is_file():
        return Problem(example.where, f"{example.image} is missing")
    if tokens.is_too_long(example.suffix):
        if tokens.long_answers == "skip":
            return None
        if tokens.long_answers == "refuse":
            return Problem(
                example.where,
                f"the answer has more than the {tokens.answers.limit} tokens that the decoder has positions for; set "
                "long_answers to truncate or skip",
            )
    return example


def draw_epoch(
    corpus: Corpus, weights: Sequence[float], replayed: Corpus | None, replay_share: float, seed: int, number: int
) -> NDArray[np.int64]:
    """The samples of one epoch, in no order: those of `replayed` are counted on from the end of `corpus`.

    A sample is met as often as its task's weight says: 2 is twice, 0.5 in half of the epochs. Every epoch has the same
    number of samples.
    """
    rng = np.random.default_rng([seed, 1, number])
    drawn = []
    for task, weight in enumerate(weights):
        samples = np.flatnonzero(corpus.tasks == task)
        drawn += [samples] * int(weight)
        extra = round((weight - int(weight)) * len(samples))
        drawn.append(_walk(samples, extra, number, [seed, 2, task]))
    epoch = np.concatenate(drawn)
    if replayed is not None and replay_share:
        count = round(len(epoch) * replay_share / (1 - replay_share))
        again = _walk(np.arange(len(replayed)), count, number, [seed, 3])
        epoch = np.concatenate([epoch, len(corpus) + again])
    return rng.permutation(epoch)


def _walk(samples: NDArray[np.int64], count: int, number: int, seed: list[int]) -> NDArray[np.int64]:
    """The next `count` of one shuffle of `samples` after another, after `number` times as many."""
    if not count:
        return samples[:0]
    places = np.arange(number * count, (number + 1) * count)
    shuffles = places // len(samples)
    walk = np.empty(count, np.int64)
    for shuffle in np.unique(shuffles):
        here = shuffles == shuffle
        order = np.random.default_rng([*seed, int(shuffle)]).permutation(samples)
        walk[here] = order[places[here] % len(samples)]
    return walk
