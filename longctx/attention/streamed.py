"""Lets any backend attend to contexts larger than the device, a few staging pages at a time.

A chunk's oldest blocks may be absent (`ChunkRows.absent_keys`). They are attended tile by tile:
while one tile is attended in its half of the staging pages, a thread reads the next one into the
other half. `merge` makes the union of all exact, so the answer is the one that a device large
enough would give. Every step reads every absent block of every layer once: the disk's speed limits
it.

Worked example: with 8 staging pages and 10 absent blocks the tiles are blocks 0 to 3 in the first
half, 4 to 7 in the second and 8 to 9 in the first. Tile 0 is read while the present blocks are
attended, tile 1 while tile 0 is attended, and tile 2 while tile 1 is.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from compress.shape import BLOCK_TOKENS
from longctx.attention.backend import AttentionBackend, AttentionPlan, ChunkRows
from longctx.attention.merge import merge
from longctx.errors import BlocksLost
from longctx.kv.block_entry import ENTRY_COLUMNS, FIRST_POSITION, PAGE, ROWS
from longctx.kv.memory import KVMemory
from longctx.kv.pool_indices import PoolIndices
from longctx.model.layer_attention import AttentionCall
from offload.key import BlockKey

ReadPages = Callable[[int, Sequence[BlockKey], Sequence[int]], bool]
"""Called as (layer, keys, pages), from a thread: fill these packed pages of the layer.

Returns whether all blocks could be read.
"""


@dataclass(frozen=True, slots=True)
class _Tile:
    keys: tuple[BlockKey, ...]
    pages: list[int]
    plan: AttentionPlan


@dataclass(frozen=True, slots=True)
class _Plan:
    present: AttentionPlan
    tiles: tuple[_Tile, ...]


class StreamedAttention:
    """An `AttentionBackend` around another one, which reads absent blocks through staging pages.

    It owns one thread for reading; its methods are called from the engine's thread alone.
    """

    def __init__(
        self, inner: AttentionBackend, memory: KVMemory, staging: Sequence[int], read: ReadPages
    ) -> None:
        """Wrap `inner`; `staging` are pages of the first group's packed pool for its own use."""
        self._inner = inner
        self._memory = memory
        self._read = read
        half = len(staging) // 2
        self._halves = (list(staging[:half]), list(staging[half : 2 * half]))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="longctx-stream")

    def plan(self, chunks: Sequence[ChunkRows], group: int) -> AttentionPlan:
        """Plan the present blocks and the tiles of absent ones, if the group may have any."""
        if self._memory.groups[group].window is not None or not any(c.absent_keys for c in chunks):
            return self._inner.plan(chunks, group)
        present = self._inner.plan([_present(chunk, group) for chunk in chunks], group)
        tiles: list[_Tile] = []
        for chunk in chunks:
            for begin in range(0, len(chunk.absent_keys), len(self._halves[0])):
                pages = self._halves[len(tiles) % 2]
                keys = tuple(chunk.absent_keys[begin : begin + len(pages)])
                tile = _tile(chunk, group, begin, pages[: len(keys)])
                tiles.append(_Tile(keys, pages[: len(keys)], self._inner.plan([tile], group)))
        return _Plan(present, tuple(tiles))

    def seal(self, layer: int, raw: PoolIndices, packed: PoolIndices) -> None:
        self._inner.seal(layer, raw, packed)

    def attend(self, call: AttentionCall, query: Tensor, plan: object) -> tuple[Tensor, Tensor]:
        """Attend as any backend does; raises BlocksLost where an absent block cannot be read."""
        if not isinstance(plan, _Plan):
            return self._inner.attend(call, query, plan)
        call = replace(call, merged=True)
        reading = self._begin(call.layer, plan.tiles[0])
        try:
            out, lse = self._inner.attend(call, query, plan.present)
            for number, tile in enumerate(plan.tiles):
                if not reading.result():
                    raise BlocksLost(
                        "blocks of this context can no longer be read from a lower tier"
                    )
                if number + 1 < len(plan.tiles):
                    reading = self._begin(call.layer, plan.tiles[number + 1])
                tile_out, tile_lse = self._inner.attend(call, query, tile.plan)
                out, lse = merge(out, lse, tile_out, tile_lse)
        finally:
            reading.exception()  # wait: no read may go into pages that others have by then
        return out, lse

    def _begin(self, layer: int, tile: _Tile) -> "Future[bool]":
        return self._thread.submit(self._read, layer, tile.keys, tile.pages)


def _present(chunk: ChunkRows, group: int) -> ChunkRows:
    """Leave out the chunk's absent blocks."""
    absent = len(chunk.absent_keys)
    entries = tuple(
        table[absent:] if index == group else table for index, table in enumerate(chunk.entries)
    )
    return replace(chunk, past_entries=chunk.past_entries - absent, entries=entries)


def _tile(chunk: ChunkRows, group: int, begin: int, pages: list[int]) -> ChunkRows:
    """Let the chunk's rows see absent blocks alone, which are in `pages` from block `begin` on."""
    entries = np.zeros((len(pages), ENTRY_COLUMNS), dtype=np.int64)
    entries[:, PAGE] = pages
    entries[:, ROWS] = BLOCK_TOKENS
    entries[:, FIRST_POSITION] = (begin + np.arange(len(pages))) * BLOCK_TOKENS
    tables = tuple(
        entries if index == group else table for index, table in enumerate(chunk.entries)
    )
    return replace(
        chunk,
        own_pages=chunk.own_pages[:0],
        past_entries=len(pages),
        entries=tables,
        absent_keys=(),
    )
