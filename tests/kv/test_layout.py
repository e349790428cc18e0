"""Where own blocks lie and what is borrowed between them, against a list of all rows."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.shape import BLOCK_TOKENS
from longctx.engine.prompt import Prompt, PromptBuilder
from longctx.errors import InvalidRequest
from longctx.kv.block_entry import FIRST_POSITION, PAGE, ROTATION, ROW_BEGIN, ROWS
from longctx.kv.block_table import BlockTable
from longctx.kv.layout import PLAIN, CachedChain, Layout, Run
from longctx.kv.prefix_index import module_name
from offload.key import BlockKey

ROOT = BlockKey(bytes(32))
CHAIN_TOKENS = 200


def chain() -> CachedChain:
    """One piece of 200 tokens at position 10."""
    blocks = -(-CHAIN_TOKENS // BLOCK_TOKENS)
    closing = Run(CHAIN_TOKENS, blocks, 10 + CHAIN_TOKENS, blocks)
    layout = Layout((Run(position=10), closing), closed=True)
    keys = layout.keys(lambda a, b: np.arange(a, b, dtype=np.int32), 0, blocks, ROOT)
    return CachedChain(("", module_name("m"), keys[-1].hex()), layout, tuple(keys), ROOT)


CHAIN = chain()


@dataclass(frozen=True)
class Row:
    """One own token: where it stands, and in which block and entry it lies."""

    position: int
    block: int
    entry: int


@dataclass
class Case:
    prompt: Prompt
    rows: list[Row]
    reused: list[tuple[int, int, int]]  # entry, position, tokens


@st.composite
def cases(draw: st.DrawFn) -> Case:
    builder = PromptBuilder(np.empty(0, dtype=np.int32))
    rows: list[Row] = []
    reused: list[tuple[int, int, int]] = []
    position, block, entry, room = 0, -1, -1, 0
    for _ in range(draw(st.integers(1, 6))):
        if draw(st.booleans()):
            gap, tokens = draw(st.sampled_from([0, 0, 1, 50])), draw(st.integers(1, 200))
            builder.compute(list(range(tokens)), position + gap)
            room = 0 if gap else room
            for offset in range(tokens):
                if room == 0:
                    block, entry, room = block + 1, entry + 1, BLOCK_TOKENS
                rows.append(Row(position + gap + offset, block, entry))
                room -= 1
            position += gap + tokens
        else:
            begin = draw(st.integers(0, CHAIN_TOKENS - 1))
            end = draw(st.integers(begin + 1, CHAIN_TOKENS))
            builder.reuse(CHAIN, begin, np.arange(begin, end, dtype=np.int32), position)
            reused.append((entry + 1, position, end - begin))
            entry += (end - 1) // BLOCK_TOKENS - begin // BLOCK_TOKENS + 1
            position, room = position + end - begin, 0
    builder.compute([1], position + 7)
    rows.append(Row(position + 7, block + 1, entry + 1))
    return Case(builder.prompt(), rows, reused)


@given(case=cases())
def test_tokens_blocks_positions_and_entries(case: Case) -> None:
    layout = case.prompt.layout
    assert len(case.prompt.tokens) == len(case.rows)
    for token, row in enumerate(case.rows):
        assert layout.blocks(token) == row.block
        assert layout.position(token) == row.position
        assert layout.entry(row.block) == row.entry
        first = next(t for t, other in enumerate(case.rows) if other.block == row.block)
        assert layout.tokens(row.block) == first
    assert [(b.entry, b.position, b.end - b.begin) for b in layout.reused] == case.reused


@given(case=cases(), begin=st.integers(0, 500), length=st.integers(1, 500))
def test_a_range_of_tokens_is_cut_where_runs_end(case: Case, begin: int, length: int) -> None:
    begin = min(begin, len(case.rows) - 1)
    end = min(len(case.rows), begin + length)
    parts = list(case.prompt.layout.cut(begin, end))
    assert [parts[0][0], parts[-1][1]] == [begin, end]
    for (_, stop), (first, _) in pairwise(parts):
        assert stop == first
        assert case.rows[first].block == case.rows[first - 1].block + 1
    for first, stop in parts:
        positions = [row.position for row in case.rows[first:stop]]
        assert positions == list(range(positions[0], positions[0] + len(positions)))


@given(case=cases(), window=st.integers(1, 300), token=st.integers(0, 500))
def test_the_first_block_that_a_window_shows(case: Case, window: int, token: int) -> None:
    token = min(token, len(case.rows) - 1)
    position = case.rows[token].position
    seen = [r.block for r in case.rows if r.position > position - window]
    assert case.prompt.layout.first_seen(window, position) == min(seen)


@given(case=cases(), begin=st.integers(0, 500), budget=st.integers(1, 600))
def test_a_step_touches_no_more_blocks_than_an_ordinary_prompt_could(
    case: Case, begin: int, budget: int
) -> None:
    layout, begin = case.prompt.layout, min(begin, len(case.rows) - 1)
    tokens = min(layout.within(begin, budget), len(case.rows) - begin)
    assert tokens >= 1
    charge = layout.charge(begin, begin + tokens)
    assert tokens <= charge <= budget
    touched = case.rows[begin + tokens - 1].block - case.rows[begin].block + 1
    assert touched <= charge // BLOCK_TOKENS + 2
    assert PLAIN.within(begin, budget) == PLAIN.charge(begin, begin + budget) == budget


@given(case=cases(), tokens=st.integers(0, 500))
def test_a_table_shows_own_blocks_and_all_that_is_borrowed(case: Case, tokens: int) -> None:
    layout = case.prompt.layout
    depth = layout.blocks(min(tokens, len(case.rows) - 1))
    entries = layout.table(depth)
    pages = np.arange(100, 100 + depth)
    entries[layout.own(0, depth), PAGE] = pages
    blocks = len(CHAIN.keys)
    lent = Layout((Run(position=10), Run(CHAIN_TOKENS, blocks, 210, blocks))).table(blocks)
    lent[:, PAGE] = np.arange(1, 1 + blocks)
    for reused in layout.reused:
        part = reused.entries(lent)
        assert int(part[:, ROWS].sum()) == reused.end - reused.begin
        assert (part[:, ROWS] > 0).all()
        ends = part[:, FIRST_POSITION] + part[:, ROWS]
        assert part[0, FIRST_POSITION] == reused.position
        assert (ends[:-1] == part[1:, FIRST_POSITION]).all()
        encoded = part[:, FIRST_POSITION] - part[:, ROTATION]
        in_source = (part[:, PAGE] - 1) * BLOCK_TOKENS + part[:, ROW_BEGIN]
        assert (encoded == in_source + 10).all()
    table = BlockTable(layout, entries, depth)
    assert table.pages(0, depth) == pages.tolist()
    for block in range(depth, case.rows[-1].block + 1):
        table.append(7, rows=1, first_position=0)
        assert table.entries[layout.entry(block), PAGE] == 7
    assert table.pages(0, depth) == pages.tolist()
    for block in range(depth):
        rows = [row for row in case.rows if row.block == block]
        own = entries[layout.entry(block)]
        assert (own[ROWS], own[FIRST_POSITION]) == (len(rows), rows[0].position)


def test_what_stands_as_it_was_encoded_leaves_the_ordinary_chain() -> None:
    def after(*parts: tuple[int, int, int]) -> BlockKey:
        builder = PromptBuilder(np.empty(0, dtype=np.int32))
        for begin, end, position in parts:
            builder.reuse(CHAIN, begin, np.arange(begin, end, dtype=np.int32), position)
        builder.compute([1])
        return builder.prompt().layout.lineage(0, ROOT)

    last = CHAIN.keys[-1]
    assert after((0, 200, 10)) == last
    assert after((0, 64, 10), (64, 200, 74)) == last
    others = [
        after((0, 200, 11)),  # elsewhere
        after((0, 199, 10)),  # not all of it
        after((1, 200, 11)),  # not from its beginning
        after((64, 200, 74)),  # without what stood before it
        after((0, 64, 10), (64, 200, 80)),  # after a gap
        after((0, 64, 74), (64, 200, 138)),
    ]
    assert len({*others, last}) == len(others) + 1


def test_positions_never_go_back() -> None:
    builder = PromptBuilder(np.arange(5, dtype=np.int32))
    builder.compute([1, 2], 9)
    with pytest.raises(InvalidRequest, match="ends at 11"):
        builder.compute([3], 10)
