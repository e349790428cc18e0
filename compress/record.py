"""The page layout that all packed codecs share: one record per key head, made for vector units.

A page is `kv_heads` equal records, one after another, so that a kernel reads one head as one run
of bytes. A record holds the keys, then the values, then their scales. Within it numbers stand in
the order in which dot products use them, `width` of them to a 32-bit lane:

    keys    [head_dim / width, block_tokens, width]   a lane has some dims of one token
    values  [block_tokens / width, head_dim, width]   a lane has one dim of some tokens
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
    """Raises ShapeRefused for head_dims that records are not laid out for."""
    dim = shape.head_dim
    if dim % DIM_MULTIPLE or not 0 < dim <= LARGEST_DIM:
        raise ShapeRefused(
            f"head_dim={dim} does not fit KV codec {codec}, which takes multiples of "
            f"{DIM_MULTIPLE} up to {LARGEST_DIM}; use --kv-codec raw"
        )


class Records:
    """The parts of one codec's records; gives views of them in a tensor of pages."""

    def __init__(self, kv_heads: int, parts: Sequence[tuple[torch.dtype, tuple[int, ...]]]) -> None:
        """`parts`: type and sizes of each, in order."""
        self._kv_heads = kv_heads
        self._parts = tuple(parts)
        ends = accumulate(kind.itemsize * prod(sizes) for kind, sizes in parts)
        self._offsets = (0, *ends)
        self.page_bytes = kv_heads * self._offsets[-1]

    def empty(self, blocks: int, device: torch.device) -> Tensor:
        """uint8 [blocks, page_bytes]"""
        return torch.empty(blocks, self.page_bytes, dtype=torch.uint8, device=device)

    def views(self, pages: Tensor) -> tuple[Tensor, ...]:
        """Each part of the pages, in place: [blocks, kv_heads, *sizes]."""
        records = pages.view(-1, self._kv_heads, self._offsets[-1])
        bounds = zip(self._offsets, self._offsets[1:], self._parts, strict=False)
        return tuple(
            torch.unflatten(records[..., begin:end].view(kind), -1, sizes)
            for begin, end, (kind, sizes) in bounds
        )


def key_lanes(keys: Tensor) -> Tensor:
    """[blocks, tokens, kv_heads, dims] -> int32 [blocks, kv_heads, dims / width, tokens].

    The width is what makes 32 bits: 2 numbers of bfloat16, 4 bytes.
    """
    lanes = keys.flatten().view(torch.int32).view(*keys.shape[:-1], -1)
    return lanes.permute(0, 2, 3, 1)


def value_lanes(values: Tensor) -> Tensor:
    """[blocks, tokens, kv_heads, dims] -> [blocks, kv_heads, tokens / width, dims, width]."""
    return torch.unflatten(values, 1, (-1, 4 // values.itemsize)).permute(0, 3, 1, 4, 2)


def keys_of(lanes: Tensor, kind: torch.dtype) -> Tensor:
    """The keys of `key_lanes`, numbers of this kind."""
    rows = lanes.permute(0, 3, 1, 2)
    return rows.flatten().view(kind).view(*rows.shape[:-1], -1)


def values_of(lanes: Tensor) -> Tensor:
    """The values of `value_lanes`."""
    return lanes.permute(0, 2, 4, 1, 3).flatten(1, 2)


def joined_rows(keys: Tensor, values: Tensor, dtype: torch.dtype) -> Tensor:
    """[blocks, tokens, 2, kv_heads, dims] in the model's type; what it cannot hold saturates."""
    limit = torch.finfo(dtype).max
    return torch.stack((keys, values), dim=2).clamp_(-limit, limit).to(dtype)
