"""What every codec promises: one page layout, and a bound on what it loses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.codec import CODECS
from compress.shape import KVShape

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HEAD_DIMS = [8, 16, 24, 64, 80, 128, 256]
SMALLEST_NORMAL = 2.0**-126  # below it scales lose digits; nothing that attention could notice


def rows(shape: KVShape, seed: int, magnitude: float) -> Tensor:
    """Two blocks: ordinary rows, rows of zeros, and rows with one outlier."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(2, *shape.rows, generator=generator)
    values[0, ::3] = 0
    values[1, ::5, :, :, 0] *= 100
    limit = torch.finfo(shape.dtype).max / 2
    return (values * magnitude).clamp(-limit, limit).to(shape.dtype)


def shapes() -> st.SearchStrategy[KVShape]:
    return st.builds(
        KVShape,
        kv_heads=st.integers(1, 3),
        head_dim=st.sampled_from(HEAD_DIMS),
        dtype=st.sampled_from(DTYPES),
    )


def magnitudes() -> st.SearchStrategy[float]:
    return st.sampled_from([1e-30, 1e-6, 0.01, 1.0, 300.0, 1e20])


def error_bound(name: str, wide: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest error that the codec allows itself, value by value."""
    stored = torch.finfo(dtype).eps / 2 * wide.abs() + torch.finfo(dtype).smallest_normal
    if name == "raw":
        return torch.zeros_like(wide)
    if name == "bf16":
        return torch.zeros_like(wide) if dtype == torch.bfloat16 else 2**-8 * wide.abs() + stored
    # Half a step, where a step is the row's largest value over 127, itself rounded to bfloat16.
    step = wide.abs().amax(-1, keepdim=True) / 127
    own = torch.finfo(dtype).eps / 2 * 1.01 * wide.abs().amax(-1, keepdim=True)
    narrow = 0.0 if dtype == torch.float32 else own
    return 0.5 * step * (1 + 2**-8) * (1 + 1e-5) + narrow + SMALLEST_NORMAL + stored


@pytest.mark.parametrize("name", sorted(CODECS))
@settings(max_examples=40, deadline=None)
@given(shape=shapes(), seed=st.integers(0, 1000), magnitude=magnitudes())
def test_a_page_loses_no_more_than_the_codec_states(
    name: str, shape: KVShape, seed: int, magnitude: float
) -> None:
    codec = CODECS[name](shape)
    original = rows(shape, seed, magnitude)
    decoded = codec.decode(codec.encode(original))
    assert decoded.shape == original.shape and decoded.dtype == shape.dtype
    error = (decoded.float() - original.float()).abs()
    bound = error_bound(name, original.float(), shape.dtype)
    assert (error <= bound).all(), float((error - bound).max())


@pytest.mark.parametrize("name", sorted(CODECS))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_lossless_codec_gives_back_every_bit(name: str, dtype: torch.dtype) -> None:
    shape = KVShape(kv_heads=2, head_dim=64, dtype=dtype)
    codec = CODECS[name](shape)
    original = rows(shape, 0, 1.0)
    same = torch.equal(codec.decode(codec.encode(original)), original)
    assert same == codec.lossless
    assert codec.lossless == (name == "raw" or (name == "bf16" and dtype == torch.bfloat16))


@pytest.mark.parametrize("name", sorted(CODECS))
def test_pages_are_bytes_of_the_stated_length(name: str) -> None:
    shape = KVShape(kv_heads=2, head_dim=24, dtype=torch.float32)
    codec = CODECS[name](shape)
    pages = codec.encode(rows(shape, 0, 1.0))
    assert pages.dtype == torch.uint8
    assert pages.shape == (2, codec.page_bytes)
    assert codec.name == name and codec.version >= 1


def test_int8_takes_a_quarter_of_float32_and_a_scale() -> None:
    shape = KVShape(kv_heads=1, head_dim=64, dtype=torch.float32)
    assert CODECS["int8"](shape).page_bytes * 8 / shape.values_per_page == 8.25


@pytest.mark.parametrize("name", sorted(CODECS))
def test_a_block_is_encoded_alike_beside_any_neighbours(name: str) -> None:
    shape = KVShape(kv_heads=2, head_dim=64, dtype=torch.float32)
    codec = CODECS[name](shape)
    blocks = torch.cat([rows(shape, seed, 1.0) for seed in range(3)])
    pages = codec.encode(blocks)
    for index in range(len(blocks)):
        assert torch.equal(codec.encode(blocks[index : index + 1])[0], pages[index])
        assert torch.equal(codec.decode(pages[index : index + 1])[0], codec.decode(pages)[index])


@pytest.mark.parametrize("name", sorted(CODECS))
def test_zeros_stay_zeros(name: str) -> None:
    shape = KVShape(kv_heads=1, head_dim=8, dtype=torch.float16)
    codec = CODECS[name](shape)
    zeros = torch.zeros(1, *shape.rows, dtype=torch.float16)
    assert torch.equal(codec.decode(codec.encode(zeros)), zeros)


@pytest.mark.parametrize("name", sorted(CODECS))
def test_sealing_again_what_was_decoded_changes_nothing(name: str) -> None:
    shape = KVShape(kv_heads=2, head_dim=64, dtype=torch.float32)
    codec = CODECS[name](shape)
    once = codec.decode(codec.encode(rows(shape, 1, 1.0)))
    again = codec.decode(codec.encode(once))
    torch.testing.assert_close(again, once, rtol=2**-7, atol=0)
