"""Rows of the caches, with a numpy array in the place of the decoder's, and how many columns and requests they hold."""

import random
from dataclasses import replace

import numpy as np
import pytest
from fake_runner import request

from florence2.generation.caches import BLOCK, CacheSizes, Ids, Rows, fitted, in_blocks
from florence2.generation.request import Request
from florence2.manifest import Sizes

BASE = Sizes(
    image_height=768,
    image_width=768,
    image_tokens=577,
    d_model=768,
    vocab_size=51289,
    decoder_layers=6,
    decoder_attention_heads=12,
    head_dim=64,
    max_position_embeddings=1024,
    location_bins=1000,
)


# --- which row ----------------------------------------------------------------------------------------------


class Simulation:
    """A cache of numbers, each written once, and the path of numbers that every beam must find in its row."""

    def __init__(self, rows: int, columns: int) -> None:
        self.placement = Rows(rows)
        self.placement.keep(np.zeros(0, np.int64), columns)
        self.cache = np.full((rows, columns), -7)
        self.rows = np.zeros(0, np.int64)
        self.together: list[list[int]] = []
        """Of each beam, those of its request."""
        self.paths: list[list[int]] = []
        self.written = 0
        self.moves = 0

    def step(self, *requests: list[int]) -> None:
        """Each beam of a request continues one that this had in the step before, by its index there, or starts (-1)."""
        beams = [beam for request in requests for beam in request]
        had = [beam for request in requests for beam in (request if request[0] < 0 else self.together[request[0]])]
        own, parents = (np.array([-1 if beam < 0 else self.rows[beam] for beam in which]) for which in (had, beams))
        numbers = np.repeat(np.arange(len(requests)), [len(request) for request in requests])
        before = [[] if beam < 0 else self.paths[beam] for beam in beams]
        lengths = np.array([len(path) for path in before])
        self.rows, moved_from, moved_to = self.placement.place(numbers, own, parents, lengths)
        assert sorted(self.rows) == list(range(len(beams)))
        self.together = [np.flatnonzero(numbers == number).tolist() for number in numbers]
        self._move(moved_from, moved_to)
        # A row that is left over goes along with any token, at its first column.
        self.cache[len(beams) :, 0] = -8
        new = np.arange(self.written, self.written + len(beams))
        self.cache[self.rows, lengths] = new
        self.written += len(beams)
        self.paths = [[*path, number] for path, number in zip(before, new.tolist(), strict=True)]
        for row, path in zip(self.rows, self.paths, strict=True):
            assert self.cache[row, : len(path)].tolist() == path

    def _move(self, moved_from: Ids, moved_to: Ids) -> None:
        assert moved_from.shape == moved_to.shape == (len(moved_to), 2)
        assert len(np.unique(moved_to, axis=0)) == len(moved_to)
        moved = self.cache[tuple(moved_from.T)]
        assert (self.cache[tuple(moved_to.T)] != moved).all()
        self.cache[tuple(moved_to.T)] = moved
        self.moves += len(moved)

    def keep(self, beams: list[int], columns: int) -> None:
        """The rows of these beams come into a new cache, in their old order."""
        kept = np.unique(self.rows[beams])
        fresh = np.full_like(self.cache, -9)
        fresh[: len(kept), :columns] = self.cache[kept, :columns]
        self.cache = fresh
        self.placement.keep(kept, columns)
        # Widened again, with nothing in the new columns.
        self.placement.keep(np.arange(len(kept)), self.cache.shape[1])
        # Beams that are not kept may not be continued.
        self.rows = np.array([np.searchsorted(kept, row) if row in kept else 999 for row in self.rows])


@pytest.mark.parametrize("seed", range(20))
def test_every_beam_finds_its_whole_path(seed: int) -> None:
    """Requests join and leave; beams are left, doubled and swapped within theirs; caches change their columns."""
    choose = random.Random(seed)
    rows, columns = choose.choice([8, 12, 24]), 40
    simulation = Simulation(rows, columns)
    requests: list[list[int]] = []
    """The beams of each, as indices of the step before; -1 at the start."""
    for _ in range(150):
        requests = [own for own in requests if choose.random() > 0.06 and _length(simulation, own) < columns]
        while sum(map(len, requests)) + 8 <= rows and choose.random() < 0.5:
            requests.append([-1] * choose.randint(1, 8))
        going_on = [own if own[0] < 0 else _chosen(own, choose) for own in requests]
        if not going_on:
            continue
        if choose.random() < 0.15:
            running = [beam for own in requests for beam in own if beam >= 0]
            longest = max((len(simulation.paths[beam]) for beam in running), default=0)
            simulation.keep(running, choose.randint(longest, columns))
        simulation.step(*going_on)
        ends = np.cumsum([len(own) for own in going_on])
        requests = [list(range(end - len(own), end)) for own, end in zip(going_on, ends.tolist(), strict=True)]
    assert simulation.moves > 100


def _length(simulation: Simulation, beams: list[int]) -> int:
    return 0 if beams[0] < 0 else len(simulation.paths[beams[0]])


def _chosen(beams: list[int], choose: random.Random) -> list[int]:
    """Mostly as they are; at times any of them, some twice."""
    return beams if choose.random() < 0.3 else choose.choices(beams, k=len(beams))


def test_beams_that_stay_move_nothing() -> None:
    simulation = Simulation(4, 30)
    simulation.step([-1, -1, -1])
    before = simulation.rows
    for _ in range(20):
        simulation.step([0, 1, 2])
    np.testing.assert_array_equal(simulation.rows, before)
    assert simulation.moves == 0


def test_beams_that_change_places_keep_their_rows() -> None:
    simulation = Simulation(3, 30)
    simulation.step([-1, -1, -1])
    for _ in range(10):
        before = simulation.rows
        simulation.step([2, 0, 1])
        np.testing.assert_array_equal(simulation.rows, before[[2, 0, 1]])
    assert simulation.moves == 0


def test_of_a_doubled_beam_only_what_differs_is_copied() -> None:
    placement = Rows(2)
    placement.keep(np.zeros(0, np.int64), 30)

    def place(own: list[int], parents: list[int], length: int) -> tuple[list, list, list]:
        placed = placement.place(np.zeros(2, np.int64), np.array(own), np.array(parents), np.full(2, length))
        return tuple(array.tolist() for array in placed)

    place([-1, -1], [-1, -1], 0)
    assert place([0, 1], [0, 0], 1) == ([0, 1], [[0, 0]], [[1, 0]])
    # From here on both share the first token; what row 0 lacks of row 1 is the second.
    rows, *moves = place([0, 1], [1, 1], 2)
    assert (rows, *moves) == ([1, 0], [[1, 1]], [[0, 1]])
    for length in range(3, 20):
        rows, moved_from, _ = place(rows, rows, length)
        assert len(moved_from) == 0
    _, moved_from, moved_to = place(rows, [1, 1], 20)
    assert moved_from == [[1, column] for column in range(2, 20)]
    assert moved_to == [[0, column] for column in range(2, 20)]


def test_a_doubled_beam_takes_the_row_that_has_most_of_it() -> None:
    simulation = Simulation(4, 30)
    simulation.step([-1, -1, -1, -1])
    simulation.step([0, 1, 2, 0])
    moves = simulation.moves
    # Rows 1 and 3 are free; row 3 has one of row 0's two tokens, row 1 none of anybody's.
    simulation.step([0, 0, 2, 2])
    assert simulation.rows.tolist() == [0, 3, 2, 1]
    assert simulation.moves - moves == 1 + 2


def test_the_last_rows_move_in_when_others_leave() -> None:
    """Beams are always the first rows, so that the caches of R beams are one piece of memory."""
    simulation = Simulation(5, 30)
    simulation.step([-1], [-1, -1], [-1], [-1])
    simulation.step([0], [1, 2], [3], [4])
    simulation.step([0], [3], [4])
    assert simulation.rows.tolist() == [0, 1, 2]
    assert simulation.moves == 4


def test_a_beam_that_starts_copies_nothing() -> None:
    simulation = Simulation(4, 30)
    simulation.step([-1], [-1], [-1])
    simulation.step([0], [1], [2])
    simulation.step([1], [-1, -1, -1])
    assert simulation.rows[0] == 1
    assert simulation.moves == 0


def test_what_was_not_kept_is_not_taken_for_there() -> None:
    """In the new cache row 1 has nothing of row 0's first token, though the old one had."""
    simulation = Simulation(2, 30)
    simulation.step([-1, -1])
    simulation.step([0, 0])
    assert simulation.moves == 1
    simulation.keep([0], columns=16)
    simulation.rows = np.array([0, 1])
    simulation.step([0, 0])
    assert simulation.moves == 3


# --- how much -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("needed", "current", "columns"),
    [(1, 0, 16), (16, 0, 16), (17, 0, 32), (16, 16, 16), (17, 16, 32), (100, 48, 112)],
)
def test_caches_are_widened_by_whole_blocks(needed: int, current: int, columns: int) -> None:
    assert fitted(needed, current, rows=1, entries=1024) == columns


@pytest.mark.parametrize(
    ("needed", "current", "rows", "entries", "columns"),
    [
        (49, 64, 1, 1024, 64),
        # A quarter is of no use.
        (48, 64, 1, 1024, 48),
        (1, 64, 1, 1024, 16),
        (64, 80, 3, 240, 80),
        # One row more than there are entries for at 80 columns.
        (64, 80, 3, 239, 64),
        (64, 80, 4, 256, 64),
    ],
)
def test_caches_are_narrowed_when_it_is_worth_it_or_has_to_be(
    needed: int, current: int, rows: int, entries: int, columns: int
) -> None:
    assert fitted(needed, current, rows, entries) == columns


def test_what_fits_at_all_fits_the_columns_chosen() -> None:
    choose = random.Random(0)
    for _ in range(5000):
        needed, current, rows = choose.randint(1, 300), BLOCK * choose.randint(0, 20), choose.randint(1, 24)
        entries = choose.randint(rows * in_blocks(needed), 24 * 320)
        columns = fitted(needed, current, rows, entries)
        assert columns >= needed
        assert columns % BLOCK == 0
        assert rows * columns <= entries
        # Asked again, nothing changes: caches do not change shape at every step.
        assert fitted(needed, columns, rows, entries) == columns


def test_sizes_of_base_by_hand() -> None:
    caches = CacheSizes.of(BASE, rows=24)
    assert 4 * caches.entry_values == 2 * 6 * 12 * 64 * 4 == 36_864
    assert caches.decoder_entries == 24 * 1024
    # 577 image tokens and 64 of a prompt, in whole blocks.
    assert caches.encoder_entries == 24 * 656
    assert caches.bytes == (24_576 + 15_744) * 36_864 == 1_486_356_480


@pytest.mark.parametrize(
    ("positions", "length", "decoder_columns", "encoder_columns"),
    [(1024, 200, 208, 656), (1024, 4096, 1024, 656), (600, 1024, 608, 608), (4096, 1024, 1024, 656)],
)
def test_sizes_follow_the_length_and_the_positions(
    positions: int, length: int, decoder_columns: int, encoder_columns: int
) -> None:
    caches = CacheSizes.of(replace(BASE, max_position_embeddings=positions), rows=4, length=length)
    assert caches.decoder_entries == 4 * decoder_columns
    assert caches.encoder_entries == 4 * encoder_columns


def test_half_precision_takes_half_the_memory() -> None:
    whole = CacheSizes.of(BASE, rows=24)
    assert 2 * replace(whole, itemsize=2).bytes == whole.bytes


CACHES = CacheSizes(rows=8, decoder_entries=256, encoder_entries=64, entry_values=1)


@pytest.mark.parametrize(
    ("requests", "fit"),
    [
        ([request(num_beams=8)], True),
        ([request(num_beams=8), request()], False),
        # 8 rows of 32 columns are all there is; the longest decides for every row.
        ([request(31, num_beams=8)], True),
        ([request(32, num_beams=8)], False),
        ([request(255)], True),
        ([request(256)], False),
        ([request(127), request(15)], True),
        ([request(128), request(15)], False),
        # Likewise for requests in the cross-attention caches, whatever their beams.
        ([request()] * 4, True),
        ([request()] * 5, False),
        ([request(num_beams=8, encoder_length=64)], True),
        ([request(encoder_length=65)], False),
        ([request(encoder_length=32), request()], True),
        ([request(encoder_length=33), request()], False),
    ],
)
def test_what_runs_together_fits_to_the_end(requests: list[Request], fit: bool) -> None:
    assert CACHES.hold(requests) is fit
