"""Sealing by the Triton kernel, interpreted on a CPU: to the bytes of the codec's `encode`."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.codec import CODECS
from compress.shape import BLOCK_TOKENS, KVShape
from tests.conformance.test_codecs import DTYPES, kinds, rows
from tests.conformance.test_sealing import PAGES, filled, memory_of, pages_of

pytest.importorskip("triton", reason="pip install triton, to test the kernels for GPUs")
with pytest.MonkeyPatch.context() as patch:  # Triton's decorators read it, when they are used
    patch.setenv("TRITON_INTERPRET", "1")
    from longctx.attention.cuda_backend import CODECS as READABLE
    from longctx.attention.cuda_backend import CUDAAttention

# numpy, which interprets, warns of NaN and infinity where a GPU does not
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

WITHOUT_SHRINKING = [Phase.explicit, Phase.reuse, Phase.generate]  # the interpreter takes its time


@pytest.fixture(scope="module", autouse=True)
def _interpreted() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        yield


def assert_same_bytes(
    codec: str,
    content: Tensor,
    shape: KVShape,
    raw: Tensor | slice = slice(4, 6),
    packed: tuple[int, int] = (3, 1),
) -> None:
    """Seal raw pages 4 and 5 of layer 1: `content`, in the order that `raw` names them."""
    memory = memory_of(codec, shape)
    filled(memory, content)
    CUDAAttention(memory).seal(1, raw, pages_of(packed))
    expected = torch.zeros_like(memory.packed_pages(1))
    listed = torch.arange(raw.start, raw.stop) if isinstance(raw, slice) else raw
    expected[list(packed)] = memory.codecs[1].encode(content[listed - 4])
    got = memory.packed_pages(1)
    if codec == "bf16":  # a NaN may be written in several ways
        nan = expected.view(torch.bfloat16).isnan()
        assert torch.equal(got.view(torch.bfloat16).isnan(), nan)
        got, expected = got.view(torch.int16)[~nan], expected.view(torch.int16)[~nan]
    assert torch.equal(got, expected)
    assert not memory.packed_pages(0).any()


@dataclass(frozen=True)
class Sealing:
    shape: KVShape
    seed: int
    oddities: tuple[str, ...]
    raw: Tensor | slice
    packed: tuple[int, int]


def assert_sealed_alike(codec: str, case: Sealing) -> None:
    content = rows(case.shape, case.seed, *case.oddities)
    assert_same_bytes(codec, content, case.shape, case.raw, case.packed)


def test_every_codec_is_sealed() -> None:
    assert set(READABLE) == set(CODECS)


def sealings(head_dims: st.SearchStrategy[int]) -> st.SearchStrategy[Sealing]:
    return st.builds(
        Sealing,
        shape=st.builds(
            KVShape,
            kv_heads=st.integers(1, 2),
            head_dim=head_dims,
            dtype=st.sampled_from(DTYPES),
        ),
        seed=st.integers(0, 1000),
        oddities=kinds().map(tuple),
        raw=st.sampled_from([slice(4, 6), torch.tensor([5, 4])]),
        packed=st.permutations(range(1, PAGES)).map(lambda pages: (pages[0], pages[1])),
    )


@pytest.mark.parametrize("codec", list(READABLE))
@settings(max_examples=5, deadline=None, phases=WITHOUT_SHRINKING)
@given(sealing=sealings(st.sampled_from([8, 24, 64, 80, 96])))
def test_a_sealed_page_is_what_encode_gives(codec: str, sealing: Sealing) -> None:
    assert_sealed_alike(codec, sealing)


@pytest.mark.slow
@pytest.mark.parametrize("codec", list(READABLE))
@settings(max_examples=30, deadline=None, phases=WITHOUT_SHRINKING)
@given(sealing=sealings(st.integers(1, 32).map(lambda eights: 8 * eights)))
def test_a_sealed_page_of_any_head_is_what_encode_gives(codec: str, sealing: Sealing) -> None:
    assert_sealed_alike(codec, sealing)


@pytest.mark.parametrize("codec", list(READABLE))
@pytest.mark.parametrize("head_dim", [64, 96, 128, 248, 256])
def test_huge_biases_zeros_and_ties_are_sealed_alike(codec: str, head_dim: int) -> None:
    """One head has a bias of thousands in a few dims, one is zeros, one has codes on the half."""
    shape = KVShape(kv_heads=3, head_dim=head_dim, dtype=torch.float32)
    content = rows(shape, 5)
    content[..., 0, ::7] += 4096.0
    content[..., 0, 1::9] -= 1e30
    content[..., 1, :] = 0.0
    halves = torch.arange(-127, 128, 1) * 0.5
    content[..., 2, :] = halves[torch.arange(content[..., 2, :].numel()) % 255].view(2, 64, 2, -1)
    assert_same_bytes(codec, content, shape)


@pytest.mark.parametrize("codec", list(READABLE))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=3, deadline=None, phases=WITHOUT_SHRINKING)
@given(seed=st.integers(0, 1 << 30))
def test_any_bits_are_sealed_alike(codec: str, dtype: torch.dtype, seed: int) -> None:
    """Rows of random bits have numbers of every size, NaN and infinity among them."""
    shape = KVShape(kv_heads=1, head_dim=24, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    size = (2, BLOCK_TOKENS * 2 * 24 * dtype.itemsize)
    bits = torch.randint(256, size, generator=generator, dtype=torch.uint8)
    content = bits.view(dtype).view(2, *shape.rows).clone()
    content[:, ::3] = rows(shape, seed)[:, ::3]  # else no channel has a token that is whole
    assert_same_bytes(codec, content, shape)


@pytest.mark.parametrize("codec", list(READABLE))
@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf, -torch.inf, 3e38], ids=str)
@pytest.mark.parametrize("side", [0, 1], ids=["key", "value"])
def test_tokens_that_broke_are_sealed_alike(codec: str, bad: float, side: int) -> None:
    shape = KVShape(kv_heads=2, head_dim=80, dtype=torch.float32)
    content = rows(shape, 0)
    content[:, ::7, side, :, 3] = bad
    content[1, :, side, 1, 3] = bad  # of all tokens
    assert_same_bytes(codec, content, shape)
