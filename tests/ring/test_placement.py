"""Who owns what and who computes what: each rank a fair share, nothing twice."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.shape import BLOCK_TOKENS
from longctx.ring import placement
from longctx.ring.comm_cost import new_pages_sent
from offload.block_run import EXTENT_BLOCKS

RANKS = st.integers(2, 8)


@given(ranks=RANKS, blocks=st.integers(0, 2000))
def test_each_rank_owns_its_share_within_one_extent(ranks: int, blocks: int) -> None:
    owned = placement.count_owned(0, blocks, ranks)
    assert sum(owned) == blocks
    assert all(abs(own - blocks / ranks) <= EXTENT_BLOCKS for own in owned)
    assert owned == [
        sum(placement.owner(block, ranks) == rank for block in range(blocks))
        for rank in range(ranks)
    ]


@given(ranks=RANKS, blocks_per_rank=st.integers(1, 300))
def test_the_longest_sequence_fills_one_rank_and_no_more(ranks: int, blocks_per_rank: int) -> None:
    longest = placement.capacity_blocks(blocks_per_rank, ranks)
    assert max(placement.count_owned(0, longest, ranks)) <= blocks_per_rank
    assert max(placement.count_owned(0, longest + 1, ranks)) > blocks_per_rank


@given(ranks=RANKS, begin=st.integers(0, 5000), rows=st.integers(1, 5000))
def test_every_row_is_computed_once_and_incomplete_blocks_by_their_owner(
    ranks: int, begin: int, rows: int
) -> None:
    cut = placement.split_chunk(begin, begin + rows, ranks)
    assert cut[0].begin == begin and cut[-1].end == begin + rows
    assert all(before.end == after.begin for before, after in pairwise(cut))
    assert all(part.rows > 0 for part in cut)
    assert [b for part in cut for b in part.sealed_blocks] == list(
        range(begin // BLOCK_TOKENS, (begin + rows) // BLOCK_TOKENS)
    )
    for part in cut:
        if part.begin % BLOCK_TOKENS:
            assert part.rank == placement.owner(part.begin // BLOCK_TOKENS, ranks)
        if part.end % BLOCK_TOKENS:
            assert part.rank == placement.owner(part.end // BLOCK_TOKENS, ranks)


@given(ranks=RANKS, first=st.integers(0, 500), blocks=st.integers(1, 200))
def test_enough_blocks_give_every_rank_an_early_and_a_late_run(
    ranks: int, first: int, blocks: int
) -> None:
    begin, end = first * BLOCK_TOKENS, (first + blocks) * BLOCK_TOKENS
    assert placement.is_zigzag(begin, end, ranks) == (blocks >= ranks)
    cut = placement.split_chunk(begin, end, ranks)
    if blocks >= 2 * ranks:
        assert [part.rank for part in cut] == [*range(ranks), *reversed(range(ranks))]
    if blocks >= ranks:
        sizes = [len(part.sealed_blocks) for part in cut]
        assert max(sizes) - min(sizes) <= 1
        for rank in range(ranks):
            own = sum(len(part.sealed_blocks) for part in cut if part.rank == rank)
            assert own <= 2 * blocks / ranks


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("chunk_blocks", [512, 64, 63, 33, 17, 16])
@pytest.mark.parametrize("passed", ["keys", "queries"])
def test_ranks_work_alike_over_32k_tokens(ranks: int, chunk_blocks: int, passed: str) -> None:
    """Rows times keys of each rank are within 5% of the mean, with pass-KV and with pass-Q."""
    blocks = 32 * 1024 // BLOCK_TOKENS
    work = np.zeros(ranks)
    for first in range(0, blocks, chunk_blocks):
        end = min(blocks, first + chunk_blocks)
        rows = (end - first) * BLOCK_TOKENS
        past = placement.count_owned(0, first, ranks)
        for part in placement.split_chunk(first * BLOCK_TOKENS, end * BLOCK_TOKENS, ranks):
            new = part.begin - first * BLOCK_TOKENS  # of this chunk, before the part
            work[part.rank] += part.rows * (new + part.rows / 2)
            if passed == "keys":
                work[part.rank] += part.rows * first * BLOCK_TOKENS
        if passed == "queries":
            work += rows * BLOCK_TOKENS * np.array(past)
    assert np.abs(work / work.mean() - 1).max() <= 0.05, work / work.mean()


def test_three_ranks_split_twenty_blocks_as_the_example_says() -> None:
    """The example of `placement.py`, `exchange.py` and `comm_cost.py`."""
    parts = placement.split_chunk(0, 20 * BLOCK_TOKENS, 3)
    assert [(part.rank, part.sealed_blocks) for part in parts] == [
        (0, range(0, 3)),
        (1, range(3, 6)),
        (2, range(6, 10)),
        (2, range(10, 13)),
        (1, range(13, 16)),
        (0, range(16, 20)),
    ]
    assert placement.count_owned(0, 20, 3) == [16, 4, 0]
    assert placement.count_owned(0, 70, 3) == [16, 22, 32]
    assert placement.capacity_blocks(40, 3) == 104
    assert new_pages_sent(parts, 3) == 13 + 14 + 6
