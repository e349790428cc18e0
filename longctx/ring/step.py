"""What one rank does in one step, as the leader tells it: rows, pages, and what travels when.

Pages are those of the rank's own pools. Everything is plain numbers, so a step travels as msgpack.
In each layer group a rank

    seals its new blocks and takes part in the rounds of `gathers`,
    attends its rows against what it has (`local`),
    attends other ranks' rows against what it has (`queries`),
    and attends its rows against pages that pass by (`rounds`), the next of which is on its way.
"""

from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from longctx.attention.backend import ChunkRows

Indices = np.ndarray  # int64; msgspec cannot read numpy's parametrized types
NONE: NDArray[np.int64] = np.empty(0, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Rows:
    """Consecutive rows and what they see of one layer group: `ChunkRows` of that group alone."""

    row_begin: int
    rows: int
    first_position: int
    own_row: int
    own_pages: Indices  # [blocks]
    past_entries: int
    entries: Indices  # [entries, ENTRY_COLUMNS]

    def chunk(self, group: int) -> ChunkRows:
        return ChunkRows(
            row_begin=self.row_begin,
            rows=self.rows,
            first_position=self.first_position,
            own_row=self.own_row,
            own_pages=self.own_pages,
            past_entries=self.past_entries,
            entries=(self.entries,) * (group + 1),
        )


@dataclass(frozen=True, slots=True)
class Round:
    """Pages go to one rank while others come from another; empty where there are none.

    What comes lands in the pages `receives`; then each page `kept[i, 0]` is copied to `kept[i, 1]`,
    and `rows` see what has come.
    """

    target: int
    sends: Indices  # [pages]
    source: int
    receives: Indices  # [pages]
    kept: Indices  # [pages, 2]
    rows: tuple[Rows, ...]


@dataclass(frozen=True, slots=True)
class Queries:
    """Rows that other ranks attend for this one, and those that it attends for them.

    `asks[r]`: rows of the batch whose queries go to rank r; the results are merged when they come
    back. `answers[r]`: how many rows come from rank r. All that come, laid end to end, are the rows
    that `rows` means.
    """

    asks: tuple[Indices, ...]
    answers: tuple[int, ...]
    rows: tuple[Rows, ...]


@dataclass(frozen=True, slots=True)
class GroupStep:
    """One layer group's share of the step."""

    gathers: tuple[Round, ...]
    local: tuple[Rows, ...]
    queries: Queries
    rounds: tuple[Round, ...]


@dataclass(frozen=True, slots=True)
class RankStep:
    """`token_ids`, `positions`, `slots` [rows], as in `Batch`; a rank may have no rows at all.

    `copies` [pages, 2] (source, target) and `fresh_pages` concern the raw pool, before anything is
    written. `logits_rows`: this rank's rows whose logits are wanted. `logits_of[r]`: where those of
    rank r stand in the step's result; at the leader alone.
    """

    token_ids: Indices
    positions: Indices
    slots: Indices
    copies: Indices
    fresh_pages: Indices
    sealed_raw: Indices
    sealed_packed: tuple[Indices, ...]  # per group
    groups: tuple[GroupStep, ...]
    last: GroupStep  # of the last layer, where only rows whose logits are wanted are attended
    logits_rows: Indices
    logits_of: tuple[Indices, ...]

    def encode(self) -> bytes:
        return _ENCODER.encode(self)

    @classmethod
    def decode(cls, body: bytes) -> "RankStep":
        return _DECODER.decode(body)


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return (value.shape, np.ascontiguousarray(value).tobytes())
    raise TypeError(f"{type(value).__name__} cannot be sent")


def _array(kind: type, value: Any) -> NDArray[np.int64]:
    shape, body = value
    return np.frombuffer(body, dtype=np.int64).reshape(shape).copy()


_ENCODER = msgspec.msgpack.Encoder(enc_hook=_plain)
_DECODER = msgspec.msgpack.Decoder(RankStep, dec_hook=_array)
