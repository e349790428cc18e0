"""The seam between the engine and attention: the rows of a step, and the backend that attends them.

Shape legend, for all of longctx: tokens = rows of the step's packed batch; blocks; block_tokens
(64); heads = query heads; kv_heads; head_dim. Order is always [tokens, heads, head_dim].

The block-causal rule: a row reads its own block raw, up to itself, and every earlier block as the
codec stored it, also when that block was sealed in the same step.

Worked example: a sequence of 100 tokens has block 0 sealed and rows 0 to 35 of block 1 raw. A step
that computes tokens 100 to 139 is one `ChunkRows`: first_position 100, own_row 36, past_entries 1,
and two own pages. Token 127 fills block 1, which the step seals into entry 1. Token 100 sees entry
0 and 37 raw rows; token 130 sees entries 0 and 1, and 3 raw rows of block 2.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from compress.shape import BLOCK_TOKENS
from longctx.kv.block_entry import Entries
from longctx.kv.memory import KVMemory
from longctx.kv.pool_indices import PoolIndices
from longctx.model.layer_attention import AttentionCall
from offload.key import BlockKey


@dataclass(frozen=True, slots=True)
class ChunkRows:
    """Consecutive rows of one sequence in the batch, and the blocks that they see.

    Row i is at position `first_position + i`, in row `own_row + i` of its own blocks laid end to
    end (`own_pages`, raw pool). A row in own block j sees `entries[: past_entries + j]` of each
    group, and the rows of own block j up to itself. Without own pages every row sees
    `entries[: past_entries]` and nothing else.

    In global (full-attention) layers the first blocks may be absent from the device: those of
    `absent_keys`, whose entries name no page. Only the first `rotated_entries` of a group, all of
    them past, may have a rotation; 0 says that none has. Backends know nothing of rotations:
    `rotated.py` gives them queries to suit. `sealed_pages` own blocks become full in this step.
    """

    row_begin: int
    rows: int
    first_position: int
    own_row: int
    own_pages: NDArray[np.int64]
    past_entries: int
    entries: tuple[Entries, ...]  # one block table for each layer group
    absent_keys: Sequence[BlockKey] = ()
    rotated_entries: int = 0
    sealed_pages: int = 0

    def pick(self, row: int) -> "ChunkRows":
        """Cut the chunk down to one of its rows, given as an index into the batch."""
        offset = row - self.row_begin
        own_block, own_row = divmod(self.own_row + offset, BLOCK_TOKENS)
        return ChunkRows(
            row_begin=row,
            rows=1,
            first_position=self.first_position + offset,
            own_row=own_row,
            own_pages=self.own_pages[own_block : own_block + 1],
            past_entries=self.past_entries + (own_block if len(self.own_pages) else 0),
            entries=self.entries,
            absent_keys=self.absent_keys,
            rotated_entries=self.rotated_entries,
        )


class AttentionPlan(Protocol):
    """Metadata that a backend derives from chunks once per step and group; opaque to others."""


class AttentionBackend(Protocol):
    """Computes attention over the pages of one `KVMemory`.

    The order of calls in a step: `plan` once for each layer group; then, layer by layer and after
    the layer's new keys and values were written, `seal` for blocks that became full, and `attend`.
    One thread makes all calls.
    """

    def plan(self, chunks: Sequence[ChunkRows], group: int) -> AttentionPlan:
        """Prepare the metadata that all layers of a group share."""
        ...

    def seal(self, layer: int, raw: PoolIndices, packed: PoolIndices) -> None:
        """Encode full raw pages into packed ones, to the same bytes as `KVMemory.seal`."""
        ...

    def attend(
        self, call: AttentionCall, query: Tensor, plan: AttentionPlan
    ) -> tuple[Tensor, Tensor]:
        """Return the attention of all rows that the plan names, but for the call's sinks.

        The caller merges those when all parts of a row are there (`merge_sink`).
        `query` [tokens, heads, head_dim] gives out [tokens, heads, head_dim] float32 and lse
        [tokens, heads] float32, natural log; rows outside the plan have out 0 and lse -inf. Where
        nothing is merged (`call.merged`), out may be in the query's type.
        """
        ...


class RegisteredBackend(AttentionBackend, Protocol):
    """A backend that is chosen by its name (`registry.BACKENDS`) and made over a memory alone."""

    # Whether every step decodes each packed page that it reads, which costs more than it saves
    # unless somebody asks for a codec. A backend whose kernels read pages as they are says False.
    decodes_pages: ClassVar[bool]

    def __init__(self, memory: KVMemory) -> None: ...


BackendFactory = type[RegisteredBackend]
