"""The encoder and decoder graphs in ONNX Runtime, for requests that come and go.

The caches stay where they are, on the device: the graphs read and change them in place (IO binding), and of a step only
the candidates come back. On a GPU the shapes of a step are rounded up to powers of two, so that few CUDA graphs serve
all.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from florence2.generation.beam_search import Candidates, Searches
from florence2.generation.caches import CacheSizes, Rows, fitted
from florence2.generation.decoder_steps import DecoderSteps
from florence2.generation.device_memory import Cache, Device, available_bytes
from florence2.generation.request import Request
from florence2.generation.seats import Seats
from florence2.generation.sessions import Options, session

Ids = NDArray[np.int64]

TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class GraphRunner:
    """Runs `encoder.onnx` once per request and `decoder.onnx` once per step of all of them.

    A running request has a slot in the cross-attention caches and a row per beam in the self-attention caches.
    """

    def __init__(
        self,
        folder: Path,
        caches: CacheSizes,
        provider: str = "cpu",
        threads: int = 0,
        cuda_graphs: int = 0,
        encoder_options: Options | None = None,
        device_id: int = 0,
    ) -> None:
        """`provider`: as in `sessions.PROVIDERS`. TensorRT runs the encoder, with `encoder_options`; the decoder's
        caches that change in place are CUDA's. `cuda_graphs`: how many are captured at most; `device_id`: on which GPU.
        Raises ValueError if graphs are STEPS or more, and for caches that don't fit."""
        self._device = Device("cpu") if provider == "cpu" else Device("cuda", device_id)
        self._rounds = self._device.kind != "cpu"
        self._encoder = session(folder / "encoder.onnx", provider, threads, encoder_options, device_id)
        self._decoder = DecoderSteps(folder / "decoder.onnx", self._device, threads, cuda_graphs)
        self._relayout = session(folder / "relayout.onnx", self._device.kind, threads, device_id=device_id)
        self._encoding = self._encoder.io_binding()
        self.features_type = TYPES[next(i.type for i in self._encoder.get_inputs() if i.name == "image_features")]
        """What the encoder's graph takes; whoever asks in that type spares the engine's thread the conversion."""
        if "beam_rows" not in (found.name for found in self._decoder.session.get_inputs()):
            raise ValueError(f"{folder} holds graphs of an earlier version: export the checkpoint again and release it")
        past = next(found for found in self._decoder.session.get_inputs() if found.name.startswith("past_key_values."))
        self.caches = caches = replace(caches, itemsize=np.dtype(TYPES[past.type]).itemsize)
        # What a GPU has left only the allocation itself tells.
        if self._device.kind == "cpu" and caches.bytes > (available := available_bytes()):
            raise ValueError(
                f"{caches} don't fit: {available / 1e6:.0f} MB are free beside the graphs; lower rows or cache_length "
                "of beam_search"
            )
        self._past = self._allocate("decoder", caches.decoder_entries)
        self._cross = self._allocate("encoder", caches.encoder_entries)
        self._past_columns = self._cross_columns = 0
        self._placement = Rows(caches.rows)
        self._seats, self._rows = Seats([], [], (0, 0)), np.zeros(0, np.int64)
        self._slots: dict[Request, int] = {}

    def _allocate(self, kind: str, entries: int) -> dict[str, Cache]:
        """Under the decoder's input names."""
        return {
            found.name: Cache(entries, found.shape[1], found.shape[3], TYPES[found.type], self._device, self._relayout)
            for found in self._decoder.session.get_inputs()
            if found.name.endswith((f".{kind}.key", f".{kind}.value"))
        }

    def encode(self, requests: Sequence[Request]) -> None:
        """Gives each a slot and fills it. Slots side by side are filled in one run, prompts padded to the columns."""
        self._widen_cross([*self._slots, *requests])
        free = np.setdiff1d(np.arange(self.caches.rows), list(self._slots.values()))[: len(requests)].tolist()
        self._slots |= dict(zip(requests, free, strict=True))
        first = 0
        for last in range(1, len(free) + 1):
            if last == len(free) or free[last] != free[last - 1] + 1:
                self._run_encoder(requests[first:last], free[first])
                first = last

    def _run_encoder(self, requests: Sequence[Request], slot: int) -> None:
        binding = self._encoding
        input_ids = np.zeros((len(requests), self._cross_columns - len(requests[0].image_features)), np.int64)
        attention_mask = np.zeros_like(input_ids)
        for row, mask, request in zip(input_ids, attention_mask, requests, strict=True):
            row[: len(request.prompt_ids)] = request.prompt_ids
            mask[: len(request.prompt_ids)] = 1
        features = np.stack([request.image_features for request in requests])
        binding.bind_cpu_input("image_features", features.astype(self.features_type, copy=False))
        binding.bind_cpu_input("input_ids", input_ids)
        binding.bind_cpu_input("attention_mask", attention_mask)
        for name, cache in self._cross.items():
            cache.bind(binding, len(requests), first=slot, output=name.replace("past_key_values", "present"))
        self._encoder.run_with_iobinding(binding)

    def decode(self, searches: Sequence[Searches[Request]]) -> list[Candidates]:
        """One step of all of them -> for each candidate ids and log-probabilities [N, K, C], best first."""
        self._seat([request for group in searches for request in group.requests])
        seats = self._seats
        continued = np.concatenate([group.beam_indices.reshape(-1) for group in searches]) + seats.first_beams
        lengths = np.concatenate([np.repeat(group.lengths, group.num_beams) for group in searches]) - 1
        own, parents = self._widen_past(self._rows, self._rows[continued], int(lengths.max()) + 1)
        rows, moved_from, moved_to = self._placement.place(seats.first_beams, own, parents, lengths)
        self._rows = rows
        # Rows that are read for the last time go along, with any token.
        count = max(len(rows), int(parents.max()) + 1)
        count = self._rounded(count, min(self.caches.rows, self.caches.decoder_entries // self._past_columns))
        positions, input_ids, row_beams = np.zeros((3, count), np.int64)
        positions[rows] = lengths
        input_ids[rows] = np.concatenate([group.input_ids.reshape(-1) for group in searches])
        row_beams[rows] = seats.places
        beam_rows = np.zeros((len(seats.mask), seats.beams), np.int64)
        beam_rows.reshape(-1)[seats.places] = rows
        feeds = {
            "input_ids": input_ids,
            "positions": positions,
            "banned_token_ids": self._banned(searches, count),
            # Twice the same entry moved to the same place is as good as once.
            "moved_from": _repeated_last(moved_from),
            "moved_to": _repeated_last(moved_to),
            "beam_rows": beam_rows,
            "row_beams": row_beams,
            "encoder_attention_mask": seats.mask,
        }
        # A row that is moved from, and not one of the beams' any more, loses its first column to what runs before.
        may_capture = not (moved_from[:, 0] >= len(rows)).any()
        columns = self._past_columns, self._cross_columns
        ids, logprobs = self._decoder.run(feeds, self._past, self._cross, columns, may_capture)
        return list(_by_search(searches, ids[rows], logprobs[rows]))

    def clear(self, request: Request) -> None:
        """Its slot and rows hold zeros: a masked entry still meets a weight of 0, and 0 times NaN is NaN."""
        for cache in self._cross.values():
            cache.clear(self._slots[request])
        for row in self._seats.rows_of(request, self._rows).tolist():
            for cache in self._past.values():
                cache.clear(row)

    def release(self, request: Request) -> None:
        """Its slot and rows are free from now on."""
        self._slots.pop(request, None)
        if not self._slots:
            self._seats, self._rows = Seats([], [], (0, 0)), np.zeros(0, np.int64)

    def cross_attention(self, request: Request) -> dict[str, NDArray[Any]]:
        """The keys and values [heads, S, head_dim] that were made of its picture and prompt, under the decoder's input
        names."""
        slot, length = self._slots[request], request.encoder_length
        return {name: cache.read(slot)[:, :length] for name, cache in self._cross.items()}

    @property
    def _slots_used(self) -> int:
        """Counted up to the last one in use."""
        return max(self._slots.values(), default=-1) + 1

    def _seat(self, requests: list[Request]) -> None:
        """Those who take part in a step; who took part in the one before keeps its rows."""
        slots = [self._slots.get(request, -1) for request in requests]
        if -1 in slots:
            raise MemoryError("what cross-attention reads was lost: memory ran out while another request joined")
        if 2 * len(self._slots) <= self._slots_used:
            self._reshape_cross(self._cross_columns)
            slots = [self._slots[request] for request in requests]
        most = min(self.caches.rows, self.caches.encoder_entries // self._cross_columns)
        shape = self._rounded(self._slots_used, most), self._cross_columns
        if self._seats.are(requests, slots, shape):
            return
        rows = {request: self._seats.rows_of(request, self._rows) for request in self._seats.requests}
        self._rows = np.concatenate([rows.get(request, np.full(request.num_beams, -1)) for request in requests])
        self._seats = Seats(requests, slots, shape)

    def _widen_past(self, own: Ids, parents: Ids, needed: int) -> tuple[Ids, Ids]:
        """Caches with room for `needed` columns -> both kinds of rows by their new numbers."""
        columns = fitted(needed, self._past_columns, len(parents), self.caches.decoder_entries, self.caches.block)
        if columns == self._past_columns:
            return own, parents
        kept = np.unique(own[own >= 0])
        # Until all have changed, there are no caches: if memory runs out half-way, the next ones start afresh.
        self._past_columns = 0
        for cache in self._past.values():
            cache.reshape(kept, columns)
        self._placement.keep(kept, columns)
        self._past_columns = columns
        own, parents = (np.where(rows < 0, -1, np.searchsorted(kept, rows)) for rows in (own, parents))
        return own, parents

    def _widen_cross(self, requests: Sequence[Request]) -> None:
        needed = max(request.encoder_length for request in requests)
        slots = max(self._slots_used, len(requests))
        columns = fitted(needed, self._cross_columns, slots, self.caches.encoder_entries, self.caches.block)
        if columns != self._cross_columns:
            self._reshape_cross(columns)

    def _reshape_cross(self, columns: int) -> None:
        """To other columns, and without gaps between the slots in use."""
        slots, self._slots, self._cross_columns = self._slots, {}, 0
        # Until all have changed, nobody has a slot: if memory runs out half-way, the next ones start afresh.
        for cache in self._cross.values():
            cache.reshape(np.array(list(slots.values()), np.int64), columns)
        self._slots = {request: slot for slot, request in enumerate(slots)}
        self._cross_columns = columns

    def _rounded(self, count: int, most: int) -> int:
        """On a GPU up to a power of two, which costs next to nothing there and makes shapes come again."""
        return min(_power_of_two(count), most) if self._rounds else count

    def _banned(self, searches: Sequence[Searches[Request]], count: int) -> Ids:
        """[`count`, M], a row of it for each row of the caches."""
        pairs = [group.banned_tokens() for group in searches]
        firsts = np.cumsum([0, *(group.num_beams * len(group.requests) for group in searches)]).tolist()
        beams = np.concatenate([own + first for (own, _), first in zip(pairs, firsts, strict=False)])
        if not len(beams):
            return np.full((count, 1), -1)
        tokens = np.concatenate([own for _, own in pairs])
        many = np.bincount(beams, minlength=len(self._rows))
        banned = np.full((count, _power_of_two(int(many.max()))), -1)
        before = np.cumsum(many) - many
        banned[self._rows[beams], np.arange(len(beams)) - before[beams]] = tokens
        return banned


def _by_search(searches: Sequence[Searches[Request]], ids: Ids, logprobs: NDArray[np.float32]) -> Iterator[Candidates]:
    """[R, C] of all beams -> [N, K, C] of each search's."""
    first = 0
    for group in searches:
        shape = len(group.requests), group.num_beams, ids.shape[1]
        last = first + shape[0] * shape[1]
        yield ids[first:last].reshape(shape), logprobs[first:last].reshape(shape)
        first = last


def _power_of_two(count: int) -> int:
    """At least `count`, and 1."""
    return 1 << max(count - 1, 0).bit_length()


def _repeated_last(entries: Ids) -> Ids:
    """[N, 2] -> N a power of two, or still 0."""
    missing = _power_of_two(len(entries)) - len(entries) if len(entries) else 0
    return np.concatenate([entries, np.repeat(entries[-1:], missing, axis=0)])
