"""How a sealed block is stored: `Codec` turns the rows of a page into bytes and back.

A name and version stand for one page layout, the same in every pool, backend and file; a changed
layout is a new version. Sealing is `encode`; attention reads `decode` of the same bytes, so what a
codec loses is lost in the same way for every reader (the block-causal rule).
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from compress.shape import KVShape


class Codec(Protocol):
    """One codec, bound to one page shape."""

    name: str
    version: int
    page_bytes: int
    lossless: bool  # decode(encode(rows)) == rows, bit for bit

    def encode(self, rows: Tensor) -> Tensor:
        """[blocks, block_tokens, 2, kv_heads, head_dim] -> uint8 [blocks, page_bytes]."""
        ...

    def decode(self, pages: Tensor) -> Tensor:
        """uint8 [blocks, page_bytes] -> [blocks, block_tokens, 2, kv_heads, head_dim]."""
        ...


class Cast:
    """The rows themselves in a stated type; page layout = the rows, row by row."""

    name: str
    version = 1

    def __init__(self, shape: KVShape, stored: torch.dtype) -> None:
        self.shape = shape
        self.stored = stored
        self.page_bytes = shape.values_per_page * stored.itemsize
        self.lossless = stored == shape.dtype

    def encode(self, rows: Tensor) -> Tensor:
        stored = rows.to(self.stored).contiguous()
        return stored.view(rows.shape[0], -1).view(torch.uint8)

    def decode(self, pages: Tensor) -> Tensor:
        rows = pages.view(self.stored).view(-1, *self.shape.rows)
        return rows.to(self.shape.dtype)  # no copy where the types agree


class Raw(Cast):
    """The model's own type: exact."""

    name = "raw"

    def __init__(self, shape: KVShape) -> None:
        super().__init__(shape, shape.dtype)


class BF16(Cast):
    """bfloat16: relative error at most 2^-8 per value."""

    name = "bf16"

    def __init__(self, shape: KVShape) -> None:
        super().__init__(shape, torch.bfloat16)


class Int8:
    """Symmetric 8 bit, one bfloat16 scale per token, head, and keys or values.

    Page layout: codes int8 [block_tokens, 2, kv_heads, head_dim], then scales bfloat16
    [block_tokens, 2, kv_heads]. The scale is rounded to bfloat16 *before* the codes are computed,
    so that the error stays at half a step of the scale that is stored. That holds for the largest
    value too: it is at most 127 * (1 + 2^-8) steps, less than 127.5.
    """

    name = "int8"
    version = 1
    lossless = False

    def __init__(self, shape: KVShape) -> None:
        self.shape = shape
        self._codes_bytes = shape.values_per_page
        scales = shape.values_per_page // shape.head_dim
        self.page_bytes = self._codes_bytes + scales * torch.bfloat16.itemsize

    def encode(self, rows: Tensor) -> Tensor:
        wide = rows.float()
        scales = (wide.abs().amax(-1, keepdim=True) / 127).to(torch.bfloat16)
        # A row of zeros has scale 0; any divisor gives it codes of 0.
        step = torch.where(scales > 0, scales, 1.0).float()
        codes = (wide / step).round_().clamp_(-127, 127).to(torch.int8)
        blocks = rows.shape[0]
        pages = torch.empty(blocks, self.page_bytes, dtype=torch.uint8, device=rows.device)
        pages[:, : self._codes_bytes] = codes.view(blocks, -1).view(torch.uint8)
        pages[:, self._codes_bytes :] = scales.view(blocks, -1).view(torch.uint8)
        return pages

    def decode(self, pages: Tensor) -> Tensor:
        codes = pages[:, : self._codes_bytes].view(torch.int8).reshape(-1, *self.shape.rows)
        packed_scales = pages[:, self._codes_bytes :].contiguous().view(torch.bfloat16)
        scales = packed_scales.view(-1, *self.shape.rows[:-1], 1)
        return (codes.float() * scales.float()).to(self.shape.dtype)


CODECS: dict[str, Callable[[KVShape], Codec]] = {"raw": Raw, "bf16": BF16, "int8": Int8}
