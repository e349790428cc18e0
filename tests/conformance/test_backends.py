"""Every attention backend equals `reference` over random block tables, windows and codecs."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.shape import BLOCK_TOKENS
from longctx.attention.backend import ChunkRows
from longctx.attention.reference import ReferenceAttention
from longctx.attention.registry import BACKENDS
from longctx.kv.block_entry import ENTRY_COLUMNS, FIRST_POSITION, PAGE, ROW_BEGIN, ROWS
from longctx.kv.memory import KVMemory
from longctx.model.layer_attention import AttentionCall
from longctx.model.spec import LayerSpec
from tests.conformance.test_sealing import READABLE

TOLERANCE = 4e-5  # float32 sums of up to 2,000 terms in another order, of scores up to 30
# Compiled kernels round queries and weights to multiply integers: to 16 bits for int8 pages, to two
# planes of 7 for int4 pages. At scores as steep as here, 5 nats and more apart, that shows.
INTEGER_TOLERANCES = {"int8": 1e-3, "int4": 0.02}


@dataclass(frozen=True)
class Case:
    codec: str
    window: int | None
    heads: int
    kv_heads: int
    head_dim: int
    chunks: tuple[tuple[int, int], ...]  # (tokens before, new tokens) of each sequence
    scattered: bool
    softcap: float | None
    seed: int
    ragged: bool = False  # past entries are parts of blocks, with gaps between them


def cases(backend: str) -> st.SearchStrategy[Case]:
    chunk = st.tuples(
        st.one_of(st.integers(0, 200), st.integers(0, 3000)),
        st.one_of(st.just(1), st.integers(2, 70), st.integers(1, 400)),
    )
    return st.builds(
        Case,
        codec=st.sampled_from(READABLE[backend]),
        window=st.one_of(st.none(), st.sampled_from([1, 7, 64, 65, 200, 1500])),
        heads=st.sampled_from([4, 8]),
        kv_heads=st.sampled_from([1, 2, 4]),
        head_dim=st.sampled_from([8, 24, 64]),
        chunks=st.lists(chunk, min_size=1, max_size=5).map(tuple),
        scattered=st.booleans(),
        softcap=st.sampled_from([None, None, 5.0]),
        seed=st.integers(0, 1000),
        ragged=st.booleans(),
    )


def tolerance(backend: str, case: Case) -> float:
    return INTEGER_TOLERANCES.get(case.codec, TOLERANCE) if backend == "cpu" else TOLERANCE


def build(
    case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[KVMemory, tuple[ChunkRows, ...], torch.Tensor]:
    """Pools full of random pages, and the rows of a step over them."""
    generator = torch.Generator().manual_seed(case.seed)
    spec = LayerSpec(
        heads=case.heads, kv_heads=case.kv_heads, head_dim=case.head_dim, window=case.window
    )
    blocks = sum((past + new) // BLOCK_TOKENS for past, new in case.chunks)
    own_blocks = sum(new // BLOCK_TOKENS + 2 for _, new in case.chunks)
    memory = KVMemory(
        [spec],
        dtype=dtype,
        device=torch.device(device),
        codec=case.codec,
        pool_bytes=(blocks + 4) * 4 * BLOCK_TOKENS * 2 * case.kv_heads * case.head_dim,
        step_blocks=own_blocks,
    )
    rows = memory.raw_rows(0)
    content = torch.randn(rows[BLOCK_TOKENS:].shape, generator=generator) * 2
    rows[BLOCK_TOKENS:] = content.to(rows)
    pages = np.array(memory.packed[0].allocate(blocks), dtype=np.int64)
    raw_pages = np.array(memory.raw.allocate(own_blocks), dtype=np.int64)
    random = np.random.default_rng(case.seed)
    if case.scattered:
        random.shuffle(pages)
        random.shuffle(raw_pages)
    for page in pages.tolist():
        content = torch.randn(1, *memory.codecs[0].shape.rows, generator=generator) * 2
        memory.packed_pages(0)[page] = memory.codecs[0].encode(content.to(rows))[0]
    chunks, row_begin, page_at, raw_at = [], 0, 0, 0
    for past, new in case.chunks:
        first, own_row = divmod(past, BLOCK_TOKENS)
        sealed = (past + new) // BLOCK_TOKENS
        own = (past + new - 1) // BLOCK_TOKENS - first + 1
        entries = np.zeros((sealed, ENTRY_COLUMNS), dtype=np.int64)
        entries[:, PAGE] = pages[page_at : page_at + sealed]
        entries[:, ROWS] = BLOCK_TOKENS
        entries[:, FIRST_POSITION] = np.arange(sealed) * BLOCK_TOKENS
        if case.ragged:
            begins = random.integers(BLOCK_TOKENS, size=first)
            counts = 1 + random.integers(BLOCK_TOKENS - begins)
            entries[:first, ROW_BEGIN], entries[:first, ROWS] = begins, counts
            entries[:first, FIRST_POSITION] += random.integers(BLOCK_TOKENS + 1 - counts)
        own_pages = raw_pages[raw_at : raw_at + own]
        for index in range(first, sealed):  # sealed in this step: raw and packed agree
            raw = memory.raw_rows(0).view(-1, *memory.codecs[0].shape.rows)
            content = raw[int(own_pages[index - first])][None]
            memory.packed_pages(0)[int(entries[index, PAGE])] = memory.codecs[0].encode(content)[0]
        chunks.append(
            ChunkRows(
                row_begin=row_begin,
                rows=new,
                first_position=past,
                own_row=own_row,
                own_pages=own_pages,
                past_entries=first,
                entries=(entries,),
            )
        )
        row_begin, page_at, raw_at = row_begin + new, page_at + sealed, raw_at + own
    query = torch.randn(row_begin, case.heads, case.head_dim, generator=generator)
    return memory, tuple(chunks), query.to(device)


@pytest.mark.parametrize("name", sorted(set(BACKENDS) - {"reference"}))
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_backend_equals_reference(name: str, data: st.DataObject) -> None:
    case = data.draw(cases(name))
    memory, chunks, query = build(case)
    results = []
    for backend in (BACKENDS[name](memory), ReferenceAttention(memory)):
        plan = backend.plan(chunks, 0)
        results.append(backend.attend(AttentionCall(0, 0.3, case.softcap), query, plan))
    (out, lse), (expected_out, expected_lse) = results
    allowed = tolerance(name, case)
    torch.testing.assert_close(lse, expected_lse, atol=allowed, rtol=allowed)
    torch.testing.assert_close(out, expected_out, atol=allowed, rtol=allowed)


@pytest.mark.parametrize(
    ("name", "codec"), [(name, codec) for name, codecs in READABLE.items() for codec in codecs]
)
@pytest.mark.parametrize("side", [0, 1], ids=["key", "value"])
@pytest.mark.parametrize("new", [1, 40], ids=["decode", "prefill"])
def test_a_token_that_broke_breaks_those_that_read_its_head(
    name: str, codec: str, side: int, new: int
) -> None:
    case = Case(codec, None, 8, 2, 64, ((150, new),), False, None, 0)
    memory, chunks, query = build(case)
    content = torch.randn(1, *memory.codecs[0].shape.rows)
    page = int(chunks[0].entries[0][0, PAGE])
    results = []
    for broken in (False, True):
        if broken:
            content[0, 7, side, 1, 3] = torch.nan
        memory.packed_pages(0)[page] = memory.codecs[0].encode(content)[0]
        backend = BACKENDS[name](memory)
        results.append(backend.attend(AttentionCall(0, 0.3), query, backend.plan(chunks, 0))[0])
    whole, out = results
    reading = slice(4, 8)  # the query heads of key head 1
    assert whole.isfinite().all()
    assert out[:, reading].isnan().any(-1).all()
    torch.testing.assert_close(out[:, :4], whole[:, :4], atol=0, rtol=0)


@pytest.mark.parametrize("name", sorted(BACKENDS))
def test_rows_outside_the_plan_are_empty(name: str) -> None:
    case = Case("raw", None, 4, 2, 16, ((70, 10), (0, 3)), False, None, 0)
    memory, chunks, query = build(case)
    backend = BACKENDS[name](memory)
    picked = (chunks[0].pick(4),)
    out, lse = backend.attend(AttentionCall(0, 1.0), query, backend.plan(picked, 0))
    whole, _ = backend.attend(AttentionCall(0, 1.0), query, backend.plan(chunks, 0))
    torch.testing.assert_close(out[4], whole[4])
    others = torch.arange(len(query)) != 4
    assert not out[others].any()
    assert (lse[others] == -torch.inf).all()
