"""How much the caches hold, and which beam's keys and values stand in which row of them.

No cache is touched here: the decoder graph copies what `Rows.place` tells it to.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from florence2.generation.request import Request
from florence2.manifest import Sizes

Ids = NDArray[np.int64]

BLOCK = 16
"""Caches are widened by so many columns at a time, if nothing else is said: every widening copies them once."""
PROMPT_ROOM = 64
"""Prompt tokens that every request can have at once; longer prompts have room when fewer requests run."""


@dataclass(frozen=True)
class CacheSizes:
    """What the caches hold at most. An entry is the keys and values of one token in every decoder layer."""

    rows: int
    """Beams that can run at once."""
    decoder_entries: int
    """Self-attention: rows x tokens of the longest."""
    encoder_entries: int
    """Cross-attention: requests x image tokens and prompt of the longest."""
    entry_values: int
    """Numbers in an entry."""
    itemsize: int = 4
    """Bytes of a number."""
    block: int = BLOCK
    """Columns by which caches are widened."""

    @classmethod
    def of(
        cls, sizes: Sizes, rows: int, length: int = 1024, requests: int | None = None, block: int = BLOCK
    ) -> "CacheSizes":
        """Room for `rows` beams of `length` tokens each, or of fewer if the checkpoint has fewer positions, that belong
        to so many `requests`; left out, every row may be a request of its own."""
        length = min(length, sizes.max_position_embeddings)
        encoder_length = min(sizes.image_tokens + PROMPT_ROOM, sizes.max_position_embeddings)
        return cls(
            rows=rows,
            decoder_entries=rows * in_blocks(length, block),
            encoder_entries=(requests or rows) * in_blocks(encoder_length, block),
            entry_values=2 * sizes.decoder_layers * sizes.decoder_attention_heads * sizes.head_dim,
            block=block,
        )

    @property
    def bytes(self) -> int:
        return (self.decoder_entries + self.encoder_entries) * self.entry_values * self.itemsize

    def __str__(self) -> str:
        return (
            f"caches of at most {self.bytes / 1e6:.0f} MB: {self.rows} rows (beams) with {self.decoder_entries} tokens "
            f"in all, {self.encoder_entries} tokens of pictures and prompts"
        )

    def hold(self, requests: Sequence[Request]) -> bool:
        """Whether these requests can run together to the end, whatever they generate."""
        rows = sum(request.num_beams for request in requests)
        columns = in_blocks(max(request.settings.max_length for request in requests), self.block)
        encoder_columns = in_blocks(max(request.encoder_length for request in requests), self.block)
        return (
            rows <= self.rows
            and rows * columns <= self.decoder_entries
            and len(requests) * encoder_columns <= self.encoder_entries
        )


def in_blocks(columns: int, block: int = BLOCK) -> int:
    return -(-columns // block) * block


def fitted(needed: int, current: int, rows: int, entries: int, block: int = BLOCK) -> int:
    """How many columns a cache of `rows` is to have that has `current` of them and needs `needed`. Narrowed only when a
    quarter of it is of no use, or when its `entries` would not do."""
    columns = in_blocks(needed, block)
    return columns if columns > current or 4 * columns <= 3 * current or rows * current > entries else current


class Rows:
    """Which row of the self-attention cache holds what: R beams are always rows 0 to R - 1.

    Every token's keys and values get a number when they are written. A beam that continues another row's stays there if
    it can; otherwise it takes a free row, and of the other's entries only those are copied that this doesn't hold yet.
    """

    def __init__(self, rows: int, columns: int) -> None:
        # 0 is nothing known; zeros take no memory until they are written.
        self._entries = np.zeros((rows, columns), np.int64)
        self._written = 1

    def keep(self, rows: Ids, columns: int) -> None:
        """The cache was copied to new memory: only these rows came along, as the first ones, and so many columns."""
        kept = self._entries[rows, :columns]
        self._entries = np.zeros_like(self._entries)
        self._entries[: len(rows), :columns] = kept

    def place(self, parents: Ids, lengths: Ids) -> tuple[Ids, Ids, Ids]:
        """For every beam the row that it continues (-1 at its start) and how many tokens that holds -> the row of every
        beam from now on, and the entries to copy, all at once: from and to, [N, 2], row and column. The next token of
        every beam is then written to column `lengths` of its row; rows that are left over may lose their first column.
        """
        count = len(parents)
        rows = self._stay(parents)
        taken = np.zeros(count, np.bool_)
        taken[rows[rows >= 0]] = True
        free = np.flatnonzero(~taken)
        moves: list[tuple[int, int, Ids]] = []
        for beam in np.flatnonzero((rows < 0) & (parents >= 0)):
            parent, length = parents[beam], lengths[beam]
            differs = self._entries[free, :length] != self._entries[parent, :length]
            nearest = differs.sum(axis=1).argmin()
            rows[beam] = free[nearest]
            moves.append((parent, free[nearest], np.flatnonzero(differs[nearest])))
            free = np.delete(free, nearest)
        rows[rows < 0] = free
        moved_from = _entries_of((parent, columns) for parent, _, columns in moves)
        moved_to = _entries_of((row, columns) for _, row, columns in moves)
        self._entries[tuple(moved_to.T)] = self._entries[tuple(moved_from.T)]
        self._entries[count:, 0] = 0
        self._entries[rows, lengths] = np.arange(self._written, self._written + count)
        self._written += count
        return rows, moved_from, moved_to

    @staticmethod
    def _stay(parents: Ids) -> Ids:
        """The first beam that continues a row keeps it, if that is among the first; -1 for all others."""
        rows = np.full(len(parents), -1)
        continued, first = np.unique(parents, return_index=True)
        stays = (continued >= 0) & (continued < len(parents))
        rows[first[stays]] = continued[stays]
        return rows


def _entries_of(pieces: Iterable[tuple[int, Ids]]) -> Ids:
    found = [np.stack([np.full_like(columns, row), columns], axis=1) for row, columns in pieces]
    return np.concatenate(found) if found else np.zeros((0, 2), np.int64)
