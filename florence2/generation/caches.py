"""How much the caches hold, and which beam's keys and values stand in which row of them.

No cache is touched here: the decoder graph copies what `Rows.place` tells it to.
"""

from collections.abc import Sequence
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
    it can; otherwise it takes a row that its request has left, and of the other's entries only those are copied that
    this doesn't hold yet.
    """

    def __init__(self, rows: int) -> None:
        # 0 is nothing known.
        self._entries = np.zeros((rows, 0), np.int64)
        self._written = 1

    def keep(self, rows: Ids, columns: int) -> None:
        """The cache was copied to new memory: only these rows came along, as the first ones, and so many columns."""
        kept = self._entries[rows, :columns]
        self._entries = np.zeros((len(self._entries), columns), np.int64)
        self._entries[: len(rows), : kept.shape[1]] = kept

    def place(self, requests: Ids, own: Ids, parents: Ids, lengths: Ids) -> tuple[Ids, Ids, Ids]:
        """For every beam, [R], which request it is of (rising), a row that this had (each beam another; -1 at its
        start), the row that it continues (-1 at its start) and how many tokens that holds -> the row of every beam from
        now on, and the entries to copy, all at once: from and to, [N, 2], row and column. The next token of every beam
        is then written to column `lengths` of its row; rows that are left over may lose their first column."""
        count = len(parents)
        rows = self._near(requests, own, parents, lengths)
        # Those who start, and those who have come to stand behind the last row.
        (out,) = ((rows < 0) | (rows >= count)).nonzero()
        if len(out):
            free = np.ones(len(self._entries), np.bool_)
            free[rows[rows >= 0]] = False
            (rows[out],) = free[:count].nonzero()
        moved_from, moved_to = self._moves(parents, rows, lengths)
        self._entries[moved_to[:, 0], moved_to[:, 1]] = self._entries[moved_from[:, 0], moved_from[:, 1]]
        self._entries[count:, 0] = 0
        self._entries[rows, lengths] = np.arange(self._written, self._written + count)
        self._written += count
        return rows, moved_from, moved_to

    def _near(self, requests: Ids, own: Ids, parents: Ids, lengths: Ids) -> Ids:
        """The first beam that continues a row keeps it; the others take what their request has left. -1 at the
        start."""
        beams = np.arange(len(parents))
        # One more, for those who start.
        first = np.full(len(self._entries) + 1, -1)
        first[parents[::-1]] = beams[::-1]
        rows = np.where(first[parents] == beams, parents, -1)
        (forked,) = ((rows < 0) & (parents >= 0)).nonzero()
        if len(forked):
            # As many of a request's rows as of its beams.
            left = own[(own >= 0) & (first[own] < 0)]
            rows[forked] = left
            self._bring_near(requests, parents, lengths, rows, forked)
        return rows

    def _bring_near(self, requests: Ids, parents: Ids, lengths: Ids, rows: Ids, forked: Ids) -> None:
        """Where beams of one request have several rows to choose from, each in turn takes the one that has most of
        it. Two beams that continue the same row copy as much either way."""
        same = requests[forked[1:]] == requests[forked[:-1]]
        choose = same & (parents[forked[1:]] != parents[forked[:-1]])
        for request in np.unique(requests[forked[1:][choose]]):
            own = forked[requests[forked] == request]
            free = rows[own]
            for beam in own:
                length = lengths[beam]
                differs = self._entries[free, :length] != self._entries[parents[beam], :length]
                nearest = differs.sum(axis=1).argmin()
                rows[beam] = free[nearest]
                free = np.delete(free, nearest)

    def _moves(self, parents: Ids, rows: Ids, lengths: Ids) -> tuple[Ids, Ids]:
        (moved,) = ((rows != parents) & (parents >= 0)).nonzero()
        if not len(moved):
            return np.zeros((0, 2), np.int64), np.zeros((0, 2), np.int64)
        sources, targets = parents[moved], rows[moved]
        columns = np.arange(lengths[moved].max())
        differs = self._entries[sources, : len(columns)] != self._entries[targets, : len(columns)]
        which, column = np.nonzero(differs & (columns < lengths[moved, None]))
        return np.stack([sources[which], column], axis=1), np.stack([targets[which], column], axis=1)
