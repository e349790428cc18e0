"""Which rank owns which blocks of a sequence, and which rank computes which rows of a chunk.

Ownership holds in global (full-attention) layers: a block stays on the rank that owns its extent of
16 blocks until it is evicted. Extents are assigned to ranks in snake (boustrophedon) order, because
more rows attend to early extents than to late ones: each rank gets as many early as late ones. With
3 ranks

    extent   0  1  2  3  4  5  6  7 ...
    owner    0  1  2  2  1  0  0  1 ...

A chunk that completes at least R blocks is split zigzag into 2R runs, of which rank r computes runs
r and 2R-1-r, because late rows attend to more keys than early ones. 3 ranks and blocks 0 to 19:

    run      0    1    2    3      4      5
    blocks   0-2  3-5  6-9  10-12  13-15  16-19
    rank     0    1    2    2      1      0

In smaller chunks, decode above all, each row is computed by the owner of its block. So are the rows
of a block that a chunk only begins or completes: an incomplete block is always at its owner.

Source of the pairing: zigzag ring attention, https://arxiv.org/abs/2411.01783 section 3.2
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from compress.shape import BLOCK_TOKENS
from offload.block_run import EXTENT_BLOCKS


def owners(blocks: NDArray[np.int64], ranks: int) -> NDArray[np.int64]:
    """Return the owner of each block; `blocks` are indices into the sequence."""
    turn, place = np.divmod(blocks // EXTENT_BLOCKS, ranks)
    owning: NDArray[np.int64] = np.where(turn % 2, ranks - 1 - place, place)
    return owning


def owner(block: int, ranks: int) -> int:
    """Return the owner of one block, as `owners` does of many."""
    turn, place = divmod(block // EXTENT_BLOCKS, ranks)
    return ranks - 1 - place if turn % 2 else place


def count_owned(first: int, end: int, ranks: int) -> list[int]:
    """Count the blocks of [first, end) that each rank owns.

    3 ranks and blocks 0 to 69: [16, 22, 32].
    """
    counts: list[int] = np.bincount(owners(np.arange(first, end), ranks), minlength=ranks).tolist()
    return counts


def capacity_blocks(blocks_per_rank: int, ranks: int) -> int:
    """Return the blocks of the longest sequence of which no rank owns more than `blocks_per_rank`.

    3 ranks with 40 blocks each: 6 extents fill 32 blocks on every rank; the next one is rank 0's,
    which has room for 8 more. So 104 blocks.
    """
    extents, rest = divmod(blocks_per_rank, EXTENT_BLOCKS)
    return extents * EXTENT_BLOCKS * ranks + rest


@dataclass(frozen=True, slots=True)
class ChunkPart:
    """Consecutive rows of a chunk that one rank computes: positions [begin, end)."""

    rank: int
    begin: int
    end: int

    @property
    def rows(self) -> int:
        return self.end - self.begin

    @property
    def sealed_blocks(self) -> range:
        """Blocks that these rows complete."""
        return range(self.begin // BLOCK_TOKENS, self.end // BLOCK_TOKENS)

    @property
    def touched_blocks(self) -> range:
        """Blocks that hold at least one of these rows."""
        return range(self.begin // BLOCK_TOKENS, (self.end - 1) // BLOCK_TOKENS + 1)


def is_zigzag(begin: int, end: int, ranks: int) -> bool:
    """Return whether rows [begin, end) are split among all ranks: R whole blocks are enough."""
    return end // BLOCK_TOKENS - -(-begin // BLOCK_TOKENS) >= ranks


def split_chunk(begin: int, end: int, ranks: int) -> list[ChunkPart]:
    """Split rows [begin, end) among the ranks; the parts are in the order of their rows."""
    if not is_zigzag(begin, end, ranks):
        return _split_by_owner(begin, end, ranks)
    first, last = -(-begin // BLOCK_TOKENS), end // BLOCK_TOKENS  # whole blocks
    parts = _split_by_owner(begin, first * BLOCK_TOKENS, ranks)
    runs = 2 * ranks
    # Runs differ by a block where they must; which ones are longer changes from chunk to chunk.
    phase = first % runs
    borders = [first + ((last - first) * run + phase) // runs for run in range(runs + 1)]
    for run, (run_begin, run_end) in enumerate(pairwise(borders)):
        if run_begin < run_end:
            rank = min(run, runs - 1 - run)
            parts.append(ChunkPart(rank, run_begin * BLOCK_TOKENS, run_end * BLOCK_TOKENS))
    return parts + _split_by_owner(last * BLOCK_TOKENS, end, ranks)


def _split_by_owner(begin: int, end: int, ranks: int) -> list[ChunkPart]:
    """Split rows [begin, end) where the owner changes: at most at every extent."""
    parts: list[ChunkPart] = []
    extent_tokens = EXTENT_BLOCKS * BLOCK_TOKENS
    while begin < end:
        until = min(end, (begin // extent_tokens + 1) * extent_tokens)
        parts.append(ChunkPart(owner(begin // BLOCK_TOKENS, ranks), begin, until))
        begin = until
    return parts
