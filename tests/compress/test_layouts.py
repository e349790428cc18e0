"""Pages hold what their codec's docstring says; here they are read number by number."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from compress.codec import CODECS
from compress.int4 import group_dims
from compress.shape import BLOCK_TOKENS, KVShape, ShapeRefused

HEAD_DIMS = [8, 24, 64, 80, 128, 256]
KEYS, VALUES = 0, 1


@dataclass(frozen=True)
class Record:
    """The bytes of one KV head of one page."""

    content: NDArray[np.uint8]
    head_dim: int

    def bfloat16(self, byte: int) -> float:
        low, high = self.content[byte : byte + 2].astype(np.uint32)
        return float(np.array([(low | high << 8) << 16], dtype=np.uint32).view(np.float32)[0])

    def place(self, side: int, token: int, dim: int, width: int) -> int:
        """Return the index of a number among those of its side, keys or values."""
        if side == KEYS:
            return (dim // width * BLOCK_TOKENS + token) * width + dim % width
        return (token // width * self.head_dim + dim) * width + token % width


def read_bf16(record: Record, side: int, token: int, dim: int) -> float:
    begin = side * BLOCK_TOKENS * record.head_dim
    return record.bfloat16(2 * (begin + record.place(side, token, dim, 2)))


def read_int8(record: Record, side: int, token: int, dim: int) -> float:
    values = BLOCK_TOKENS * record.head_dim
    code = float(record.content.view(np.int8)[side * values + record.place(side, token, dim, 4)])
    value_scales = 2 * values
    if side == VALUES:
        return code * record.bfloat16(value_scales + 2 * token)
    scales = value_scales + 2 * BLOCK_TOKENS
    offsets = scales + 2 * record.head_dim
    return code * record.bfloat16(scales + 2 * dim) + record.bfloat16(offsets + 2 * dim)


def read_int4(record: Record, side: int, token: int, dim: int) -> float:
    packed = BLOCK_TOKENS * record.head_dim // 2
    split = dim if side == KEYS else token
    high, paired = split // 4 % 2, split // 8 * 4 + split % 4
    places = (token, paired) if side == KEYS else (paired, dim)
    byte = int(record.content[side * packed + record.place(side, *places, 4)])
    code = byte >> 4 if high else byte & 15
    groups = record.head_dim // group_dims(record.head_dim)
    if side == KEYS:
        scales = 2 * packed + 2 * 2 * BLOCK_TOKENS * groups
        offsets = scales + 2 * record.head_dim
        return (code - 7.5) * record.bfloat16(scales + 2 * dim) + record.bfloat16(offsets + 2 * dim)
    group = dim // group_dims(record.head_dim)
    scale_at = 2 * packed + 2 * BLOCK_TOKENS * group + 2 * token
    minimum_at = scale_at + 2 * BLOCK_TOKENS * groups
    return code * record.bfloat16(scale_at) + record.bfloat16(minimum_at)


READERS: dict[str, Callable[[Record, int, int, int], float]] = {
    "bf16": read_bf16,
    "int8": read_int8,
    "int4": read_int4,
}


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("name", READERS)
def test_every_number_stands_where_the_layout_says(name: str, head_dim: int) -> None:
    shape = KVShape(kv_heads=3, head_dim=head_dim, dtype=torch.float32)
    codec = CODECS[name](shape)
    generator = torch.Generator().manual_seed(head_dim)
    pages = codec.encode(torch.randn(2, *shape.rows, generator=generator))
    decoded = codec.decode(pages)
    for block, token, side, head, dim in np.ndindex(decoded.shape):
        if (token * 7 + dim) % 41:  # of the many numbers of a page some of every kind
            continue
        record = Record(pages.view(2, 3, -1)[block, head].numpy(), head_dim)
        expected = READERS[name](record, side, token, dim)
        assert float(decoded[block, token, side, head, dim]) == pytest.approx(expected, abs=1e-5)


def test_raw_pages_are_the_rows_themselves() -> None:
    shape = KVShape(kv_heads=3, head_dim=5, dtype=torch.float16)
    rows = torch.randn(2, *shape.rows).half()
    pages = CODECS["raw"](shape).encode(rows)
    assert pages.numpy().tobytes() == rows.numpy().tobytes()


@pytest.mark.parametrize(
    ("name", "bits"), [("raw", 32), ("bf16", 16), ("int8", 8.375), ("int4", 4.5)]
)
def test_a_value_of_64_dims_takes_so_many_bits(name: str, bits: float) -> None:
    shape = KVShape(kv_heads=2, head_dim=64, dtype=torch.float32)
    assert CODECS[name](shape).page_bytes * 8 / shape.values_per_page == bits


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("head_dim", [4, 20, 100, 264])
def test_other_head_dims_are_refused_with_the_cure(name: str, head_dim: int) -> None:
    shape = KVShape(kv_heads=1, head_dim=head_dim, dtype=torch.float32)
    with pytest.raises(ShapeRefused, match=f"head_dim={head_dim} .* up to 256; use --kv-codec raw"):
        CODECS[name](shape)


@pytest.mark.parametrize("head_dim", range(8, 257, 8))
def test_groups_divide_head_dim_into_eights(head_dim: int) -> None:
    dims = group_dims(head_dim)
    assert head_dim % dims == 0 and dims % 8 == 0 and dims <= 64
