"""What blocks of quantized GGUF tensors hold: codes, and a scale and maybe a minimum for a group.

In types of 256 weights a block, scales and minima are small integers that a number of the block is
multiplied with. A weight is scale * code + minimum, in float32, as `gguf` itself computes it: the
product is exact in all these types, so that only the sum is rounded, once. Read `groups_of`.
Source: https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-common.h
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import gguf
import numpy as np
from gguf import GGMLQuantizationType as TensorType
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]


class Numbers(NamedTuple):
    """Scales or minima of groups.

    `own` [rows, groups] are halves, or int8 to be multiplied with `common` [rows, blocks], halves.
    """

    own: NDArray[Any]
    common: NDArray[np.float16] | None = None

    def by_rows(self, count: int) -> "Numbers":
        """Share what is known block by block out to `count` rows."""
        common = None if self.common is None else _rows(self.common, count)
        return Numbers(_rows(self.own, count), common)

    def values(self) -> NDArray[np.float32]:
        """Multiply out what each group has [rows, groups]."""
        values: NDArray[np.float32] = self.own.astype(np.float32)
        if self.common is None:
            return values
        groups = values.shape[1] // self.common.shape[1]
        return values * np.repeat(self.common.astype(np.float32), groups, axis=1)


class Groups(NamedTuple):
    """Some rows: `codes` [rows, inputs], and what their groups have."""

    codes: NDArray[np.int8]
    scales: Numbers
    minima: Numbers | None


def groups_of(kind: TensorType, rows: Bytes) -> Groups:
    """Take blocks apart: `rows` [rows, bytes of a row]. Codes of Q4_0 are not yet less 8."""
    block_bytes = gguf.GGML_QUANT_SIZES[kind][1]
    codes, scales, minima = READERS[kind](rows.reshape(-1, block_bytes))
    count = len(rows)
    return Groups(
        _rows(codes, count).view(np.int8),
        scales.by_rows(count),
        None if minima is None else minima.by_rows(count),
    )


def _rows(data: NDArray[Any], count: int) -> NDArray[Any]:
    return np.ascontiguousarray(data.reshape(count, -1))


def _half(blocks: Bytes, at: int) -> NDArray[np.float16]:
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16)


def _nibbles(data: Bytes, width: int) -> Bytes:
    """Low halves of `width` bytes, then their high halves, and so on [blocks, 2 * bytes]."""
    split = data.reshape(len(data), -1, 1, width)
    return np.concatenate([split & 15, split >> 4], axis=2).reshape(len(data), -1)


def _fifth_bits(data: Bytes) -> Bytes:
    """A bit for each of 32 codes, as their bit 4 [blocks, 32]."""
    return np.unpackbits(data, axis=1, bitorder="little") << np.uint8(4)


Parts = tuple[Bytes, Numbers, Numbers | None]


def _q8_0(blocks: Bytes) -> Parts:
    return np.ascontiguousarray(blocks[:, 2:]), Numbers(_half(blocks, 0)), None


def _q4_0(blocks: Bytes) -> Parts:
    return _nibbles(blocks[:, 2:], 16), Numbers(_half(blocks, 0)), None


def _q4_1(blocks: Bytes) -> Parts:
    return _nibbles(blocks[:, 4:], 16), Numbers(_half(blocks, 0)), Numbers(_half(blocks, 2))


def _q5_0(blocks: Bytes) -> Parts:
    codes = _nibbles(blocks[:, 6:], 16) | _fifth_bits(blocks[:, 2:6])
    return codes - np.uint8(16), Numbers(_half(blocks, 0)), None  # wraps around, as int8 does


def _q5_1(blocks: Bytes) -> Parts:
    codes = _nibbles(blocks[:, 8:], 16) | _fifth_bits(blocks[:, 4:8])
    return codes, Numbers(_half(blocks, 0)), Numbers(_half(blocks, 2))


def _six_bits(blocks: Bytes) -> tuple[Numbers, Numbers]:
    """Scales and minima of eight groups, 6 bits each in 12 bytes; a block subtracts its minima."""
    low, high, rest = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate([low & 63, (rest & 15) | (low >> 6 << 4)], axis=1)
    minima = np.concatenate([high & 63, (rest >> 4) | (high >> 6 << 4)], axis=1)
    return (
        Numbers(scales.view(np.int8), _half(blocks, 0)),
        Numbers(minima.view(np.int8), -_half(blocks, 2)),
    )


def _q4_k(blocks: Bytes) -> Parts:
    return _nibbles(blocks[:, 16:], 32), *_six_bits(blocks)


def _q5_k(blocks: Bytes) -> Parts:
    shifts = np.arange(8, dtype=np.uint8)[None, :, None]
    fifth = (blocks[:, None, 16:48] >> shifts & np.uint8(1)) << np.uint8(
        4
    )  # [blocks, 8 groups, 32]
    codes = _nibbles(blocks[:, 48:], 32) | fifth.reshape(len(blocks), -1)
    return codes, *_six_bits(blocks)


def _q6_k(blocks: Bytes) -> Parts:
    low = _nibbles(blocks[:, :128], 64)
    shifts = np.array([0, 2, 4, 6], np.uint8)[None, None, :, None]
    high = blocks[:, 128:192].reshape(len(blocks), 2, 1, 32) >> shifts & np.uint8(3)
    codes = low | high.reshape(len(blocks), -1) << np.uint8(4)
    scales = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8)
    return codes - np.uint8(32), Numbers(scales, _half(blocks, 208)), None


READERS: dict[TensorType, Callable[[Bytes], Parts]] = {
    TensorType.Q8_0: _q8_0,
    TensorType.Q4_0: _q4_0,
    TensorType.Q4_1: _q4_1,
    TensorType.Q5_0: _q5_0,
    TensorType.Q5_1: _q5_1,
    TensorType.Q4_K: _q4_k,
    TensorType.Q5_K: _q5_k,
    TensorType.Q6_K: _q6_k,
}
