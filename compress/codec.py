"""How a sealed block is stored: a `Codec` turns the rows of a page into bytes and back.

A name and version mean one page layout, the same in every pool, backend and file; a changed layout
is a new version. Sealing is `encode`, and attention reads `decode` of the same bytes, so what a
codec loses is lost in the same way for every reader (the block-causal rule).

Where a key or value holds NaN or infinity, a codec with scales gives NaN for that token and head,
key and value, and leaves the others alone. So a model that broke is seen to be broken, as it is
with raw rows.

To add a codec, write a class and add a line to `CODECS`. The torch backend and the conformance
suite take it from there; the CPU backend needs kernels of its own (`CONTRIBUTING.md`).
"""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from compress.int4 import Int4
from compress.int8 import Int8
from compress.shape import KVShape
from compress.unscaled import BF16, Raw


class Codec(Protocol):
    """One codec, bound to one page shape. `CODECS[name](shape)` makes it; raises ShapeRefused.

    It holds no state but its layout, so any thread may call it.
    """

    name: str
    version: int
    shape: KVShape
    page_bytes: int
    lossless: bool  # decode(encode(rows)) == rows, bit for bit
    in_place: bool  # a page is its rows: decode gives a view

    def encode(self, rows: Tensor) -> Tensor:
        """Turn rows [blocks, block_tokens, 2, kv_heads, head_dim] into uint8 [blocks, page_bytes].

        The pages are on the device of the rows.
        """
        ...

    def decode(self, pages: Tensor) -> Tensor:
        """Turn uint8 [blocks, page_bytes] into rows [blocks, block_tokens, 2, kv_heads, head_dim].

        The rows are of the model's compute type.
        """
        ...


CODECS: dict[str, Callable[[KVShape], Codec]] = {
    "raw": Raw,
    "bf16": BF16,
    "int8": Int8,
    "int4": Int4,
}
