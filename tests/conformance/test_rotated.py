"""Keys encoded elsewhere, with turned queries, equal keys turned to their present position."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.codec import CODECS
from compress.shape import BLOCK_TOKENS
from longctx.attention.backend import AttentionPlan, ChunkRows
from longctx.attention.registry import BACKENDS
from longctx.attention.rotated import RotatedAttention
from longctx.kv.block_entry import ENTRY_COLUMNS, FIRST_POSITION, PAGE, ROTATION, ROW_BEGIN, ROWS
from longctx.kv.memory import KVMemory
from longctx.model.layer_attention import AttentionCall
from longctx.model.spec import LayerSpec, Rotation

HEAD_DIM = 16
FREQUENCIES = tuple(10_000 ** (-index / 8) for index in range(8))
KINDS = {
    "plain": Rotation(FREQUENCIES, interleaved=False),
    "interleaved": Rotation(FREQUENCIES, interleaved=True),
    "partial": Rotation(FREQUENCIES[::2], interleaved=False),
    "interleaved in part": Rotation(FREQUENCIES[::2], interleaved=True),
    "stretched": Rotation(tuple(each / 4 for each in FREQUENCIES), interleaved=False),
    "none": None,
}
TOLERANCE = 1e-4
# Kernels round queries to multiply integers; see test_backends.py.
INTEGER_TOLERANCES = {"int8": 2e-3, "int4": 0.4}


@dataclass(frozen=True)
class Case:
    """`chunks`: of each sequence, its past as (rotation, blocks) and its new tokens."""

    codec: str
    window: int | None
    heads: int
    kinds: tuple[str, str]  # of two layers
    chunks: tuple[tuple[tuple[tuple[int, int], ...], int], ...]
    whole_blocks: bool
    softcap: float | None
    seed: int


ROTATIONS = st.one_of(st.just(0), st.sampled_from([-700, 3, 64]), st.integers(-10_000, 10_000))


def cases() -> st.SearchStrategy[Case]:
    past = st.lists(st.tuples(ROTATIONS, st.integers(1, 4)), max_size=5).map(tuple)
    new = st.one_of(st.just(1), st.integers(2, 140))
    return st.builds(
        Case,
        codec=st.sampled_from(sorted(CODECS)),
        window=st.one_of(st.none(), st.sampled_from([7, 65, 200, 1500])),
        heads=st.sampled_from([2, 4]),
        kinds=st.tuples(*[st.sampled_from(sorted(KINDS))] * 2),
        chunks=st.lists(st.tuples(past, new), min_size=1, max_size=3).map(tuple),
        whole_blocks=st.booleans(),
        softcap=st.sampled_from([None, None, 5.0]),
        seed=st.integers(0, 1000),
    )


def build(case: Case) -> tuple[KVMemory, tuple[ChunkRows, ...], torch.Tensor]:
    """Pages of random keys, some of them pieces of blocks with gaps between their positions."""
    generator = torch.Generator().manual_seed(case.seed)
    random = np.random.default_rng(case.seed)
    spec = LayerSpec(heads=case.heads, kv_heads=2, head_dim=HEAD_DIM, window=case.window)
    past_blocks = [sum(blocks for _, blocks in past) for past, _ in case.chunks]
    own_blocks = [-(-new // BLOCK_TOKENS) for _, new in case.chunks]
    total = sum(past_blocks) + sum(own_blocks)
    memory = KVMemory(
        [spec] * 2,
        dtype=torch.float32,
        device=torch.device("cpu"),
        codec=case.codec,
        pool_bytes=(total + 4) * 2 * 4 * BLOCK_TOKENS * 2 * 2 * HEAD_DIM,
        step_blocks=sum(own_blocks) + 1,
    )
    pages = random.permutation(np.array(memory.packed[0].allocate(total), dtype=np.int64))
    raw_pages = random.permutation(np.array(memory.raw.allocate(sum(own_blocks)), dtype=np.int64))
    for layer in range(2):
        raw = memory.raw_rows(layer)
        raw[BLOCK_TOKENS:] = torch.randn(raw[BLOCK_TOKENS:].shape, generator=generator)
        for page in pages.tolist():
            content = torch.randn(1, *memory.codecs[layer].shape.rows, generator=generator)
            memory.packed_pages(layer)[page] = memory.codecs[layer].encode(content)[0]
    chunks: list[ChunkRows] = []
    row_begin = page_at = raw_at = 0
    for (past, new), own in zip(case.chunks, own_blocks, strict=True):
        entries = np.zeros((sum(blocks for _, blocks in past) + own, ENTRY_COLUMNS), dtype=np.int64)
        entries[:, PAGE] = pages[page_at : page_at + len(entries)]
        entries[:, ROWS] = BLOCK_TOKENS
        index = position = 0
        for rotation, blocks in past:
            for _ in range(blocks):
                if not case.whole_blocks:
                    entries[index, ROW_BEGIN] = random.integers(BLOCK_TOKENS)
                    most = BLOCK_TOKENS - int(entries[index, ROW_BEGIN])
                    entries[index, ROWS] = random.integers(1, most + 1)
                    position += int(random.integers(30))
                entries[index, FIRST_POSITION] = position
                entries[index, ROTATION] = rotation
                position += int(entries[index, ROWS])
                index += 1
        entries[index:, FIRST_POSITION] = position + np.arange(own) * BLOCK_TOKENS
        own_pages = raw_pages[raw_at : raw_at + own]
        for layer in range(2):
            for block in range(new // BLOCK_TOKENS):  # sealed in this step: raw and packed agree
                shape = memory.codecs[layer].shape.rows
                content = memory.raw_rows(layer).view(-1, *shape)[int(own_pages[block])][None]
                page = int(entries[index + block, PAGE])
                memory.packed_pages(layer)[page] = memory.codecs[layer].encode(content)[0]
        moved = np.flatnonzero(entries[:, ROTATION])
        chunks.append(
            ChunkRows(
                row_begin=row_begin,
                rows=new,
                first_position=position,
                own_row=0,
                own_pages=own_pages,
                past_entries=index,
                entries=(entries,),
                rotated_entries=int(moved[-1]) + 1 if len(moved) else 0,
            )
        )
        row_begin, page_at, raw_at = row_begin + new, page_at + len(entries), raw_at + own
    return memory, tuple(chunks), torch.randn(row_begin, case.heads, HEAD_DIM, generator=generator)


def placed(
    memory: KVMemory, layer: int, entry: np.ndarray, rotation: Rotation | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys and values of an entry [rows, kv_heads, head_dim], turned, and their positions."""
    page, begin, rows, position, offset = entry.tolist()
    keys, values = memory.decoded(layer, slice(page, page + 1))[0, begin : begin + rows].unbind(1)
    if rotation is not None:
        keys = rotation.turn(keys, *rotation.turns(torch.tensor([offset])))
    return keys, values, position + torch.arange(rows)


def expected(
    case: Case,
    memory: KVMemory,
    chunks: tuple[ChunkRows, ...],
    query: torch.Tensor,
    layer: int,
    rotation: Rotation | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row alone, against its keys turned to their positions, in float32."""
    out, lse = torch.zeros_like(query), torch.zeros(query.shape[:2])
    for chunk in chunks:
        blocks = [placed(memory, layer, entry, rotation) for entry in chunk.entries[0]]
        for index in range(chunk.rows):
            row = chunk.pick(chunk.row_begin + index)
            runs = blocks[: row.past_entries]
            own = memory.own_blocks(layer, slice(int(row.own_pages[0]), int(row.own_pages[0]) + 1))
            keys, values = own[0, : row.own_row + 1].unbind(1)
            positions = row.first_position - row.own_row + torch.arange(row.own_row + 1)
            runs = [*runs, (keys, values, positions)]
            keys, values, positions = map(torch.cat, zip(*runs, strict=True))
            if case.window is not None:
                seen = positions > row.first_position - case.window
                keys, values = keys[seen], values[seen]
            keys = keys.repeat_interleave(case.heads // 2, dim=1)
            values = values.repeat_interleave(case.heads // 2, dim=1)
            scores = 0.3 * torch.einsum("hd,khd->hk", query[row.row_begin], keys)
            if case.softcap is not None:
                scores = case.softcap * torch.tanh(scores / case.softcap)
            out[row.row_begin] = torch.einsum("hk,khd->hd", scores.softmax(-1), values)
            lse[row.row_begin] = scores.logsumexp(-1)
    return out, lse


class Counting:
    """A backend, and how often it was called."""

    def __init__(self, name: str, memory: KVMemory) -> None:
        self._inner = BACKENDS[name](memory)
        self.plan, self.seal = self._inner.plan, self._inner.seal
        self.calls = 0

    def attend(
        self, call: AttentionCall, query: torch.Tensor, plan: AttentionPlan
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.calls += 1
        return self._inner.attend(call, query, plan)


@pytest.mark.parametrize("name", sorted(BACKENDS))
@settings(max_examples=30, deadline=None)
@given(case=cases())
def test_turned_queries_equal_turned_keys(name: str, case: Case) -> None:
    memory, chunks, query = build(case)
    rotations = [KINDS[kind] for kind in case.kinds]
    inner = Counting(name, memory)
    backend = RotatedAttention(inner, memory, rotations)
    plan = backend.plan(chunks, 0)
    allowed = INTEGER_TOLERANCES.get(case.codec, TOLERANCE) if name == "cpu" else TOLERANCE
    for layer, rotation in enumerate(rotations):
        out, lse = backend.attend(AttentionCall(layer, 0.3, case.softcap), query, plan)
        wanted_out, wanted_lse = expected(case, memory, chunks, query, layer, rotation)
        torch.testing.assert_close(lse, wanted_lse, atol=allowed, rtol=allowed)
        torch.testing.assert_close(out, wanted_out, atol=allowed, rtol=allowed)
    assert inner.calls == 2, "one call a layer, however many rotations"


@pytest.mark.parametrize("name", sorted(BACKENDS))
def test_rows_whose_logits_are_wanted_are_computed_alone(name: str) -> None:
    past = ((500, 2), (0, 1), (-90, 3))
    case = Case("raw", None, 4, ("plain", "none"), ((past, 70), ((), 3), (past, 1)), True, None, 0)
    memory, chunks, query = build(case)
    backend = RotatedAttention(BACKENDS[name](memory), memory, [KINDS[k] for k in case.kinds])
    picked = tuple(chunk.pick(chunk.row_begin + chunk.rows - 1) for chunk in chunks)
    for layer in range(2):
        call = AttentionCall(layer, 0.3)
        whole, _ = backend.attend(call, query, backend.plan(chunks, 0))
        out, lse = backend.attend(call, query, backend.plan(picked, 0))
        rows = [chunk.row_begin for chunk in picked]
        torch.testing.assert_close(out[rows], whole[rows], atol=1e-5, rtol=1e-5)
        others = torch.ones(len(query), dtype=torch.bool)
        others[rows] = False
        assert not out[others].any()
        assert (lse[others] == -torch.inf).all()


def test_a_step_without_rotated_entries_goes_to_the_backend_as_it_is() -> None:
    case = Case("raw", None, 2, ("plain", "plain"), ((((0, 3),), 5),), True, None, 0)
    memory, chunks, _ = build(case)
    planned = RotatedAttention(BACKENDS["reference"](memory), memory, [KINDS["plain"]] * 2)
    assert planned.plan(chunks, 0) is chunks


@pytest.mark.parametrize("codec", sorted(CODECS))
@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"none"}))
def test_scores_are_as_near_as_the_codec_to_those_of_keys_encoded_in_place(
    codec: str, kind: str
) -> None:
    """Scores of exact keys against those of stored ones: encoded in place, or elsewhere.

    Both miss by what the codec rounds; turning the query adds nothing that counts.
    """
    rotation = KINDS[kind]
    assert rotation is not None
    case = Case(codec, None, 4, (kind, kind), ((((1, 1),), 64),), True, None, 5)
    memory, (chunk,), query = build(case)
    table = chunk.entries[0][:1]
    table[0, ROWS] = 1  # of a single key the lse is the score
    chunk = replace(chunk, own_pages=chunk.own_pages[:0], entries=(table,))
    backend = RotatedAttention(BACKENDS["reference"](memory), memory, [rotation] * 2)
    content = torch.randn(1, *memory.codecs[0].shape.rows, generator=torch.Generator())
    for offset in (1, 64, 1_000, 10_000):
        in_place = content.clone()
        in_place[0, :, 0] = rotation.turn(
            content[0, :, 0], *rotation.turns(torch.full((BLOCK_TOKENS,), offset))
        )
        keys = in_place[0, 0, 0].repeat_interleave(2, dim=0)  # [heads, head_dim]
        exact = torch.einsum("qhd,hd->qh", query, keys)
        errors = []
        for stored, moved in ((in_place, 0), (content, offset)):
            memory.packed_pages(0)[int(table[0, PAGE])] = memory.codecs[0].encode(stored)[0]
            table[0, ROTATION] = moved
            plan = backend.plan([replace(chunk, rotated_entries=1 if moved else 0)], 0)
            _, lse = backend.attend(AttentionCall(0, 1.0), query, plan)
            errors.append(float((lse - exact).square().mean().sqrt()))
        assert errors[1] <= 2 * errors[0] + 1e-5
