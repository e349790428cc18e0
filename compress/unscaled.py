"""Codecs without scales: `raw` keeps the model's own type, `bf16` has half the size of float32."""

import torch
from torch import Tensor

from compress.record import (
    Records,
    check_head_dim,
    key_lanes,
    keys_of,
    value_lanes,
    values_of,
)
from compress.shape import KVShape


class Raw:
    """The rows themselves, in the model's own type; nothing is lost.

    Page layout, version 1: [block_tokens, 2, kv_heads, head_dim].
    """

    name = "raw"
    version = 1
    lossless = True
    in_place = True

    def __init__(self, shape: KVShape) -> None:
        self.shape = shape
        self.page_bytes = shape.values_per_page * shape.dtype.itemsize

    def encode(self, rows: Tensor) -> Tensor:
        return rows.contiguous().view(rows.shape[0], -1).view(torch.uint8)

    def decode(self, pages: Tensor) -> Tensor:
        return pages.view(self.shape.dtype).view(-1, *self.shape.rows)


class BF16:
    """Rounds to bfloat16, to the nearest, ties to even: the relative error is at most 2^-8.

    Below bfloat16's smallest normal number the error is at most half its smallest step, 2^-134.
    What is beyond its range becomes infinite.

    Record, version 2: keys bfloat16 [head_dim / 2, block_tokens, 2], values bfloat16
    [block_tokens / 2, head_dim, 2].
    """

    name = "bf16"
    version = 2
    in_place = False

    def __init__(self, shape: KVShape) -> None:
        check_head_dim(self.name, shape)
        self.shape = shape
        tokens, dim = shape.block_tokens, shape.head_dim
        self._records = Records(
            shape.kv_heads,
            [(torch.int32, (dim // 2, tokens)), (torch.bfloat16, (tokens // 2, dim, 2))],
        )
        self.page_bytes = self._records.page_bytes
        self.lossless = shape.dtype == torch.bfloat16

    def encode(self, rows: Tensor) -> Tensor:
        pages = self._records.empty(len(rows), rows.device)
        keys, values = self._records.views(pages)
        narrow = rows.to(torch.bfloat16)
        keys.copy_(key_lanes(narrow[:, :, 0]))
        values.copy_(value_lanes(narrow[:, :, 1]))
        return pages

    def decode(self, pages: Tensor) -> Tensor:
        keys, values = self._records.views(pages)
        rows = torch.stack((keys_of(keys, torch.bfloat16), values_of(values)), dim=2)
        return rows.to(self.shape.dtype)
