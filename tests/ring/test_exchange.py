"""Which blocks ranks send each other: the example of `exchange.py`, block by block."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from compress.shape import BLOCK_TOKENS
from longctx.kv.block_entry import PAGE
from longctx.kv.layout import Layout
from longctx.ring import placement
from longctx.ring.exchange import Exchange, PastShards, SequenceShards
from longctx.ring.step_builder import RankStepBuilder, RowSpan

RANKS, BLOCKS, PAGES_PER_RANK, FIRST_STAGING_PAGE = 3, 20, 100, 80


def leader(tile_blocks: int) -> Any:
    """Return what an exchange reads of a `LeaderMemory`."""
    ring = SimpleNamespace(ranks=RANKS, tile_blocks=tile_blocks, foreign_blocks=13)
    return SimpleNamespace(
        ring=ring, packed=[SimpleNamespace(staging=range(FIRST_STAGING_PAGE, PAGES_PER_RANK))]
    )


def first_chunk() -> tuple[SequenceShards, list[RowSpan]]:
    """Return shards and spans of blocks 0 to 19; block b is page b of its owner."""
    parts = placement.split_chunk(0, BLOCKS * BLOCK_TOKENS, RANKS)
    builders = [RankStepBuilder(1) for _ in range(RANKS)]
    spans = []
    for part in parts:
        pages = np.arange(len(part.touched_blocks))
        tokens = np.zeros(part.rows, dtype=np.int32)
        spans.append(builders[part.rank].add_rows(part, pages, tokens))
    entries = Layout().table(BLOCKS)
    blocks = np.arange(BLOCKS)
    entries[:, PAGE] = placement.owners(blocks, RANKS) * PAGES_PER_RANK + blocks
    computing = np.concatenate([np.full(len(p.sealed_blocks), p.rank) for p in parts])
    past = PastShards.of(entries[:0], PAGES_PER_RANK, RANKS)
    return SequenceShards.of(past, entries, computing, PAGES_PER_RANK), spans


@pytest.mark.parametrize("tile_blocks", [64, 4])
def test_each_rank_gets_what_it_attends_to_and_what_it_owns(tile_blocks: int) -> None:
    shards, spans = first_chunk()
    exchange = Exchange(leader(tile_blocks))
    exchange.add(shards, spans, pass_q_past=False, pass_q_new=False)
    sent: dict[tuple[int, int], list[int]] = {}
    owned: dict[int, list[int]] = {rank: [] for rank in range(RANKS)}
    for rank, rounds in enumerate(exchange.rounds()):
        for each in rounds:
            assert len(each.sends) <= tile_blocks
            sent.setdefault((rank, each.target), []).extend(each.sends.tolist())
            owned[rank] += each.staged_to_owned[:, 1].tolist()
    assert sent == {
        (0, 1): [0, 1, 2, 16, 17, 18, 19],
        (0, 2): [0, 1, 2],
        (1, 0): [3, 4, 5, 13, 14, 15],
        (1, 2): [3, 4, 5],
        (2, 0): [6, 7, 8, 9, 10, 11, 12],
        (2, 1): [6, 7, 8, 9, 10, 11, 12],
    }
    assert {rank: sorted(pages) for rank, pages in owned.items()} == {
        0: list(range(3, 16)),
        1: [16, 17, 18, 19],
        2: [],
    }


def test_passed_queries_reach_every_rank_that_holds_blocks_before_them() -> None:
    shards, spans = first_chunk()
    exchange = Exchange(leader(tile_blocks=64))
    exchange.add(shards, [spans[-1].last_row()], pass_q_past=True, pass_q_new=True)
    queries = exchange.remote_queries()
    last_row = 7 * BLOCK_TOKENS - 1  # rank 0 computes blocks 0-2 and 16-19
    assert [rows.tolist() for rows in queries[0].sent_rows] == [[], [last_row], [last_row]]
    assert [each.received_counts for each in queries] == [(0, 0, 0), (1, 0, 0), (1, 0, 0)]
    assert [rows.past_entries for each in queries for rows in each.rows] == [6, 7]
