"""The shape of one page: one block of tokens in one layer, keys and values together.

Everywhere in longctx a tensor of KV rows is token-major with keys and values side by side,
`[..., block_tokens, 2, kv_heads, head_dim]`, index 0 keys and 1 values. Pages that follow each
other in a pool of raw rows are then one uniformly strided tensor, which attention reads without a
copy.
"""

import math
from dataclasses import dataclass

import torch

BLOCK_TOKENS = 64  # tokens of one block; part of every key, so it is not an option


class ShapeRefused(ValueError):
    """A codec has no page layout for this shape; the message says why and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KVShape:
    kv_heads: int
    head_dim: int
    dtype: torch.dtype  # the model's compute type
    block_tokens: int = BLOCK_TOKENS

    @property
    def rows(self) -> tuple[int, int, int, int]:
        """[block_tokens, 2, kv_heads, head_dim]"""
        return (self.block_tokens, 2, self.kv_heads, self.head_dim)

    @property
    def values_per_page(self) -> int:
        return math.prod(self.rows)
