"""What blocks of quantized GGUF tensors hold: codes, and a scale and maybe a minimum for a group.

A weight is scale * code + minimum, in float32, as `gguf` itself computes it: the product is exact
in all these types, so that only the sum is rounded, once. Read `groups_of`.
Source: https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-common.h
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import gguf
import numpy as np
from gguf import GGMLQuantizationType as TensorType
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]


class Groups(NamedTuple):
    """Some rows: `codes` [rows, inputs], `scales` and `minima` [rows, groups], halves or floats."""

    codes: NDArray[np.int8]
    scales: NDArray[Any]
    minima: NDArray[Any] | None


def groups_of(kind: TensorType, rows: Bytes) -> Groups:
    """Take blocks apart: `rows` [rows, bytes of a row]. Codes of Q4_0 are not yet less 8."""
    block_bytes = gguf.GGML_QUANT_SIZES[kind][1]
    codes, scales, minima = READERS[kind](rows.reshape(-1, block_bytes))
    count = len(rows)
    return Groups(
        np.ascontiguousarray(codes.reshape(count, -1).view(np.int8)),
        np.ascontiguousarray(scales.reshape(count, -1)),
        None if minima is None else np.ascontiguousarray(minima.reshape(count, -1)),
    )


def _half(blocks: Bytes, at: int) -> NDArray[np.float16]:
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16)


def _nibbles(data: Bytes, width: int) -> Bytes:
    """Low halves of `width` bytes, then their high halves, and so on [blocks, 2 * bytes]."""
    split = data.reshape(len(data), -1, 1, width)
    return np.concatenate([split & 15, split >> 4], axis=2).reshape(len(data), -1)


def _fifth_bits(data: Bytes) -> Bytes:
    """A bit for each of 32 codes, as their bit 4 [blocks, 32]."""
    return np.unpackbits(data, axis=1, bitorder="little") << np.uint8(4)


def _q8_0(blocks: Bytes) -> tuple[Bytes, Any, Any]:
    return np.ascontiguousarray(blocks[:, 2:]), _half(blocks, 0), None


def _q4_0(blocks: Bytes) -> tuple[Bytes, Any, Any]:
    return _nibbles(blocks[:, 2:], 16), _half(blocks, 0), None


def _q4_1(blocks: Bytes) -> tuple[Bytes, Any, Any]:
    return _nibbles(blocks[:, 4:], 16), _half(blocks, 0), _half(blocks, 2)


def _q5_0(blocks: Bytes) -> tuple[Bytes, Any, Any]:
    codes = _nibbles(blocks[:, 6:], 16) | _fifth_bits(blocks[:, 2:6])
    return codes - np.uint8(16), _half(blocks, 0), None  # wraps around, as int8 does


def _q5_1(blocks: Bytes) -> tuple[Bytes, Any, Any]:
    codes = _nibbles(blocks[:, 8:], 16) | _fifth_bits(blocks[:, 4:8])
    return codes, _half(blocks, 0), _half(blocks, 2)


def _sixths(blocks: Bytes) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Scales and minima of eight groups, 6 bits each in 12 bytes, times those of their block."""
    low, high, rest = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate([low & 63, (rest & 15) | (low >> 6 << 4)], axis=1)
    minima = np.concatenate([high & 63, (rest >> 4) | (high >> 6 << 4)], axis=1)
    scale, minimum = (_half(blocks, at).astype(np.float32) for at in (0, 2))
    return scale * scales.astype(np.float32), -(minimum * minima.astype(np.float32))


def _q4_k(blocks: Bytes) -> tuple[Bytes, Any, Any]:
    return _nibbles(blocks[:, 16:], 32), *_sixths(blocks)


def _q5_k(blocks: Bytes) -> tuple[Bytes, Any, Any]:
    shifts = np.arange(8, dtype=np.uint8)[None, :, None]
    fifth = (blocks[:, None, 16:48] >> shifts & np.uint8(1)) << np.uint8(
        4
    )  # [blocks, 8 groups, 32]
    codes = _nibbles(blocks[:, 48:], 32) | fifth.reshape(len(blocks), -1)
    return codes, *_sixths(blocks)


def _q6_k(blocks: Bytes) -> tuple[Bytes, Any, Any]:
    low = _nibbles(blocks[:, :128], 64)
    shifts = np.array([0, 2, 4, 6], np.uint8)[None, None, :, None]
    high = blocks[:, 128:192].reshape(len(blocks), 2, 1, 32) >> shifts & np.uint8(3)
    codes = low | high.reshape(len(blocks), -1) << np.uint8(4)
    scales = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8).astype(np.float32)
    return codes - np.uint8(32), _half(blocks, 208).astype(np.float32) * scales, None


READERS: dict[TensorType, Callable[[Bytes], tuple[Bytes, Any, Any]]] = {
    TensorType.Q8_0: _q8_0,
    TensorType.Q4_0: _q4_0,
    TensorType.Q4_1: _q4_1,
    TensorType.Q5_0: _q5_0,
    TensorType.Q5_1: _q5_1,
    TensorType.Q4_K: _q4_k,
    TensorType.Q5_K: _q5_k,
    TensorType.Q6_K: _q6_k,
}
