"""The page layout that all packed codecs share: one record for each KV head, for vector units.

A page is `kv_heads` equal records, one after another, so that a kernel reads one head as one run
of bytes. A record holds the keys, then the values, then their scales. Within it numbers are in the
order in which dot products use them, `width` of them to a 32-bit lane:

    keys    [head_dim / width, block_tokens, width]   a lane has some dims of one token
    values  [block_tokens / width, head_dim, width]   a lane has one dim of some tokens

With bytes (`width` 4) and head_dim 128, the first lane of the keys is dims 0 to 3 of token 0, the
next one the same dims of token 1; the first lane of the values is dim 0 of tokens 0 to 3, the next
one dim 1 of these.
"""

from collections.abc import Sequence
from itertools import accumulate
from math import prod

import torch
from torch import Tensor

from compress.shape import KVShape, ShapeRefused

DIM_MULTIPLE = 8
LARGEST_DIM = 256


def check_head_dim(codec: str, shape: KVShape) -> None:
    """Raise ShapeRefused for a head_dim that records are not laid out for."""
    dim = shape.head_dim
    if dim % DIM_MULTIPLE or not 0 < dim <= LARGEST_DIM:
        raise ShapeRefused(
            f"head_dim={dim} does not fit KV codec {codec}, which takes multiples of "
            f"{DIM_MULTIPLE} up to {LARGEST_DIM}; use --kv-codec raw"
        )


class Records:
    """The parts of one codec's records, by type and sizes; it gives views of them in pages."""

    def __init__(self, kv_heads: int, parts: Sequence[tuple[torch.dtype, tuple[int, ...]]]) -> None:
        """Lay out `parts`, the type and the sizes of each, in order and without gaps."""
        self._kv_heads = kv_heads
        self._parts = tuple(parts)
        ends = accumulate(kind.itemsize * prod(sizes) for kind, sizes in parts)
        self._offsets = (0, *ends)
        self.page_bytes = kv_heads * self._offsets[-1]

    def empty(self, blocks: int, device: torch.device) -> Tensor:
        """Return pages to be filled, uint8 [blocks, page_bytes]."""
        return torch.empty(blocks, self.page_bytes, dtype=torch.uint8, device=device)

    def views(self, pages: Tensor) -> tuple[Tensor, ...]:
        """Return each part of the pages, in place: [blocks, kv_heads, *sizes]."""
        records = pages.view(-1, self._kv_heads, self._offsets[-1])
        bounds = zip(self._offsets, self._offsets[1:], self._parts, strict=False)
        return tuple(
            torch.unflatten(records[..., begin:end].view(kind), -1, sizes)
            for begin, end, (kind, sizes) in bounds
        )


def key_lanes(keys: Tensor) -> Tensor:
    """[blocks, tokens, kv_heads, dims] -> int32 [blocks, kv_heads, dims / width, tokens].

    The width is as many numbers as make 32 bits: 2 of bfloat16, 4 of a byte.
    """
    lanes = keys.flatten().view(torch.int32).view(*keys.shape[:-1], -1)
    return lanes.permute(0, 2, 3, 1)


def value_lanes(values: Tensor) -> Tensor:
    """[blocks, tokens, kv_heads, dims] -> [blocks, kv_heads, tokens / width, dims, width]."""
    return torch.unflatten(values, 1, (-1, 4 // values.itemsize)).permute(0, 3, 1, 4, 2)


def keys_of(lanes: Tensor, kind: torch.dtype) -> Tensor:
    """Undo `key_lanes`, for numbers of this type."""
    rows = lanes.permute(0, 3, 1, 2)
    return rows.flatten().view(kind).view(*rows.shape[:-1], -1)


def values_of(lanes: Tensor) -> Tensor:
    """Undo `value_lanes`."""
    return lanes.permute(0, 2, 4, 1, 3).flatten(1, 2)


def joined_rows(keys: Tensor, values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return rows [blocks, tokens, 2, kv_heads, dims] in `dtype`; what it cannot hold saturates."""
    limit = torch.finfo(dtype).max
    return torch.stack((keys, values), dim=2).clamp_(-limit, limit).to(dtype)
