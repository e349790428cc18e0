"""Attention on x86-64 CPUs by our own kernels, which read block tables and pages in place.

One call per layer attends the whole batch; `kernels/csrc/attention/tile.h` has what it does with a
page.
"""

from collections.abc import Sequence
from typing import ClassVar, cast

import torch
from torch import Tensor

from compress.shape import BLOCK_TOKENS
from longctx.attention.backend import ChunkRows
from longctx.errors import ModelRefused
from longctx.kernels import _kernels
from longctx.kv.memory import KVMemory
from longctx.kv.pool_indices import PoolIndices, as_tensor
from longctx.model.layer_attention import AttentionCall, KernelPlan

if not _kernels.instruction_sets():
    raise ImportError("this CPU has none of the instruction sets that the kernels are compiled for")

# The numbers of codecs and types in csrc/attention/attend.h.
CODECS = {"raw": 0, "bf16": 1, "int8": 2, "int4": 3}
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class CPUPlan(KernelPlan):
    """A step's chunks as the kernels read them, and the backend that attends them."""

    def __init__(self, backend: "CPUAttention", chunks: _kernels.Plan) -> None:
        self._backend = backend
        self.kernels, self.chunks = backend.kernels, chunks

    def layer(self, layer: int, heads: int) -> _kernels.Layer:
        return self._backend.layer(layer, heads)


class CPUAttention:
    """An `AttentionBackend` of compiled kernels; the addresses of each layer are looked up once."""

    decodes_pages: ClassVar = False

    def __init__(self, memory: KVMemory, instruction_set: str | None = None) -> None:
        """Bind the kernels of one of `_kernels.attention_sets()`, the fastest if none is named.

        Raises ModelRefused for pools of a codec whose pages the kernels cannot read.
        """
        for codec in memory.codecs:
            if codec.name not in CODECS:
                raise ModelRefused(
                    f"attention_backend 'cpu' cannot read pages of kv_codec {codec.name!r}, only "
                    f"of {', '.join(CODECS)}; start with --attention-backend torch, or with one "
                    "of these codecs"
                )
        self._memory = memory
        self.kernels = _kernels.Attention(instruction_set or _kernels.attention_sets()[-1])
        self._layers: dict[tuple[int, int], _kernels.Layer] = {}

    def plan(self, chunks: Sequence[ChunkRows], group: int) -> CPUPlan:
        plan = _kernels.Plan(self._memory.groups[group].window or 0)
        for chunk in chunks:
            plan.add(
                chunk.row_begin,
                chunk.rows,
                chunk.first_position,
                chunk.own_row,
                chunk.past_entries,
                chunk.own_pages,
                chunk.entries[group],
            )
        return CPUPlan(self, plan)

    def seal(self, layer: int, raw: PoolIndices, packed: PoolIndices) -> None:
        kv_heads = self._memory.codecs[layer].shape.kv_heads
        _kernels.seal(self.layer(layer, kv_heads), as_tensor(raw), as_tensor(packed))

    def attend(self, call: AttentionCall, query: Tensor, plan: object) -> tuple[Tensor, Tensor]:
        tokens, heads, _ = query.shape
        if query.stride(2) != 1:
            query = query.contiguous()
        out = torch.empty(query.shape, dtype=torch.float32)
        lse = torch.empty((tokens, heads), dtype=torch.float32)
        self.kernels.attend(
            self.layer(call.layer, heads),
            cast(CPUPlan, plan).chunks,
            query.data_ptr(),
            DTYPES[query.dtype],
            query.stride(0),
            query.stride(1),
            call.scaling,
            call.softcap or 0.0,
            tokens,
            out.data_ptr(),
            lse.data_ptr(),
        )
        return out, lse

    def layer(self, layer: int, heads: int) -> _kernels.Layer:
        """Return where a layer's pages are, and how they are read by so many query heads."""
        return self._layers.get((layer, heads)) or self._layer(layer, heads)

    def _layer(self, layer: int, heads: int) -> _kernels.Layer:
        memory = self._memory
        packed, raw = memory.packed_pages(layer), memory.raw_rows(layer)
        _, _, kv_heads, head_dim = raw.shape
        made = _kernels.layer(
            codec=CODECS[memory.codecs[layer].name],
            dtype=DTYPES[raw.dtype],
            kv_heads=kv_heads,
            group=heads // kv_heads,
            head_dim=head_dim,
            window=memory.groups[memory.group_of[layer]].window or 0,
            packed=packed.data_ptr(),
            packed_page_bytes=packed.stride(0),
            raw=raw.data_ptr(),
            raw_page_bytes=raw[:BLOCK_TOKENS].nbytes,
        )
        self._layers[layer, heads] = made
        return made
