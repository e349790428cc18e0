"""What every codec promises: pages of stated length, and a bound on what they lose."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.codec import CODECS
from compress.int4 import group_dims
from compress.shape import BLOCK_TOKENS, KVShape

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SMALLEST_NORMAL = 2.0**-126  # below it scales lose digits; nothing that attention could notice
BF16_ROUNDING = 2.0**-8
KEYS, VALUES = 0, 1

# What one row in five is made into; the others are ordinary.
ODDITIES = ["zeros", "negative zeros", "constant", "outlier", "offset", "denormal", "large"]


def rows(shape: KVShape, seed: int, *oddities: str) -> Tensor:
    """Return two blocks of random rows; every fifth (of one token, side and head) is odd."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(2, *shape.rows, generator=generator)
    flat = values.view(-1, shape.head_dim)
    for index, kind in enumerate(oddities):
        flat[index :: 5 * len(oddities)] = odd(kind, flat[index :: 5 * len(oddities)])
    limit = min(torch.finfo(shape.dtype).max, 1e36) / 2
    return values.clamp(-limit, limit).to(shape.dtype)


def odd(kind: str, values: Tensor) -> Tensor:
    match kind:
        case "zeros":
            return torch.zeros_like(values)
        case "negative zeros":
            return -torch.zeros_like(values)
        case "constant":
            return values[:, :1].expand_as(values)
        case "outlier":
            return torch.cat((values[:, :1] * 1000, values[:, 1:]), dim=1)
        case "offset":
            return values + 300
        case "denormal":
            return values * 1e-40
        case _:
            return values * 1e36


def shapes() -> st.SearchStrategy[KVShape]:
    return st.builds(
        KVShape,
        kv_heads=st.integers(1, 8),
        head_dim=st.integers(1, 32).map(lambda eights: 8 * eights),
        dtype=st.sampled_from(DTYPES),
    )


def kinds() -> st.SearchStrategy[list[str]]:
    return st.lists(st.sampled_from(ODDITIES), unique=True, max_size=len(ODDITIES))


def bf16_bound(wide: Tensor) -> Tensor:
    return BF16_ROUNDING * wide.abs() + SMALLEST_NORMAL


def of_sides(keys: Tensor, values: Tensor) -> Tensor:
    """Join bounds of keys [blocks, 1 or tokens, heads, dims] and of values to those of rows."""
    return torch.stack((keys.expand_as(values), values), dim=2)


def channel_reach(wide: Tensor) -> Tensor:
    """How far keys may be from their channel's offset, the middle rounded to bfloat16."""
    low, high = wide[:, :, KEYS].aminmax(dim=1, keepdim=True)
    return ((high / 2 - low / 2) + BF16_ROUNDING * (high / 2 + low / 2).abs()) * (1 + BF16_ROUNDING)


def int8_bound(wide: Tensor) -> Tensor:
    values = wide[:, :, VALUES]
    step = values.abs().amax(-1, keepdim=True) / 127 * (1 + BF16_ROUNDING)
    return of_sides(channel_reach(wide) / 127 / 2, (step / 2).expand_as(values))


def int4_bound(wide: Tensor) -> Tensor:
    values = wide[:, :, VALUES]
    groups = values.unflatten(-1, (-1, group_dims(values.shape[-1])))
    low, high = groups.aminmax(dim=-1, keepdim=True)
    span = high - low + 2 * BF16_ROUNDING * low.abs()
    step = (span / 15 * (1 + BF16_ROUNDING)).expand_as(groups).flatten(-2)
    return of_sides(channel_reach(wide) / 7.5 / 2, step / 2)


# The largest error that a codec may make, value by value, before the values are stored as rows
ERROR_BOUNDS: dict[str, Callable[[Tensor], Tensor]] = {
    "raw": torch.zeros_like,
    "bf16": bf16_bound,
    "int8": int8_bound,
    "int4": int4_bound,
}


def test_every_codec_states_a_bound() -> None:
    assert ERROR_BOUNDS.keys() == CODECS.keys()


@pytest.mark.parametrize("name", sorted(CODECS))
@settings(max_examples=25, deadline=None)
@given(shape=shapes(), seed=st.integers(0, 1000), oddities=kinds())
def test_a_page_loses_no_more_than_the_codec_states(
    name: str, shape: KVShape, seed: int, oddities: list[str]
) -> None:
    codec = CODECS[name](shape)
    original = rows(shape, seed, *oddities)
    decoded = codec.decode(codec.encode(original))
    assert decoded.shape == original.shape and decoded.dtype == shape.dtype
    wide = original.float()
    error = (decoded.float() - wide).abs()
    # Beside it: float32's own rounding, and that of the type in which decode gives the rows.
    largest = wide.abs().amax(1, keepdim=True)  # of a channel, or of values in any token
    storing = 0.0 if codec.lossless else 2 * torch.finfo(shape.dtype).eps
    slack = (1e-5 if name != "raw" else 0.0) * ERROR_BOUNDS[name](wide) + storing * largest
    bound = ERROR_BOUNDS[name](wide) + slack
    assert (error <= bound + 2 * SMALLEST_NORMAL * (not codec.lossless)).all()


@pytest.mark.parametrize("name", sorted(CODECS))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_lossless_codec_gives_back_every_bit(name: str, dtype: torch.dtype) -> None:
    shape = KVShape(kv_heads=2, head_dim=64, dtype=dtype)
    codec = CODECS[name](shape)
    original = rows(shape, 0, *ODDITIES)
    decoded = codec.decode(codec.encode(original))
    assert torch.equal(decoded.view(torch.uint8), original.view(torch.uint8)) == codec.lossless
    assert codec.lossless == (name == "raw" or (name == "bf16" and dtype == torch.bfloat16))


@pytest.mark.parametrize("name", sorted(CODECS))
def test_only_pages_read_in_place_share_their_memory(name: str) -> None:
    shape = KVShape(kv_heads=2, head_dim=64, dtype=torch.bfloat16)
    codec = CODECS[name](shape)
    pages = codec.encode(rows(shape, 0))
    shared = codec.decode(pages).data_ptr() == pages.data_ptr()
    assert shared == codec.in_place == (name == "raw")


@pytest.mark.parametrize("name", sorted(CODECS))
def test_pages_are_bytes_of_the_stated_length(name: str) -> None:
    shape = KVShape(kv_heads=2, head_dim=24, dtype=torch.float32)
    codec = CODECS[name](shape)
    pages = codec.encode(rows(shape, 0))
    assert pages.dtype == torch.uint8
    assert pages.shape == (2, codec.page_bytes)
    assert codec.name == name and codec.version >= 1 and codec.shape == shape


@pytest.mark.parametrize("name", sorted(CODECS))
def test_a_block_is_encoded_alike_beside_any_neighbours(name: str) -> None:
    shape = KVShape(kv_heads=2, head_dim=64, dtype=torch.float32)
    codec = CODECS[name](shape)
    blocks = torch.cat([rows(shape, seed, *ODDITIES) for seed in range(3)])
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
    assert torch.equal(codec.decode(codec.encode(-zeros)), zeros)


@pytest.mark.parametrize("name", sorted(CODECS))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("side", [0, 1], ids=["key", "value"])
def test_a_row_that_broke_stays_broken_alone(
    name: str, dtype: torch.dtype, bad: float, side: int
) -> None:
    """One NaN or infinity shows in the key or value of that token and head, and in no other's."""
    shape = KVShape(kv_heads=2, head_dim=128, dtype=dtype)
    codec = CODECS[name](shape)
    whole = rows(shape, 3)
    broken = whole.clone()
    broken[0, 5, side, 1, 7] = bad
    decoded = codec.decode(codec.encode(broken))
    assert not decoded[0, 5, side, 1, 7].isfinite()
    without = whole.clone()
    without[0, 5, KEYS, 1] = whole[0, 6, KEYS, 1]  # whatever the key was, it is not measured
    expected = codec.decode(codec.encode(without if side == KEYS else whole))
    decoded[0, 5, :, 1] = expected[0, 5, :, 1]
    assert torch.equal(decoded, expected)


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("bias", [100.0, 900.0])
def test_a_bias_of_a_few_dims_takes_nothing_from_the_others(name: str, bias: float) -> None:
    """As all Qwen2 keys have; in some dims it turns with the position."""
    shape = KVShape(kv_heads=2, head_dim=64, dtype=torch.float32)
    codec = CODECS[name](shape)
    plain = rows(shape, 7)
    positions = torch.arange(BLOCK_TOKENS)[:, None]
    biased = plain.clone()
    biased[:, :, KEYS, :, 5] += bias
    biased[:, :, KEYS, :, 12] += bias * (0.1 * positions).cos()
    biased[:, :, KEYS, :, 44] += bias * (0.1 * positions).sin()
    others = [dim for dim in range(64) if dim not in (5, 12, 44)]
    decoded, of_biased = (codec.decode(codec.encode(each)) for each in (plain, biased))
    assert torch.equal(of_biased[..., others], decoded[..., others])
    still = (of_biased - biased)[:, :, KEYS, :, 5].abs().max()
    assert still <= 2 * (decoded - plain)[:, :, KEYS, :, 5].abs().max()


@pytest.mark.parametrize("name", sorted(CODECS))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_largest_numbers_come_back_finite_or_as_what_is_not(
    name: str, dtype: torch.dtype
) -> None:
    """What decode gives never has the wrong sign or size, however large the numbers are."""
    shape = KVShape(kv_heads=1, head_dim=64, dtype=dtype)
    codec = CODECS[name](shape)
    largest = torch.finfo(dtype).max * torch.sign(rows(shape, 4).float()).to(dtype)
    decoded = codec.decode(codec.encode(largest))
    finite = decoded.isfinite()
    torch.testing.assert_close(decoded[finite], largest[finite], rtol=0.9, atol=0)
    assert finite.all() or name in ("bf16", "int4")


@pytest.mark.parametrize("name", sorted(CODECS))
def test_sealing_again_what_was_decoded_changes_little(name: str) -> None:
    shape = KVShape(kv_heads=2, head_dim=64, dtype=torch.float32)
    codec = CODECS[name](shape)
    once = codec.decode(codec.encode(rows(shape, 1)))
    again = codec.decode(codec.encode(once))
    torch.testing.assert_close(again, once, rtol=2**-7, atol=0.03 if name == "int4" else 0)
