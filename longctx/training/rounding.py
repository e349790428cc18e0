"""Keys and values as a codec's pages give them back, for judging models without the engine."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.codec import CODECS
from compress.shape import BLOCK_TOKENS, KVShape

Rounding = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Maps keys and values [..., head_dim] to what they are after the trip through a page."""


def through_pages(codec: str) -> Rounding:
    """Round by the engine's own codec; keys [..., tokens, head_dim], blocks of tokens together."""

    def rounded(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        pairs = torch.stack((keys, values), dim=-2)  # [..., 2, head_dim]
        shape = KVShape(kv_heads=1, head_dim=keys.shape[-1], dtype=keys.dtype)
        rows = pairs.reshape(-1, *shape.rows[1:])
        blocks = F.pad(rows, (0, 0, 0, 0, 0, 0, 0, -len(rows) % BLOCK_TOKENS)).view(-1, *shape.rows)
        pages = CODECS[codec](shape)
        back = pages.decode(pages.encode(blocks)).reshape(-1, *shape.rows[1:])
        back = back[: len(rows)].view(pairs.shape)
        return back[..., 0, :], back[..., 1, :]

    return rounded


def int2(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Round badly, on purpose: to four levels for a whole head, without a transform."""
    return _four_levels(keys), _four_levels(values)


def _four_levels(states: Tensor) -> Tensor:
    low, high = states.aminmax(dim=-1, keepdim=True)
    scale = (high - low).clamp_min(1e-8) / 3
    return ((states - low) / scale).round() * scale + low


ROUNDINGS: dict[str, Rounding] = {name: through_pages(name) for name in CODECS} | {"int2": int2}
