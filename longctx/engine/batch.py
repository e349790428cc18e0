"""Packs one step into flat tensors: the rows of several sequences, one after another."""

from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass
from itertools import chain

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

NO_PAGES = np.empty(0, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Batch:
    """All chunks of one step, packed row after row: what a runner computes in one forward pass.

    `token_ids` and `positions` are [tokens]; `logits_rows` are the rows whose logits are wanted, in
    the chunks' order: the last one of each chunk that samples, all of one whose prompt is scored.
    The keys and values of the rows go to `slots` of the raw pool (rows of its pages laid end to
    end), after `fresh_pages` were zeroed. Then the `sealed_blocks` blocks that are full, in the raw
    pages `sealed_raw`, are encoded into the pages `sealed_packed[group]`.

    Two chunks: A computes its tokens 130 to 199 and samples; its blocks 2 and 3 are in raw pages 5
    and 9. B decodes its token 63, the last one of its block 0, in raw page 7.

        row           0 ... 61              62 ... 69           70
        position      130 ... 191           192 ... 199         63
        slot          5*64+2 ... 5*64+63    9*64 ... 9*64+7     7*64+63

        logits_rows   [69, 70]
        fresh_pages   [9]       begun in this step and not full at its end: A's block 3
        sealed_raw    [5, 7]    full at the end of this step: A's block 2 and B's block 0
    """

    token_ids: Tensor
    positions: Tensor
    logits_rows: Tensor
    chunks: tuple[ChunkRows, ...]
    last_chunks: tuple[ChunkRows, ...]  # cut down to the rows of `logits_rows`
    slots: PoolIndices
    fresh_pages: Tensor
    sealed_blocks: int
    sealed_raw: PoolIndices
    sealed_packed: tuple[PoolIndices, ...]

    @classmethod
    def build(cls, chunks: Items[Chunk], *, device: torch.device) -> "Batch":
        """Pack at least one chunk; the pages of all must have been allocated."""
        rows: list[ChunkRows] = []
        token_ids: list[NDArray[np.int32]] = []
        wanted: list[ChunkRows] = []
        row_end = 0
        for chunk in chunks:
            blocks, num_tokens = chunk.sequence.blocks, chunk.num_tokens
            own = list(_chunk_rows(blocks, num_tokens, row_begin=row_end))
            rows += own
            token_ids.append(blocks.tokens.slice(blocks.computed, blocks.computed + num_tokens))
            row_end += num_tokens
            if chunk.sequence.scores_prompt:
                wanted += own
            elif chunk.samples:
                wanted.append(own[-1].pick(row_end - 1))
        opening = [each for each in rows if _leaves_open_page(each)]
        sealing = [each for each in rows if each.sealed_pages]
        sealed_packed = (
            _joined(_packed_pages(each, group) for each in sealing)
            for group in range(len(rows[0].entries))
        )
        return cls(
            token_ids=to_device(np.concatenate(token_ids).astype(np.int64), device),
            positions=to_device(np.concatenate([_positions(each) for each in rows]), device),
            logits_rows=to_device(_joined(_rows(each) for each in wanted), device),
            chunks=tuple(rows),
            last_chunks=tuple(wanted),
            slots=pool_indices(np.concatenate([_slots(each) for each in rows]), device),
            fresh_pages=to_device(_joined(each.own_pages[-1:] for each in opening), device),
            sealed_blocks=sum(each.sealed_pages for each in sealing),
            sealed_raw=pool_indices(_joined(_full_pages(each) for each in sealing), device),
            sealed_packed=tuple(pool_indices(pages, device) for pages in sealed_packed),
        )


def _chunk_rows(blocks: SequenceBlocks, num_tokens: int, *, row_begin: int) -> Iterator[ChunkRows]:
    """Yield the sequence's next `num_tokens` tokens run by run, with the blocks that they see.

    Those of its answer come one by one: after a preemption several are computed in one step, and
    a kernel that attends many rows adds in another order than one that attends one, as when they
    were sampled.
    """
    layout = blocks.layout
    end = blocks.computed + num_tokens
    prompt_end = min(max(blocks.computed, blocks.prompt_tokens), end)
    runs = chain(
        layout.cut(blocks.computed, prompt_end) if prompt_end > blocks.computed else (),
        ((token, token + 1) for token in range(prompt_end, end)),
    )
    for begin, end in runs:
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


def _rows(rows: ChunkRows) -> NDArray[np.int64]:
    return np.arange(rows.row_begin, rows.row_begin + rows.rows)


def _positions(rows: ChunkRows) -> NDArray[np.int64]:
    return np.arange(rows.first_position, rows.first_position + rows.rows)


def _slots(rows: ChunkRows) -> NDArray[np.int64]:
    own_row = rows.own_row + np.arange(rows.rows)
    block, row = np.divmod(own_row, BLOCK_TOKENS)
    slots: NDArray[np.int64] = rows.own_pages[block] * BLOCK_TOKENS + row
    return slots


def _leaves_open_page(rows: ChunkRows) -> bool:
    """Whether these rows begin the last of their raw pages and do not fill it."""
    begun = rows.own_row == 0 or len(rows.own_pages) > 1
    return begun and (rows.own_row + rows.rows) % BLOCK_TOKENS != 0


def _full_pages(rows: ChunkRows) -> NDArray[np.int64]:
    return rows.own_pages[: rows.sealed_pages]


def _packed_pages(rows: ChunkRows, group: int) -> NDArray[np.int64]:
    """The pages that take the encoded `_full_pages`, in the packed pool of a layer group."""
    begin = rows.past_entries
    return rows.entries[group][begin : begin + rows.sealed_pages, PAGE]


def _joined(pages: Iterable[NDArray[np.int64]]) -> NDArray[np.int64]:
    return np.concatenate([NO_PAGES, *pages])
