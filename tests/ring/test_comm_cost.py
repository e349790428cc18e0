"""The choice between pass-KV and pass-Q, and that the engine sends exactly the predicted bytes."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.codec import CODECS
from compress.shape import BLOCK_TOKENS
from longctx.ring import placement
from longctx.ring.comm_cost import (
    CommCost,
    RowBytes,
    new_pages_sent,
    pass_kv_cost,
    pass_q_cost,
    prefers_pass_q,
)
from longctx.ring.link import Link
from tests.ring.side_by_side import LINK, bytes_sent, ringed_engine
from tests.support.recorded_engine import RecordedEngine, ask, some_ids

# Of a model with 32 heads, 8 key heads and a head_dim of 128, in bfloat16.
ROW = RowBytes.of(32, 128, query_bytes=2)
PAGE_BYTES = 2 * 8 * 128 * 2 * BLOCK_TOKENS


def choice(rows: list[int], pages: list[int], link: Link = LINK) -> str:
    keys = pass_kv_cost(rows, pages, page_bytes=PAGE_BYTES, tile_pages=64)
    queries = pass_q_cost(rows, pages, row_bytes=ROW)
    return "queries" if prefers_pass_q(keys, queries, link) else "keys"


def test_a_row_takes_its_query_and_a_result_in_float32() -> None:
    assert RowBytes(32 * 128 * 2, 32 * 128 * 4 + 32 * 4) == ROW


def test_decode_passes_queries_and_a_large_chunk_on_a_short_past_passes_keys() -> None:
    assert choice([0, 1, 0, 0], [100, 100, 100, 100]) == "queries"
    assert choice([1024] * 4, [16] * 4) == "keys"


def test_the_longer_the_past_the_sooner_queries_are_passed() -> None:
    choices = [choice([512] * 4, [blocks] * 4) for blocks in range(16, 1024, 16)]
    assert choices == sorted(choices), "keys first, then queries"
    assert len(set(choices)) == 2


def test_latency_counts_where_there_is_little_to_send() -> None:
    """Keys arrive in one message, queries go out and results come back."""
    rows, pages = [0, 2], [1, 0]
    assert choice(rows, pages, Link(latency_seconds=0.0, bytes_per_second=1e8)) == "queries"
    assert choice(rows, pages, Link(latency_seconds=0.05, bytes_per_second=1e8)) == "keys"


def test_tiles_that_follow_each_other_cost_their_latency() -> None:
    traffic = pass_kv_cost([8, 8], [129, 3], page_bytes=100, tile_pages=64)
    assert traffic == CommCost((12900, 300), 3, (8 * 132 * BLOCK_TOKENS,) * 2)


def test_queries_are_not_passed_to_a_rank_that_would_work_alone() -> None:
    """One rank owns all past pages: links are fast, but the other would wait for its attention."""
    keys = pass_kv_cost([256, 256], [16, 0], page_bytes=PAGE_BYTES, tile_pages=64)
    queries = pass_q_cost([256, 256], [16, 0], row_bytes=RowBytes(100, 100))
    assert prefers_pass_q(keys, queries, LINK)
    assert not prefers_pass_q(keys, queries, LINK, pairs_per_second=1e7)
    assert prefers_pass_q(keys, queries, Link(0.0, 1e6), pairs_per_second=1e7), "a slow link"


@given(
    rows=st.lists(st.integers(0, 9), min_size=3, max_size=3),
    pages=st.lists(st.integers(0, 9), min_size=3, max_size=3),
)
def test_traffic_is_the_sum_over_pairs_of_ranks(rows: list[int], pages: list[int]) -> None:
    keys = pass_kv_cost(rows, pages, page_bytes=1000, tile_pages=4)
    queries = pass_q_cost(rows, pages, row_bytes=RowBytes(10, 21))
    pairs = [(r, h) for r in range(3) for h in range(3) if r != h]
    assert sum(keys.bytes_sent) == sum(1000 * pages[h] * (rows[r] > 0) for r, h in pairs)
    assert sum(queries.bytes_sent) == sum(31 * rows[r] * (pages[h] > 0) for r, h in pairs)


# -- the engine sends exactly that -----------------------------------------------------------


def row_bytes(engine: RecordedEngine) -> int:
    layer = engine.model.spec.layers[0]
    row = RowBytes.of(layer.heads, layer.head_dim, query_bytes=engine.model.spec.dtype.itemsize)
    return row.query + row.result


@pytest.mark.parametrize("codec", sorted(CODECS))
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_prefill_sends_what_the_formula_says(llama: Path, codec: str, ranks: int) -> None:
    engine = ringed_engine(llama, ranks, codec=codec, max_batch_tokens=1024)
    layers, page_bytes = 3, engine.memory.packed[0].page_bytes[0]
    first = 14 * BLOCK_TOKENS
    before = bytes_sent(engine)
    engine.finish(ask("first", some_ids(first, 1), max_tokens=0))
    new = new_pages_sent(placement.split_chunk(0, first, ranks), ranks)
    moved = blocks_moved(0, first, ranks)
    # In the last layer no row's logits are wanted: blocks are only sent to their owners.
    assert bytes_sent(engine) - before == ((layers - 1) * new + moved) * page_bytes


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_decode_sends_what_the_formula_says(llama: Path, ranks: int) -> None:
    engine = ringed_engine(llama, ranks, max_batch_tokens=1024)
    prompt = some_ids(1800, 1)
    engine.finish(ask("first", prompt, max_tokens=0))
    before = bytes_sent(engine)
    # 28 blocks are there; the rest, of less than a block, and one token are computed.
    engine.finish(ask("again", prompt, some_ids(3, 2), max_tokens=2))
    past = placement.count_owned(0, 28, ranks)
    rank = placement.owner(28, ranks)
    others = sum(pages > 0 for other, pages in enumerate(past) if other != rank)
    rows = 2 * (1803 - 1792) + 1 + 3  # in the last layer only those whose logits are wanted
    logits = 2 * engine.model.spec.vocab_size * 4 * (rank != 0)
    assert bytes_sent(engine) - before == rows * others * row_bytes(engine) + logits


def blocks_moved(begin: int, end: int, ranks: int) -> int:
    """Count the blocks that one rank computes and another one owns."""
    return sum(
        placement.owner(block, ranks) != part.rank
        for part in placement.split_chunk(begin, end, ranks)
        for block in part.sealed_blocks
    )
