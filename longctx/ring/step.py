"""What one rank does in one step, as the leader plans it: rows, pages, and what is sent when.

Page numbers are those of the rank's own pools. A step holds nothing but numbers, so it travels as
msgpack. In each layer of a layer group a rank

    1. writes its rows' keys and values, seals the blocks they complete, and takes part in the
       rounds of `all_gather`, after which every rank has all new pages of a window layer;
    2. attends its rows to the pages it has (`local`);
    3. attends other ranks' rows to the pages it has (`remote_queries`);
    4. attends its rows to pages that arrive (`rounds`), while those of the next round are sent.
"""

from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from longctx.attention.backend import ChunkRows

Indices = np.ndarray  # int64; msgspec cannot read numpy's parametrized types
NO_INDICES: NDArray[np.int64] = np.empty(0, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class GroupRows:
    """Consecutive rows and the entries they attend to: `ChunkRows` of one layer group alone."""

    row_begin: int
    rows: int
    first_position: int
    own_row: int
    own_pages: Indices  # [blocks]
    past_entries: int
    entries: Indices  # [entries, ENTRY_COLUMNS]

    def chunk(self, group: int) -> ChunkRows:
        """Return the same as `ChunkRows` whose entries for this layer group are set."""
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
    """Pages are sent to one rank while others arrive from another; either may be empty.

    Arriving pages are written to `receives`, in order. Then each page `staged_to_owned[i, 0]` is
    copied to `staged_to_owned[i, 1]`, where this rank keeps what it owns, and `rows` attend to what
    has arrived.
    """

    target: int
    sends: Indices  # [pages]
    source: int
    receives: Indices  # [pages]
    staged_to_owned: Indices  # [pages, 2]
    rows: tuple[GroupRows, ...]


@dataclass(frozen=True, slots=True)
class RemoteQueries:
    """Rows that other ranks attend for this one, and rows that this one attends for them.

    `sent_rows[r]`: rows of this rank's batch whose queries go to rank r; their results are merged
    when they return. `received_counts[r]`: how many rows arrive from rank r. `rows` index all
    arriving rows laid end to end, in the order of the ranks.
    """

    sent_rows: tuple[Indices, ...]
    received_counts: tuple[int, ...]
    rows: tuple[GroupRows, ...]


@dataclass(frozen=True, slots=True)
class GroupStep:
    """What the rank does in every layer of one layer group."""

    all_gather: tuple[Round, ...]  # window layers only
    local: tuple[GroupRows, ...]
    remote_queries: RemoteQueries
    rounds: tuple[Round, ...]  # global layers only


@dataclass(frozen=True, slots=True)
class RankStep:
    """One rank's whole step.

    `token_ids`, `positions` and `slots` [rows] are as in `Batch`; a rank may have no rows at all.
    `copies` [pages, 2] (source, target) and `fresh_pages` are about the raw pool, before anything
    is written. `logits_rows`: this rank's rows whose logits are wanted. `result_rows[r]`: which
    rows of the step's logits are those of rank r; set for the leader alone.
    """

    token_ids: Indices
    positions: Indices
    slots: Indices
    copies: Indices
    fresh_pages: Indices
    sealed_raw: Indices
    sealed_packed: tuple[Indices, ...]  # per layer group
    groups: tuple[GroupStep, ...]
    last_layer: GroupStep  # in the model's last layer only rows whose logits are wanted attend
    logits_rows: Indices
    result_rows: tuple[Indices, ...]

    def encode(self) -> bytes:
        """Return the step as msgpack."""
        return _ENCODER.encode(self)

    @classmethod
    def decode(cls, body: bytes) -> "RankStep":
        """Return the step that `encode` made `body` of."""
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
