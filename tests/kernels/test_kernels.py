"""The compiled kernels: every instruction set, type and thread count gives what `reference` gives.

Slow ones build the extension again, with AVX-512 in software and with sanitizers, and repeat the
others there.
"""

import ctypes
import gc
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.codec import CODECS
from compress.unscaled import Raw
from longctx.attention.backend import ChunkRows
from longctx.attention.reference import ReferenceAttention
from longctx.errors import ModelRefused
from longctx.kv.block_entry import ENTRY_COLUMNS, FIRST_POSITION, PAGE, ROW_BEGIN, ROWS
from longctx.kv.memory import KVMemory
from longctx.model.layer_attention import AttentionCall
from tests.conformance.test_backends import Case, build, cases, tolerance

_kernels = pytest.importorskip("longctx.kernels._kernels")
from longctx.attention.cpu_backend import CPUAttention  # noqa: E402  # needs _kernels

INSTRUCTION_SETS = _kernels.attention_sets()
NARROW_SETS = _kernels.bfloat16_sets()  # of products in bfloat16
ROOT = Path(__file__).parents[2]
SCALING = 0.3


def attend(
    memory: KVMemory,
    chunks: tuple[ChunkRows, ...],
    query: Tensor,
    *,
    instruction_set: str | None = None,
    threads: int = 1,
    softcap: float | None = None,
    scaling: float = SCALING,
) -> tuple[Tensor, Tensor]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        backend = CPUAttention(memory, instruction_set)
        plan = backend.plan(chunks, 0)
        return backend.attend(AttentionCall(0, scaling, softcap), query, plan)
    finally:
        torch.set_num_threads(before)


def expected(
    memory: KVMemory,
    chunks: tuple[ChunkRows, ...],
    query: Tensor,
    *,
    softcap: float | None = None,
    scaling: float = SCALING,
) -> tuple[Tensor, Tensor]:
    backend = ReferenceAttention(memory)
    plan = backend.plan(chunks, 0)
    return backend.attend(AttentionCall(0, scaling, softcap), query, plan)


def assert_close(
    found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor], allowed: float
) -> None:
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=allowed, rtol=allowed)


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@settings(max_examples=5, deadline=None)
@given(case=cases("cpu"), threads=st.sampled_from([1, 2]))
def test_every_instruction_set_equals_reference(
    instruction_set: str, case: Case, threads: int
) -> None:
    memory, chunks, query = build(case)
    found = attend(
        memory,
        chunks,
        query,
        instruction_set=instruction_set,
        threads=threads,
        softcap=case.softcap,
    )
    assert_close(
        found, expected(memory, chunks, query, softcap=case.softcap), tolerance("cpu", case)
    )


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("codec", ["raw", "bf16", "int8", "int4"])
@settings(max_examples=8, deadline=None)
@given(
    head_dim=st.sampled_from([8, 16, 24, 32, 40, 64, 80, 96, 128, 256]),
    group=st.integers(1, 8),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    chunks=st.lists(
        st.tuples(st.integers(0, 300), st.one_of(st.integers(1, 3), st.integers(1, 100))),
        min_size=1,
        max_size=3,
    ),
    seed=st.integers(0, 1000),
)
def test_every_shape_and_type_equals_reference(
    instruction_set: str,
    codec: str,
    head_dim: int,
    group: int,
    dtype: torch.dtype,
    chunks: list[tuple[int, int]],
    seed: int,
) -> None:
    case = Case(codec, None, 2 * group, 2, head_dim, tuple(chunks), True, None, seed)
    memory, rows, query = build(case, dtype)
    query = query.to(dtype)
    found = attend(memory, rows, query, instruction_set=instruction_set, scaling=head_dim**-0.5)
    wanted = expected(memory, rows, query.float(), scaling=head_dim**-0.5)
    # `reference` reads pages through `decode`, which rounds to the model's type.
    lost = {torch.float32: 0.0, torch.bfloat16: 4e-2, torch.float16: 5e-3}[dtype]
    if codec == "raw":
        # Softmax weights that are rounded to bfloat16 are off by 2^-9 of themselves at most.
        narrow = dtype == torch.bfloat16 and instruction_set in NARROW_SETS
        lost = 2**-9 * float(memory.raw_rows(0).abs().max()) if narrow else 0.0
    assert_close(found, wanted, tolerance("cpu", case) + lost)


@pytest.mark.parametrize("head_dim", [1, 20, 63])
def test_raw_pages_may_have_any_head_dim(head_dim: int) -> None:
    case = Case("raw", None, 4, 2, head_dim, ((100, 9), (0, 1)), True, None, 0)
    memory, chunks, query = build(case)
    assert_close(attend(memory, chunks, query), expected(memory, chunks, query), 2e-5)


@pytest.mark.parametrize("codec", ["raw", "bf16", "int8", "int4"])
@pytest.mark.parametrize("new", [1, 40])
def test_short_entries_show_only_their_rows(codec: str, new: int) -> None:
    case = Case(codec, None, 4, 2, 64, ((640, new),), True, None, 3)
    memory, (chunk,), query = build(case)
    entries = chunk.entries[0].copy()
    entries[2, [ROW_BEGIN, ROWS]] = 5, 17
    entries[3, [ROW_BEGIN, ROWS]] = 63, 1
    entries[4, [ROW_BEGIN, ROWS]] = 0, 1
    cut = (replace(chunk, entries=(entries,)),)
    assert_close(attend(memory, cut, query), expected(memory, cut, query), tolerance("cpu", case))


def test_rows_without_own_pages_see_the_past_alone() -> None:
    case = Case("int8", None, 4, 2, 64, ((640, 100),), True, None, 3)
    memory, (chunk,), query = build(case)
    past = replace(chunk, own_pages=chunk.own_pages[:0], past_entries=7)
    out, lse = attend(memory, (past,), query, threads=2)
    rows = memory.decoded(0, torch.from_numpy(chunk.entries[0][:7, PAGE])).flatten(0, 1)
    keys, values = (part.repeat_interleave(2, dim=1) for part in rows.unbind(1))
    scores = SCALING * torch.einsum("qhd,khd->qhk", query, keys)
    assert_close(
        (out, lse),
        (torch.einsum("qhk,khd->qhd", scores.softmax(-1), values), scores.logsumexp(-1)),
        tolerance("cpu", case),
    )


def test_a_query_may_be_strided() -> None:
    case = Case("raw", None, 4, 2, 64, ((100, 9),), True, None, 0)
    memory, chunks, query = build(case)
    strided = query.transpose(0, 1).contiguous().transpose(0, 1)
    assert strided.stride() != query.stride()
    for one, other in zip(
        attend(memory, chunks, strided), attend(memory, chunks, query), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("codec", ["raw", "bf16", "int8", "int4"])
def test_a_row_alone_and_among_many_has_the_same_result(codec: str) -> None:
    """The in-place kernels, few rows, and the widening ones, many, compute the same attention."""
    case = Case(codec, None, 8, 2, 64, ((900, 90),), True, None, 1)
    memory, (chunk,), query = build(case)
    many = attend(memory, (chunk,), query)
    for row in (0, 59, 60, 89):
        alone = attend(memory, (chunk.pick(row),), query)
        for one, other in zip(alone, many, strict=True):
            torch.testing.assert_close(one[row], other[row], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("codec", ["raw", "int8"])
def test_threads_split_one_sequence_and_agree(codec: str) -> None:
    case = Case(codec, None, 8, 2, 64, ((3000, 1), (10, 1)), False, None, 1)
    memory, chunks, query = build(case)
    one, two = (attend(memory, chunks, query, threads=threads) for threads in (1, 2))
    assert_close(two, one, 1e-5)


def test_a_plan_beyond_its_pages_is_refused() -> None:
    case = Case("raw", None, 4, 2, 64, ((100, 9),), True, None, 0)
    memory, (chunk,), _ = build(case)
    with pytest.raises(ValueError, match="beyond its pages"):
        CPUAttention(memory).plan((replace(chunk, rows=200),), 0)


class _Heap(ctypes.Structure):
    """glibc's `struct mallinfo2`; `uordblks` and `hblkhd` are the bytes in use."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks ford top".split()
    ]


def heap_bytes() -> int:
    gc.collect()
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        pytest.skip("this C library does not tell what is allocated")
    libc.mallinfo2.restype = _Heap
    heap = libc.mallinfo2()
    return int(heap.uordblks + heap.hblkhd)


@pytest.mark.parametrize("codec", ["raw", "int4"])
def test_nothing_is_leaked(codec: str) -> None:
    case = Case(codec, None, 8, 2, 64, ((900, 90), (300, 1)), True, None, 1)
    memory, chunks, query = build(case)

    def work() -> None:
        for _ in range(50):  # each with a plan, a layer and scratch of its own
            attend(memory, chunks, query)
            CPUAttention(memory).seal(0, torch.tensor([1, 2]), torch.tensor([1, 2]))

    work()  # what is allocated once
    before = heap_bytes()
    work()
    assert heap_bytes() - before < 50 * 64  # a lost plan alone would be 100 bytes each time


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["raw", "bf16", "int8", "int4"])
def test_a_hundred_thousand_tokens_equal_reference(codec: str) -> None:
    tokens = 100_000
    case = Case(codec, None, 4, 1, 64, ((tokens % 3000, 1),), False, None, 0)
    memory, (chunk,), query = build(case)
    # The same few pages again and again, at other positions: long in tokens, small in memory.
    blocks = tokens // 64
    entries = np.zeros((blocks, ENTRY_COLUMNS), dtype=np.int64)
    entries[:, PAGE] = np.resize(chunk.entries[0][:, PAGE], blocks)
    entries[:, ROWS] = 64
    entries[:, FIRST_POSITION] = np.arange(blocks) * 64
    long = (
        replace(
            chunk,
            first_position=blocks * 64 + 5,
            own_row=5,
            past_entries=blocks,
            entries=(entries,),
        ),
    )
    found = attend(memory, long, query, threads=2, scaling=0.05)
    assert_close(found, expected(memory, long, query, scaling=0.05), 10 * tolerance("cpu", case))


def test_pages_of_a_codec_without_kernels_are_refused_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Other(Raw):
        name = "fp8"

    monkeypatch.setitem(CODECS, "fp8", Other)
    memory, _, _ = build(Case("fp8", None, 4, 2, 16, ((70, 10),), False, None, 0))
    with pytest.raises(ModelRefused, match=r"kv_codec 'fp8'.*--attention-backend torch"):
        CPUAttention(memory)


BUILDS = {
    "AVX-512 in software": ("LONGCTX_SIMDE", "/usr/include/simde", ()),
    "sanitizers": ("LONGCTX_SANITIZE", "/usr/bin/cmake", ("libasan.so", "libubsan.so")),
}
REPEAT = """
import importlib.util, sys
import pytest, torch
spec = importlib.util.spec_from_file_location("longctx.kernels._kernels", sys.argv[1])
kernels = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = kernels
spec.loader.exec_module(kernels)
print("repeated with", kernels.instruction_sets())
sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-m", "not slow", *sys.argv[2:]]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", BUILDS)
def test_other_builds_pass_too(kind: str, tmp_path: Path) -> None:
    option, needed, preloaded = BUILDS[kind]
    if not Path(needed).exists():
        pytest.skip(f"{needed} is not installed")
    import nanobind  # only for this

    configure = [
        *("cmake", "-S", str(ROOT), "-B", str(tmp_path), f"-D{option}=ON"),
        *("-DCMAKE_BUILD_TYPE=Release", f"-Dnanobind_DIR={nanobind.cmake_dir()}"),
        f"-DPython_EXECUTABLE={sys.executable}",
    ]
    subprocess.run(configure, check=True, capture_output=True)
    subprocess.run(["cmake", "--build", str(tmp_path), "-j2"], check=True, capture_output=True)
    (module,) = tmp_path.glob("_kernels*.so")
    libraries = [
        subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True).stdout
        for name in preloaded
    ]
    environment = {
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "LD_PRELOAD": " ".join(map(str.strip, libraries)),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python itself leaks at its end
    }
    tests = [
        str(ROOT / "tests" / name)
        for name in (
            "kernels/test_kernels.py",
            "model/test_packed_linear.py",
            "model/test_quantized_linear.py",
            "model/test_bfloat16_linear.py",
        )
    ]
    repeated = subprocess.run(
        [sys.executable, "-c", REPEAT, str(module), *tests],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert repeated.returncode == 0, repeated.stdout[-3000:] + repeated.stderr[-3000:]
