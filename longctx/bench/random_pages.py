"""Contexts of random keys and values, put straight into the pools: long ones, without a prefill.

The time of attention does not depend on what the pages say, so speed at a depth may be measured
on them. One handful of pages is encoded per layer and repeated: no two places share memory.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from compress.shape import BLOCK_TOKENS
from longctx.attention.backend import ChunkRows
from longctx.kv.block_entry import ENTRY_COLUMNS, FIRST_POSITION, PAGE, ROWS
from longctx.kv.memory import KVMemory

DISTINCT_BLOCKS = 32


def fill_pages(memory: KVMemory, pages: Sequence[Sequence[int]], *, seed: int = 0) -> None:
    """Writes random KV into `pages[group]` of the packed pools, in every layer."""
    generator = torch.Generator().manual_seed(seed)
    for group, numbers in zip(memory.groups, pages, strict=True):
        targets = torch.tensor(numbers, device=memory.device)
        for layer in group.layers:
            codec = memory.codecs[layer]
            rows = torch.randn(DISTINCT_BLOCKS, *codec.shape.rows, generator=generator)
            encoded = codec.encode(rows.to(codec.shape.dtype).to(memory.device))
            pool = memory.packed_pages(layer)
            for part in torch.split(targets, DISTINCT_BLOCKS):
                pool[part] = encoded[: len(part)]


def random_chunk(memory: KVMemory, *, past_blocks: int, rows: int) -> ChunkRows:
    """Makes `rows` new tokens after `past_blocks` of random KV: written, full blocks sealed."""
    own_blocks = (rows - 1) // BLOCK_TOKENS + 1
    pages = [pool.allocate(past_blocks + own_blocks) for pool in memory.packed]
    fill_pages(memory, pages)
    own_pages = torch.tensor(memory.raw.allocate(own_blocks), device=memory.device)
    sealed = rows // BLOCK_TOKENS
    for layer, codec in enumerate(memory.codecs):
        own = torch.randn(own_blocks, *codec.shape.rows).to(codec.shape.dtype)
        memory.raw.pages[layer][own_pages] = (
            own.view(own_blocks, -1).view(torch.uint8).to(memory.device)
        )
        numbers = pages[memory.group_of[layer]][past_blocks : past_blocks + sealed]
        if sealed:
            memory.seal(layer, own_pages[:sealed], torch.tensor(numbers, device=memory.device))
    return ChunkRows(
        row_begin=0,
        rows=rows,
        first_position=past_blocks * BLOCK_TOKENS,
        own_row=0,
        own_pages=own_pages.cpu().numpy(),
        past_entries=past_blocks,
        entries=tuple(_entries(numbers) for numbers in pages),
    )


def _entries(pages: Sequence[int]) -> NDArray[np.int64]:
    entries = np.zeros((len(pages), ENTRY_COLUMNS), dtype=np.int64)
    entries[:, PAGE] = pages
    entries[:, ROWS] = BLOCK_TOKENS
    entries[:, FIRST_POSITION] = np.arange(len(pages)) * BLOCK_TOKENS
    return entries
