"""How a sealed block is stored: `Codec` turns the rows of a page into bytes and back.

A name and version stand for one page layout, the same in every pool, backend and file; a changed
layout is a new version. Sealing is `encode`; attention reads `decode` of the same bytes, so what a
codec loses is lost in the same way for every reader (the block-causal rule).

Rows that no number can stand for come back as such: where a row holds NaN or infinity, a codec
with scales gives NaN for that token and head and leaves the others alone. A model that broke is
then seen to be broken, as it is with raw rows.
"""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from compress.int4 import Int4
from compress.int8 import Int8
from compress.shape import KVShape
from compress.unscaled import BF16, Raw


class Codec(Protocol):
    """One codec, bound to one page shape. Its maker raises ShapeRefused."""

    name: str
    version: int
    shape: KVShape
    page_bytes: int
    lossless: bool  # decode(encode(rows)) == rows, bit for bit
    in_place: bool  # a page is its rows: decode gives a view

    def encode(self, rows: Tensor) -> Tensor:
        """[blocks, block_tokens, 2, kv_heads, head_dim] -> uint8 [blocks, page_bytes]."""
        ...

    def decode(self, pages: Tensor) -> Tensor:
        """uint8 [blocks, page_bytes] -> [blocks, block_tokens, 2, kv_heads, head_dim]."""
        ...


CODECS: dict[str, Callable[[KVShape], Codec]] = {
    "raw": Raw,
    "bf16": BF16,
    "int8": Int8,
    "int4": Int4,
}
