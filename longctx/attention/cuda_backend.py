"""Attention on NVIDIA GPUs by a Triton kernel, which reads block tables and packed pages in place.

`longctx/kernels/triton_attention.py` has what it does with a page.
"""

from collections.abc import Sequence
from typing import ClassVar, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from compress.codec import Codec
from compress.int4 import group_dims
from longctx.attention.backend import ChunkRows
from longctx.attention.cuda_plan import (
    FEW_ROWS,
    CUDAPlan,
    TileBatch,
    TileLaunch,
    plan_chunks,
    power_of_two,
)
from longctx.errors import ModelRefused
from longctx.kernels import triton_attention as kernels
from longctx.kernels.triton_seal import seal_blocks
from longctx.kv.memory import SCRATCH_BYTES, KVMemory
from longctx.kv.pool_indices import PoolIndices
from longctx.model.layer_attention import AttentionCall

CODECS = {"raw": kernels.RAW, "bf16": kernels.BF16, "int8": kernels.INT8, "int4": kernels.INT4}
PRODUCTS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
INTERPRETED = bool(triton.knobs.runtime.interpret)
LEAST_DIMS = 16  # of one side of a product
WIDE_DIM = 128  # heads with more dims leave registers for fewer rows
SEAL_WARPS = 4
MANY_ROWS = 128  # of products in a tile of a long chunk


class CUDAAttention:
    """An `AttentionBackend` of Triton kernels; under Triton's interpreter it works on CPUs too."""

    decodes_pages: ClassVar = False

    def __init__(self, memory: KVMemory, *, scratch_bytes: int = SCRATCH_BYTES) -> None:
        """Bind the pools; `scratch_bytes` are for pages that long chunks have decoded first.

        Raises ModelRefused for pools of a codec whose pages the kernel cannot read.
        """
        for codec in memory.codecs:
            if codec.name not in CODECS:
                raise ModelRefused(
                    f"attention_backend 'cuda' cannot read pages of kv_codec {codec.name!r}, only "
                    f"of {', '.join(CODECS)}; start with --attention-backend torch, or with one "
                    "of these codecs"
                )
        self._memory = memory
        memory.clears_rows = False  # the kernel weighs what lies there by nothing, NaN too
        self._processors, self._generation = 4, 0
        if memory.device.type == "cuda":
            properties = torch.cuda.get_device_properties(memory.device)
            self._processors, self._generation = properties.multi_processor_count, properties.major
        self._scratch_bytes = scratch_bytes
        self._scratch = torch.empty(0, dtype=torch.uint8, device=memory.device)

    def plan(self, chunks: Sequence[ChunkRows], group: int) -> CUDAPlan:
        memory = self._memory
        layers = memory.groups[group].layers
        block_bytes = max(
            codec.shape.values_per_page * codec.shape.dtype.itemsize
            for codec in (memory.codecs[layer] for layer in layers)
        )
        in_place = all(memory.codecs[layer].in_place for layer in layers)
        return plan_chunks(
            chunks,
            group,
            window=memory.groups[group].window,
            device=memory.device,
            processors=self._processors,
            segment=0 if in_place else max(1, self._scratch_bytes // block_bytes),
        )

    def seal(self, layer: int, raw: PoolIndices, packed: PoolIndices) -> None:
        memory = self._memory
        codec, rows = memory.codecs[layer], memory.raw_rows(layer)
        pages = memory.packed_pages(layer)
        kv_heads, head_dim = codec.shape.kv_heads, codec.shape.head_dim
        packed_words = pages.view(codec.shape.dtype if codec.in_place else torch.int32)
        group = _value_group(codec)
        raw_table, raw_begin, blocks = _listed(raw, rows)
        packed_table, packed_begin, _ = _listed(packed, rows)
        seal_blocks[blocks, kv_heads](
            rows,
            raw_table,
            raw_begin,
            packed_words,
            packed_words.stride(0),
            packed_table,
            packed_begin,
            D=head_dim,
            D_PAD=_padded(head_dim),
            KV_HEADS=kv_heads,
            CODEC=CODECS[codec.name],
            VALUE_GROUP=group,
            GROUPS_PAD=power_of_two(head_dim // group),
            GROUP_PAD=power_of_two(group),
            RAW_LISTED=not isinstance(raw, slice),
            PACKED_LISTED=not isinstance(packed, slice),
            num_warps=SEAL_WARPS,
            enable_fp_fusion=False,  # to round as the CPU does
        )

    def attend(self, call: AttentionCall, query: Tensor, plan: object) -> tuple[Tensor, Tensor]:
        step = cast(CUDAPlan, plan)
        if query.stride(2) != 1:
            query = query.contiguous()
        tokens, heads, head_dim = query.shape
        kv_heads = self._memory.codecs[call.layer].shape.kv_heads
        most = most_rows(head_dim, query.element_size(), self._generation)
        batches = step.batches(heads=heads, kv_heads=kv_heads, most=most)
        # A launch that goes on where another ended reads what that wrote, unrounded
        rounded = not call.merged and all(len(batch.launches) == 1 for batch in batches)
        out = query.new_empty(query.shape, dtype=query.dtype if rounded else torch.float32)
        lse = query.new_empty((tokens, heads), dtype=torch.float32)
        if step.covered < tokens:
            out.zero_()
            lse.fill_(-torch.inf)
        for batch in batches:
            if batch.rows is None:
                self._launch(call, query, step, batch, out[None], lse[None])
                continue
            rows = len(batch.rows)
            parts = lse.new_empty((batch.splits, rows, heads, head_dim))
            part_lse = lse.new_empty((batch.splits, rows, heads))
            self._launch(call, query, step, batch, parts, part_lse)
            kernels.combine[rows, heads](
                parts,
                part_lse,
                batch.rows,
                out,
                lse,
                rows,
                heads,
                D=head_dim,
                D_PAD=_padded(head_dim),
                SPLITS=batch.splits,
            )
        return out, lse

    def _launch(
        self,
        call: AttentionCall,
        query: Tensor,
        step: CUDAPlan,
        batch: TileBatch,
        out: Tensor,
        lse: Tensor,
    ) -> None:
        memory = self._memory
        codec = memory.codecs[call.layer]
        kv_heads = codec.shape.kv_heads
        _, heads, head_dim = query.shape
        window = memory.groups[step.group].window
        for launch in batch.launches:
            kind, pages = self._pages(call.layer, launch)
            kernels.attend_tiles[len(launch.tiles), kv_heads, batch.splits](
                query,
                query.stride(0),
                query.stride(1),
                pages,
                pages.stride(0),
                memory.raw_rows(call.layer),
                launch.tiles,
                launch.entries,
                out,
                lse,
                out.shape[1],
                call.scaling,
                call.softcap or 1.0,
                window or 0,
                GROUP=heads // kv_heads,
                M=batch.m,
                D=head_dim,
                D_PAD=_padded(head_dim),
                KV_HEADS=kv_heads,
                SPLITS=batch.splits,
                CODEC=kind,
                VALUE_GROUP=_value_group(codec),
                HAS_CAP=call.softcap is not None,
                HAS_WINDOW=window is not None,
                # The interpreter multiplies the bits of bfloat16 as if they were integers
                DOT=tl.float32 if INTERPRETED else PRODUCTS[query.dtype],
                num_warps=warps(batch.m, head_dim),
                num_stages=stages(kind),
            )

    def _pages(self, layer: int, launch: TileLaunch) -> tuple[tl.constexpr, Tensor]:
        """Return the pages that a launch reads, and as what: decoded first where it says so."""
        memory = self._memory
        codec = memory.codecs[layer]
        packed = memory.packed_pages(layer)
        if codec.in_place:
            return kernels.RAW, packed.view(codec.shape.dtype)
        words = packed.view(torch.int32)
        if launch.unpacked is None:
            return CODECS[codec.name], words
        head_dim, kv_heads = codec.shape.head_dim, codec.shape.kv_heads
        size = len(launch.unpacked) * codec.shape.values_per_page * codec.shape.dtype.itemsize
        if self._scratch.numel() < size:
            self._scratch = torch.empty(size, dtype=torch.uint8, device=memory.device)
        rows = self._scratch[:size].view(codec.shape.dtype).view(len(launch.unpacked), -1)
        kernels.unpack[len(launch.unpacked), kv_heads](
            words,
            words.stride(0),
            launch.unpacked,
            rows,
            torch.finfo(codec.shape.dtype).max,
            D=head_dim,
            D_PAD=_padded(head_dim),
            KV_HEADS=kv_heads,
            CODEC=CODECS[codec.name],
            VALUE_GROUP=_value_group(codec),
        )
        return kernels.RAW, rows


def _listed(pages: PoolIndices, unused: Tensor) -> tuple[Tensor, int, int]:
    """Return pages as the kernel takes them: a table or, of a slice, where it begins; and how many.

    A kernel has to be given something where it reads no table: `unused`.
    """
    if isinstance(pages, slice):
        return unused, pages.start, pages.stop - pages.start
    return pages, 0, len(pages)


def most_rows(head_dim: int, itemsize: int, generation: int) -> int:
    """Return how many rows of products a tile of a long chunk has, for registers to suffice.

    `generation` is the first number of a GPU's compute capability: before 9 products take their
    operands from registers.
    """
    if head_dim > WIDE_DIM or itemsize > 2:
        return MANY_ROWS // 4
    return MANY_ROWS if generation >= 9 else MANY_ROWS // 2


def warps(m: int, head_dim: int) -> int:
    """Return how many warps share a tile, so that none spills registers."""
    return 4 if m <= FEW_ROWS and head_dim <= WIDE_DIM else 8


def stages(kind: tl.constexpr) -> int:
    """Return how many pages are under way at once: of packed ones more would spill registers."""
    return 3 if kind == kernels.RAW else 2


def _value_group(codec: Codec) -> int:
    """Return how many dims of a value share a scale; it matters for int4 alone."""
    head_dim = codec.shape.head_dim
    return group_dims(head_dim) if codec.name == "int4" else head_dim


def _padded(head_dim: int) -> int:
    return max(LEAST_DIMS, power_of_two(head_dim))
