"""One step as flat tensors: rows of several sequences packed one after another."""

from collections.abc import Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compress.shape import BLOCK_TOKENS
from longctx.attention.backend import ChunkRows
from longctx.engine.scheduler import Chunk
from longctx.kv.block_entry import PAGE
from longctx.kv.pool_indices import PoolIndices, pool_indices, to_device
from longctx.kv.sequence_blocks import SequenceBlocks


@dataclass(frozen=True, slots=True)
class Batch:
    """`token_ids`, `positions` [tokens]; `logits_rows` [drawing chunks], in the chunks' order.

    New rows go to `slots` of the raw pool (rows of its pages laid end to end), after `fresh_pages`
    were zeroed; then `sealed_blocks` blocks, pages `sealed_raw`, are encoded into the pages
    `sealed_packed[group]`.
    """

    token_ids: Tensor
    positions: Tensor
    logits_rows: Tensor
    chunks: tuple[ChunkRows, ...]
    last_chunks: tuple[ChunkRows, ...]  # cut down to the rows whose logits are wanted
    slots: PoolIndices
    fresh_pages: Tensor
    sealed_blocks: int
    sealed_raw: PoolIndices
    sealed_packed: tuple[PoolIndices, ...]

    @classmethod
    def build(cls, chunks: Items[Chunk], *, device: torch.device) -> "Batch":
        """Pages for every chunk must have been allocated."""
        begins = np.cumsum([0] + [chunk.num_tokens for chunk in chunks]).tolist()
        parts = [
            tuple(_chunk_rows(chunk.sequence.blocks, chunk.num_tokens, row_begin=begin))
            for chunk, begin in zip(chunks, begins, strict=False)
        ]
        rows = tuple(row for part in parts for row in part)
        sampled = [
            (part[-1], part[-1].row_begin + part[-1].rows - 1)
            for part, chunk in zip(parts, chunks, strict=True)
            if chunk.samples
        ]
        token_ids = np.concatenate(
            [
                blocks.tokens.slice(blocks.computed, blocks.computed + num_tokens)
                for blocks, num_tokens in ((c.sequence.blocks, c.num_tokens) for c in chunks)
            ]
        )
        positions = [np.arange(r.first_position, r.first_position + r.rows) for r in rows]
        ends = [r.own_row + r.rows for r in rows]  # where the rows end in their own blocks
        sealed_raw = [r.own_pages[: r.sealed_pages] for r in rows]
        sealed_packed = [
            np.concatenate(
                [
                    r.entries[group][r.past_entries : r.past_entries + len(sealed), PAGE]
                    for r, sealed in zip(rows, sealed_raw, strict=True)
                ]
            )
            for group in range(len(rows[0].entries))
        ]
        fresh = [
            r.own_pages[-1:]
            for r, end in zip(rows, ends, strict=True)
            if end % BLOCK_TOKENS and (r.own_row == 0 or len(r.own_pages) > 1)
        ]

        return cls(
            token_ids=to_device(token_ids.astype(np.int64), device),
            positions=to_device(np.concatenate(positions), device),
            logits_rows=to_device(np.array([row for _, row in sampled], dtype=np.int64), device),
            chunks=rows,
            last_chunks=tuple(r.pick(row) for r, row in sampled),
            slots=pool_indices(np.concatenate([_slots(r) for r in rows]), device),
            fresh_pages=to_device(np.concatenate([np.empty(0, dtype=np.int64), *fresh]), device),
            sealed_blocks=sum(map(len, sealed_raw)),
            sealed_raw=pool_indices(np.concatenate(sealed_raw), device),
            sealed_packed=tuple(pool_indices(pages, device) for pages in sealed_packed),
        )


def _chunk_rows(blocks: SequenceBlocks, num_tokens: int, *, row_begin: int) -> Iterator[ChunkRows]:
    """What the sequence's next `num_tokens` tokens see, run by run."""
    layout = blocks.layout
    for begin, end in layout.cut(blocks.computed, blocks.computed + num_tokens):
        first, last = layout.blocks(begin), layout.blocks(end - 1)
        past_entries = layout.entry(first)
        own = [blocks.own_pages[block] for block in range(first, last + 1)]
        yield ChunkRows(
            row_begin=row_begin + begin - blocks.computed,
            rows=end - begin,
            first_position=layout.position(begin),
            own_row=begin - layout.tokens(first),
            own_pages=np.array(own, dtype=np.int64),
            past_entries=past_entries,
            entries=tuple(table.entries for table in blocks.tables),
            absent_keys=[blocks.key(block) for block in range(blocks.offload.absent)],
            rotated_entries=layout.rotated(past_entries),
            sealed_pages=layout.blocks(end) - first,
        )


def _slots(rows: ChunkRows) -> NDArray[np.int64]:
    own_row = rows.own_row + np.arange(rows.rows)
    block, row = np.divmod(own_row, BLOCK_TOKENS)
    slots: NDArray[np.int64] = rows.own_pages[block] * BLOCK_TOKENS + row
    return slots
