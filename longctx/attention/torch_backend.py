"""Attention in plain torch, on any device: tile by tile through `attend_tile` and `merge`."""

import functools
from collections.abc import Sequence
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from longctx.attention.backend import ChunkRows
from longctx.attention.merge import merge
from longctx.attention.torch_plan import Tile, plan_tiles
from longctx.kv.memory import KVMemory
from longctx.kv.pool_indices import PoolIndices
from longctx.model.layer_attention import AttentionCall

PRODUCT_ROWS = 4  # 2 or 3 rows take twice as long in a product as 4: they are padded with zeros
# On a CPU an explicit softmax beats flash where few query rows share a key head and many keys are
# read; with fewer keys, one call beats many.
FEW_ROWS = 16
MANY_KEYS = 1024


class TorchAttention:
    """An `AttentionBackend` of plain torch, for GPUs and for CPUs without compiled kernels."""

    decodes_pages: ClassVar = True

    def __init__(self, memory: KVMemory) -> None:
        self._memory = memory

    def plan(self, chunks: Sequence[ChunkRows], group: int) -> tuple[Tile, ...]:
        memory = self._memory
        layer_group = memory.groups[group]
        return plan_tiles(
            chunks,
            group,
            window=layer_group.window,
            lossless=all(memory.codecs[layer].lossless for layer in layer_group.layers),
            in_place=all(memory.codecs[layer].in_place for layer in layer_group.layers),
            device=memory.device,
        )

    def seal(self, layer: int, raw: PoolIndices, packed: PoolIndices) -> None:
        self._memory.seal(layer, raw, packed)

    def attend(self, call: AttentionCall, query: Tensor, plan: object) -> tuple[Tensor, Tensor]:
        tiles = cast(tuple[Tile, ...], plan)
        if len(tiles) == 1 and tiles[0].rows == slice(0, len(query)):
            return self._attend(call, query, tiles[0])
        out = torch.zeros(query.shape, dtype=torch.float32, device=query.device)
        lse = query.new_full(query.shape[:2], -torch.inf, dtype=torch.float32)
        for tile in tiles:
            tile_out, tile_lse = self._attend(call, query, tile)
            rows = tile.rows if tile.targets is None else tile.targets
            if not tile.first:
                tile_out, tile_lse = merge(out[rows], lse[rows], tile_out, tile_lse)
            out[rows], lse[rows] = tile_out, tile_lse
        return out, lse

    def _attend(self, call: AttentionCall, query: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
        """Attend one tile: out [rows, heads, head_dim] and lse [rows, heads] of its real rows."""
        parts = self._rows(call.layer, tile)
        tile_query = query[tile.rows]
        out, lse = attend_tile(
            call,
            tile_query.reshape(tile.batch, -1, *query.shape[1:]),
            [part[:, :, 0] for part in parts],
            [part[:, :, 1] for part in parts],
            bias=tile.bias,
            causal=tile.causal,
        )
        out, lse = out.flatten(0, 1), lse.flatten(0, 1)
        return (out, lse) if tile.picked is None else (out[tile.picked], lse[tile.picked])

    def _rows(self, layer: int, tile: Tile) -> list[Tensor]:
        """Load the tile's rows, packed and own: each [B, keys, 2, kv_heads, head_dim]."""
        parts: list[Tensor] = []
        if tile.packed is not None:
            blocks = self._memory.decoded(layer, tile.packed)
            parts.append(blocks.view(tile.batch, -1, *blocks.shape[2:])[:, tile.skip :])
        if tile.own is not None:
            blocks = self._memory.own_blocks(layer, tile.own)
            rows = blocks.view(tile.batch, -1, *blocks.shape[2:])
            parts.append(rows[:, tile.own_skip : tile.own_rows])
        return parts


def attend_tile(
    call: AttentionCall,
    query: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    *,
    bias: Tensor | None,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """Attend densely to one tile of keys, which may come in parts.

    `query` [B, rows, heads, head_dim]; `keys`, `values`: parts [B, keys, kv_heads, head_dim];
    `bias` [B, 1, rows, keys]; `causal`: row i sees keys 0 to i. Returns out [B, rows, heads,
    head_dim] and lse [B, rows, heads], float32. A row that sees nothing has lse -inf.
    """
    rows_per_key_head = query.shape[1] * (query.shape[2] // keys[0].shape[2])
    long = rows_per_key_head <= FEW_ROWS and sum(key.shape[1] for key in keys) >= MANY_KEYS
    if query.device.type == "cpu" and call.softcap is None and not long:
        return _flash(query, _joined(keys), _joined(values), call.scaling, bias, causal)
    return _explicit(call, query, keys, values, bias, causal)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts), dim=1)


def _flash(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, bias: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor]:
    """Call torch's tiled kernel for CPUs, which never holds all scores and returns the lse."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        0.0,
        causal,
        attn_mask=None if bias is None else bias.to(query.dtype),
        scale=scaling,
    )
    out, lse = out.transpose(1, 2).float(), lse.transpose(1, 2)
    if bias is not None:
        sees_any = (bias == 0).any(-1).transpose(1, 2)  # [B, rows, 1]
        lse = torch.where(sees_any, lse, -torch.inf)
    return out, lse


def _explicit(
    call: AttentionCall,
    query: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    bias: Tensor | None,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    batch, rows, heads, head_dim = query.shape
    kv_heads = keys[0].shape[2]
    group = heads // kv_heads
    # [B, kv_heads, group * rows, head_dim]: all queries of a key head in one matrix
    grouped = query.view(batch, rows, kv_heads, group, head_dim).permute(0, 2, 3, 1, 4)
    grouped = grouped.reshape(batch, kv_heads, group * rows, head_dim)
    if 1 < group * rows < PRODUCT_ROWS:
        grouped = F.pad(grouped, (0, 0, 0, PRODUCT_ROWS - group * rows))
    outs, lses = [], []
    for index in range(batch):
        products = [torch.bmm(grouped[index], key[index].permute(1, 2, 0)) for key in keys]
        scores = (products[0] if len(products) == 1 else torch.cat(products, dim=-1)).float()
        scores.mul_(call.scaling)
        if call.softcap is not None:
            scores.div_(call.softcap).tanh_().mul_(call.softcap)
        by_row = scores[:, : group * rows].view(kv_heads, group, rows, -1)
        if bias is not None:
            by_row += bias[index]
        if causal:
            above = torch.ones(by_row.shape[2:], dtype=torch.bool, device=query.device).triu_(1)
            by_row.masked_fill_(above, -torch.inf)
        peak = scores.amax(-1, keepdim=True)
        finite_peak = torch.where(peak == -torch.inf, 0.0, peak)
        weights = scores.sub_(finite_peak).exp_()
        total = weights.sum(-1, keepdim=True)
        mixed = _mix(weights, [value[index].transpose(0, 1) for value in values])
        outs.append(mixed / total.clamp_min(torch.finfo(torch.float32).tiny))
        lses.append(finite_peak + torch.log(total))
    out = torch.stack(outs)[:, :, : group * rows].view(batch, kv_heads, group, rows, head_dim)
    lse = torch.stack(lses)[:, :, : group * rows].view(batch, kv_heads, group, rows)
    return out.permute(0, 3, 1, 2, 4).flatten(2, 3), lse.permute(0, 3, 1, 2).flatten(2, 3)


def _mix(weights: Tensor, values: Sequence[Tensor]) -> Tensor:
    """Sum `weights` [kv_heads, rows, keys] times parts of values [kv_heads, keys, head_dim]."""
    weights = weights.to(values[0].dtype)
    if len(values) == 1:
        return torch.bmm(weights, values[0]).float()
    parts = torch.split(weights, [value.shape[1] for value in values], dim=-1)
    products = (torch.bmm(part, value).float() for part, value in zip(parts, values, strict=True))
    return functools.reduce(torch.Tensor.add_, products)
