"""Attention by its definition, one row at a time in float32: every other backend must equal it."""

from collections.abc import Sequence
from typing import ClassVar, cast

import torch
from torch import Tensor

from compress.shape import BLOCK_TOKENS
from longctx.attention.backend import ChunkRows
from longctx.kv.block_entry import FIRST_POSITION, PAGE, ROW_BEGIN, ROWS
from longctx.kv.memory import KVMemory
from longctx.kv.pool_indices import PoolIndices
from longctx.model.layer_attention import AttentionCall


class ReferenceAttention:
    """An `AttentionBackend` that is plain and slow, for tests."""

    decodes_pages: ClassVar = True

    def __init__(self, memory: KVMemory) -> None:
        self._memory = memory

    def plan(self, chunks: Sequence[ChunkRows], group: int) -> Sequence[ChunkRows]:
        return chunks

    def seal(self, layer: int, raw: PoolIndices, packed: PoolIndices) -> None:
        self._memory.seal(layer, raw, packed)

    def attend(self, call: AttentionCall, query: Tensor, plan: object) -> tuple[Tensor, Tensor]:
        tokens, heads, _ = query.shape
        out = torch.zeros(query.shape, dtype=torch.float32, device=query.device)
        lse = torch.full((tokens, heads), -torch.inf, device=query.device)
        for chunk in cast(Sequence[ChunkRows], plan):
            for index in range(chunk.rows):
                row = chunk.row_begin + index
                keys, values = self._visible(
                    call.layer, chunk.pick(row)
                )  # [keys, kv_heads, head_dim]
                group = heads // keys.shape[1]
                keys = keys.repeat_interleave(group, dim=1)
                values = values.repeat_interleave(group, dim=1)
                scores = torch.einsum("hd,khd->hk", query[row].float(), keys) * call.scaling
                if call.softcap is not None:
                    scores = call.softcap * torch.tanh(scores / call.softcap)
                out[row] = torch.einsum("hk,khd->hd", torch.softmax(scores, dim=-1), values)
                lse[row] = torch.logsumexp(scores, dim=-1)
        return out, lse

    def _visible(self, layer: int, chunk: ChunkRows) -> tuple[Tensor, Tensor]:
        """Collect all keys and values that the one row of `chunk` sees, in order."""
        memory = self._memory
        group = memory.group_of[layer]
        window = memory.groups[group].window
        oldest = -1 if window is None else chunk.first_position - window
        runs: list[Tensor] = []
        for entry in chunk.entries[group][: chunk.past_entries]:
            skip = min(max(0, oldest + 1 - int(entry[FIRST_POSITION])), int(entry[ROWS]))
            if skip < entry[ROWS]:
                page = int(entry[PAGE])
                begin = int(entry[ROW_BEGIN])
                (block,) = memory.decoded(layer, slice(page, page + 1))
                rows = block[begin + skip : begin + int(entry[ROWS])]
                runs.append(rows.float())
        raw = memory.raw_rows(layer)
        if len(chunk.own_pages):
            own_begin = max(0, oldest + 1 - (chunk.first_position - chunk.own_row))
            base = int(chunk.own_pages[0]) * BLOCK_TOKENS
            runs.append(raw[base + own_begin : base + chunk.own_row + 1].float())
        rows = torch.cat([raw[:0].float(), *runs])
        return rows[:, 0], rows[:, 1]
