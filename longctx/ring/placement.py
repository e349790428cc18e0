"""Who keeps which blocks of a sequence, and who computes which rows of a chunk.

Blocks that every later row sees stay for good on the rank that owns their extent. Extents go to
the ranks to and fro (0 1 2 3 3 2 1 0 0 ...): early extents are seen by more rows than late ones,
and so each rank has as many of both. A chunk with enough new blocks is cut into 2R runs; rank r
computes runs r and 2R-1-r, because late rows see more keys than early ones. Otherwise, as in
decode, rows are computed where their blocks will stay. A block that is still open is always filled
there.

Source of the pairing: zigzag ring attention, https://arxiv.org/abs/2411.01783 section 3.2
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from compress.shape import BLOCK_TOKENS
from offload.block_run import EXTENT_BLOCKS


def owners(blocks: NDArray[np.int64], ranks: int) -> NDArray[np.int64]:
    """The ranks that keep these blocks (their numbers in the sequence)."""
    turn, place = np.divmod(blocks // EXTENT_BLOCKS, ranks)
    owning: NDArray[np.int64] = np.where(turn % 2, ranks - 1 - place, place)
    return owning


def owner(block: int, ranks: int) -> int:
    turn, place = divmod(block // EXTENT_BLOCKS, ranks)
    return ranks - 1 - place if turn % 2 else place


def owned(first: int, end: int, ranks: int) -> list[int]:
    """How many of the blocks from `first` to before `end` each rank keeps."""
    counts: list[int] = np.bincount(owners(np.arange(first, end), ranks), minlength=ranks).tolist()
    return counts


def capacity(blocks_per_rank: int, ranks: int) -> int:
    """Blocks of the longest sequence of which no rank has to keep more than so many."""
    extents, rest = divmod(blocks_per_rank, EXTENT_BLOCKS)
    return extents * EXTENT_BLOCKS * ranks + rest


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of a chunk that one rank computes: positions `begin` to before `end`."""

    rank: int
    begin: int
    end: int

    @property
    def rows(self) -> int:
        return self.end - self.begin

    @property
    def sealed(self) -> range:
        """Blocks that these rows fill."""
        return range(self.begin // BLOCK_TOKENS, self.end // BLOCK_TOKENS)

    @property
    def touched(self) -> range:
        """Blocks that these rows lie in."""
        return range(self.begin // BLOCK_TOKENS, (self.end - 1) // BLOCK_TOKENS + 1)


def is_zigzag(begin: int, end: int, ranks: int) -> bool:
    """Whether these rows are shared by all ranks: with fewer blocks there is little to share."""
    return end // BLOCK_TOKENS - -(-begin // BLOCK_TOKENS) >= ranks


def parts(begin: int, end: int, ranks: int) -> list[Part]:
    """The rows from `begin` to before `end`, cut among ranks, in order."""
    if not is_zigzag(begin, end, ranks):
        return _by_owner(begin, end, ranks)
    first, last = -(-begin // BLOCK_TOKENS), end // BLOCK_TOKENS  # whole blocks
    cut = _by_owner(begin, first * BLOCK_TOKENS, ranks)
    runs = 2 * ranks
    # Runs differ by a block where they must; which ones have it changes from chunk to chunk.
    phase = first % runs
    borders = [first + ((last - first) * run + phase) // runs for run in range(runs + 1)]
    for run, (run_begin, run_end) in enumerate(pairwise(borders)):
        if run_begin < run_end:
            rank = min(run, runs - 1 - run)
            cut.append(Part(rank, run_begin * BLOCK_TOKENS, run_end * BLOCK_TOKENS))
    return cut + _by_owner(last * BLOCK_TOKENS, end, ranks)


def _by_owner(begin: int, end: int, ranks: int) -> list[Part]:
    cut: list[Part] = []
    while begin < end:
        extent = EXTENT_BLOCKS * BLOCK_TOKENS
        until = min(end, (begin // extent + 1) * extent)
        cut.append(Part(owner(begin // BLOCK_TOKENS, ranks), begin, until))
        begin = until
    return cut
