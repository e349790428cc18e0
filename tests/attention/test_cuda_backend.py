"""The Triton kernels, interpreted on a CPU: they equal `reference`, and an engine answers by them.

They are compiled for GPUs too, without one: none may spill registers, and all must fit into shared
memory. What they do on a GPU, and how fast, is not seen here.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.shape import BLOCK_TOKENS
from longctx.attention.reference import ReferenceAttention
from longctx.attention.registry import BACKENDS, backend_for
from longctx.config import CacheConfig, EngineConfig, ModelConfig
from longctx.errors import ModelRefused
from longctx.kv.block_entry import PAGE
from longctx.llm import LLM
from longctx.model.layer_attention import AttentionCall
from tests.conformance.test_backends import Case, build

pytest.importorskip("triton", reason="pip install triton, to test the kernels for GPUs")
with pytest.MonkeyPatch.context() as patch:  # Triton's decorators read it, when they are used
    patch.setenv("TRITON_INTERPRET", "1")
    from longctx.attention.cuda_backend import CUDAAttention

# numpy, which interprets, warns of NaN and infinity where a GPU does not
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

TOLERANCE = 4e-5  # float32 sums in another order
CODECS = ["raw", "bf16", "int8", "int4"]


@pytest.fixture(scope="module", autouse=True)
def _interpreted() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        yield


def assert_equal(case: Case, scratch_blocks: int = 1 << 20) -> None:
    memory, chunks, query = build(case)
    block_bytes = memory.codecs[0].shape.values_per_page * 4
    backend = CUDAAttention(memory, scratch_bytes=scratch_blocks * block_bytes)
    call = AttentionCall(0, 0.3, case.softcap)
    out, lse = backend.attend(call, query, backend.plan(chunks, 0))
    reference = ReferenceAttention(memory)
    expected_out, expected_lse = reference.attend(call, query, reference.plan(chunks, 0))
    torch.testing.assert_close(lse, expected_lse, atol=TOLERANCE, rtol=TOLERANCE)
    torch.testing.assert_close(out, expected_out, atol=TOLERANCE, rtol=TOLERANCE)


def cases(past: int, new: int, sequences: int) -> st.SearchStrategy[Case]:
    """Up to so many sequences with so many tokens: the interpreter takes its time for each."""
    lengths = st.one_of(st.just(1), st.integers(2, 6), st.integers(7, new))
    chunks = st.lists(st.tuples(st.integers(0, past), lengths), min_size=1, max_size=sequences)
    return st.builds(
        Case,
        codec=st.just("raw"),
        window=st.one_of(st.none(), st.sampled_from([1, 7, 64, 65, 200])),
        heads=st.just(4),
        kv_heads=st.sampled_from([1, 2, 4]),
        head_dim=st.sampled_from([8, 24, 64]),
        chunks=chunks.map(tuple),
        scattered=st.booleans(),
        softcap=st.sampled_from([None, 5.0]),
        seed=st.integers(0, 1000),
        ragged=st.booleans(),
    )


scratches = st.sampled_from([1, 3, 1 << 20])  # blocks


@pytest.mark.parametrize("codec", CODECS)
@settings(max_examples=4, deadline=None)
@given(case=cases(past=150, new=20, sequences=2), scratch_blocks=scratches)
def test_the_kernel_equals_reference(codec: str, case: Case, scratch_blocks: int) -> None:
    assert_equal(replace(case, codec=codec), scratch_blocks)


@pytest.mark.slow
@pytest.mark.parametrize("codec", CODECS)
@settings(max_examples=30, deadline=None)
@given(case=cases(past=800, new=150, sequences=3), scratch_blocks=scratches)
def test_the_kernel_equals_reference_at_length(codec: str, case: Case, scratch_blocks: int) -> None:
    assert_equal(replace(case, codec=codec), scratch_blocks)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"),
    [(3, 1, 80), (8, 1, 96), (2, 2, 128), (4, 1, 256), (9, 3, 64)],
)
def test_heads_of_every_size_are_attended(
    codec: str, heads: int, kv_heads: int, head_dim: int
) -> None:
    assert_equal(Case(codec, None, heads, kv_heads, head_dim, ((130, 1), (66, 9)), True, None, 0))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("new", [1, 20], ids=["decode", "prefill"])
def test_a_token_that_broke_breaks_those_that_see_it_alone(codec: str, new: int) -> None:
    """With a window of 64, the last rows do not see token 7 of block 1 any more."""
    case = Case(codec, 64, 4, 2, 16, ((70, new), (131, new)), False, None, 0)
    memory, rows, query = build(case)
    content = torch.randn(1, *memory.codecs[0].shape.rows)
    content[0, 7, 1, 1, 3] = torch.nan
    page = int(rows[1].entries[0][1, PAGE])
    memory.packed_pages(0)[page] = memory.codecs[0].encode(content)[0]
    backend = CUDAAttention(memory)
    out, _ = backend.attend(AttentionCall(0, 0.3), query, backend.plan(rows, 0))
    reference = ReferenceAttention(memory)
    expected, _ = reference.attend(AttentionCall(0, 0.3), query, reference.plan(rows, 0))
    assert torch.equal(out.isnan().any(-1), expected.isnan().any(-1))
    seen = ~expected.isnan().any(-1)
    torch.testing.assert_close(out[seen], expected[seen], atol=TOLERANCE, rtol=TOLERANCE)


def test_rows_outside_the_plan_are_empty() -> None:
    memory, rows, query = build(Case("int8", None, 4, 2, 16, ((70, 10), (0, 3)), False, None, 0))
    backend = CUDAAttention(memory)
    out, lse = backend.attend(AttentionCall(0, 1.0), query, backend.plan((rows[0].pick(4),), 0))
    whole, _ = backend.attend(AttentionCall(0, 1.0), query, backend.plan(rows, 0))
    torch.testing.assert_close(out[4], whole[4])
    others = torch.arange(len(query)) != 4
    assert not out[others].any()
    assert (lse[others] == -torch.inf).all()


def test_rows_that_are_not_there_count_for_nothing() -> None:
    """So nobody has to clear the pages of blocks that are begun."""
    case = Case("int8", None, 4, 2, 16, ((70, 1), (131, 9)), False, None, 0)
    memory, rows, query = build(case)
    backend, reference = CUDAAttention(memory), ReferenceAttention(memory)
    expected, _ = reference.attend(AttentionCall(0, 0.3), query, reference.plan(rows, 0))
    for chunk in rows:
        end = (chunk.own_row + chunk.rows - 1) % BLOCK_TOKENS + 1
        memory.raw_rows(0).view(-1, BLOCK_TOKENS, 2, 2, 16)[chunk.own_pages[-1], end:] = torch.nan
    out, _ = backend.attend(AttentionCall(0, 0.3), query, backend.plan(rows, 0))
    torch.testing.assert_close(out, expected, atol=TOLERANCE, rtol=TOLERANCE)
    page = memory.raw.pages[0][1].fill_(7).clone()
    memory.clear_raw(torch.tensor([1]))
    assert torch.equal(memory.raw.pages[0][1], page)


@pytest.mark.parametrize("past", [70, 1100], ids=["whole", "split"])
def test_what_nobody_merges_comes_in_the_type_of_the_query(past: int) -> None:
    case = Case("raw", None, 4, 2, 16, ((past, 1),), False, None, 0)
    memory, rows, query = build(case)
    backend, query = CUDAAttention(memory), query.half()
    plan = backend.plan(rows, 0)
    exact, _ = backend.attend(AttentionCall(0, 0.3), query, plan)
    rounded, _ = backend.attend(AttentionCall(0, 0.3, merged=False), query, plan)
    assert (exact.dtype, rounded.dtype) == (torch.float32, torch.float16)
    torch.testing.assert_close(rounded.float(), exact, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("codec", ["raw", "int8"])
def test_the_pages_of_a_question_are_shared_out(codec: str) -> None:
    """Its few tiles would leave most of a GPU idle; here decoded pages fit five at a time."""
    case = Case(codec, None, 4, 1, 16, ((1100, 20), (70, 3), (600, 9)), True, None, 0)
    memory, rows, _ = build(case)
    batches = CUDAAttention(memory).plan(rows, 0).batches(heads=4, kv_heads=1, most=32)
    assert [batch.splits > 1 for batch in batches] == [False, True]
    assert_equal(case, scratch_blocks=5)


def test_parts_take_room_for_rows_that_are_split_alone() -> None:
    """A step that decodes one row beside a long chunk has no parts of the chunk's rows."""
    case = Case("raw", None, 4, 2, 64, ((2000, 1), (0, 500), (2000, 1)), False, None, 0)
    memory, rows, _ = build(case)
    few, many = CUDAAttention(memory).plan(rows, 0).batches(heads=4, kv_heads=2, most=128)
    assert few.splits > 1
    assert few.rows is not None
    assert few.rows.tolist() == [0, 501]
    assert few.launches[0].tiles[:, 8].tolist() == [0, 1]
    assert many.rows is None


def test_a_tile_reads_no_page_before_its_window() -> None:
    case = Case("raw", 100, 4, 2, 64, ((2000, 1),), False, None, 0)
    memory, rows, _ = build(case)
    (batch,) = CUDAAttention(memory).plan(rows, 0).batches(heads=4, kv_heads=2, most=128)
    begin, end = batch.launches[0].tiles[0, 5:7].tolist()
    assert (begin, end) == ((2000 - 99) // BLOCK_TOKENS, 2000 // BLOCK_TOKENS)


def test_an_engine_answers_by_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "cuda", CUDAAttention)
    text = "The lighthouse is white. The number of the boat is 4711. " + "It rains. " * 12
    answers = []
    for backend in ("torch", "cuda"):
        config = EngineConfig(
            model=ModelConfig(attention_backend=backend, device="cpu", threads=1),
            cache=CacheConfig(kv_codec="int8", force_codec=True, device_pool_gib=0.05),
        )
        with LLM(config=config) as llm:
            assert llm.engine.info.backend == backend
            answers.append(llm.document_from_text(text).ask("What is the number of the boat?").text)
    assert answers[0] == answers[1]


def test_without_a_gpu_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ModelRefused, match=r"'cuda' cannot work on cpu; use torch or auto"):
        backend_for("cuda", torch.device("cpu"))


COMPILER = Path(__file__).with_name("compile_for_gpus.py")


def compiled(*arguments: str) -> None:
    """In a process of its own: this one interprets."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(COMPILER), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_few_kernels_compile_without_spills() -> None:
    compiled("90", "decode:int8:128", "decode:int4:64", "seal:int8:64", "unpack:int4:128")


@pytest.mark.parametrize("target", ["80", "90", "100"])
def test_what_lies_between_products_compiles_without_spills(target: str) -> None:
    compiled(target, "norm:raw:4096", "norm:raw:16384", "turn:raw:128", "gate:raw:14336")


@pytest.mark.slow
@pytest.mark.parametrize("target", ["80", "90", "100"])
def test_every_kernel_compiles_without_spills(target: str) -> None:
    sizes = (64, 80, 96, 128, 256)
    compiled(
        target,
        *(f"decode:{codec}:{dim}" for codec in CODECS for dim in sizes),
        *(
            f"{kernel}:raw:{dim}"
            for kernel in ("prefill", "question", "question-rounded")
            for dim in sizes
        ),
        *(f"unpack:{codec}:{dim}" for codec in CODECS[1:] for dim in sizes),
        *(f"seal:{codec}:{dim}" for codec in CODECS for dim in sizes),
        "combine:raw:128",
    )
