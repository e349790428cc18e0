"""The shape of one page: one block of tokens in one layer, keys and values together.

Everywhere in longctx a tensor of KV rows is token-major with keys and values side by side,
`[..., block_tokens, 2, kv_heads, head_dim]`; index 0 is the keys, 1 the values. So pages that
follow each other in a pool of raw rows are one uniformly strided tensor, which attention reads
without a copy.
"""

import math
from dataclasses import dataclass

import torch

BLOCK_TOKENS = 64  # tokens of one block; every key depends on it, so it is not an option


class ShapeRefused(ValueError):
    """A codec has no page layout for this shape; the message says why and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KVShape:
    """The shape of one page: 8 KV heads of 128 dims are 131,072 values, in bfloat16 256 KiB."""

    kv_heads: int
    head_dim: int
    dtype: torch.dtype  # the model's compute type
    block_tokens: int = BLOCK_TOKENS

    @property
    def rows(self) -> tuple[int, int, int, int]:
        """The sizes [block_tokens, 2, kv_heads, head_dim] of a page's rows."""
        return (self.block_tokens, 2, self.kv_heads, self.head_dim)

    @property
    def values_per_page(self) -> int:
        return math.prod(self.rows)
