"""Which tiles the past of a chunk is cut into."""

import numpy as np
import torch

from compress.shape import BLOCK_TOKENS
from longctx.attention.backend import ChunkRows
from longctx.attention.torch_plan import plan_tiles
from longctx.kv.block_entry import ENTRY_COLUMNS, FIRST_POSITION, PAGE, ROWS


def past_of(pages: list[int], *, rows: int) -> ChunkRows:
    """Rows without own blocks that see whole past blocks in these pages."""
    entries = np.zeros((len(pages), ENTRY_COLUMNS), dtype=np.int64)
    entries[:, PAGE] = pages
    entries[:, ROWS] = BLOCK_TOKENS
    entries[:, FIRST_POSITION] = np.arange(len(pages)) * BLOCK_TOKENS
    return ChunkRows(
        row_begin=0,
        rows=rows,
        first_position=len(pages) * BLOCK_TOKENS,
        own_row=0,
        own_pages=np.empty(0, dtype=np.int64),
        past_entries=len(pages),
        entries=(entries,),
    )


def tiles_of(pages: list[int]) -> list[list[int]]:
    """The pages of each tile; 1,024 rows may have 32 blocks in a tile, by 2^21 scores."""
    tiles = plan_tiles(
        [past_of(pages, rows=1024)],
        0,
        window=None,
        lossless=True,
        in_place=True,
        device=torch.device("cpu"),
    )
    assert [tile.first for tile in tiles] == [True] + [False] * (len(tiles) - 1)
    return [
        list(range(tile.packed.start, tile.packed.stop))
        if isinstance(tile.packed, slice)
        else tile.packed.tolist()
        for tile in tiles
        if tile.packed is not None
    ]


def test_long_runs_of_pages_are_tiles_of_their_own() -> None:
    run = list(range(20, 60))
    assert tiles_of([5, 9, *run, 7]) == [[5, 9], run[:32], run[32:], [7]]


def test_short_runs_are_gathered_with_the_pages_beside_them() -> None:
    pages = [5, *range(20, 35), 9, 10]
    assert tiles_of(pages) == [pages]


def test_a_context_that_is_one_run_is_read_in_place() -> None:
    pages = list(range(3, 40))
    assert tiles_of(pages) == [pages[:32], pages[32:]]
