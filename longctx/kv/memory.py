"""The KV pools of a model on its device: which layer's pages lie where, written, sealed and read.

Layers with the same window form a `LayerGroup`; a sealed block has one page in the packed pool of
each group. Blocks that still grow lie in one raw pool that serves all layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.codec import CODECS, Codec
from compress.shape import BLOCK_TOKENS, KVShape, ShapeRefused
from longctx.errors import ModelRefused
from longctx.kv.pool_indices import PoolIndices
from longctx.model.spec import LayerSpec
from offload.block_pool import BlockPool
from offload.machine_limits import memory_bytes
from offload.units import GIB

# Of a GPU's free memory, what pools and scratch may take; a step's activations take from the rest
GPU_SHARE = 0.9
SCRATCH_BYTES = 1 << 28  # of a GPU: for pages that long chunks have decoded first


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers with the same window: `window` tokens back, or none (global layers)."""

    window: int | None
    layers: tuple[int, ...]


def layer_groups(layers: Sequence[LayerSpec]) -> tuple[LayerGroup, ...]:
    """Group layers by their window: global layers first, else in the order of first layers."""
    windows = dict.fromkeys(layer.window for layer in layers)
    ordered = sorted(windows, key=lambda window: window is not None)
    return tuple(
        LayerGroup(window, tuple(i for i, layer in enumerate(layers) if layer.window == window))
        for window in ordered
    )


def layer_codecs(
    layers: Sequence[LayerSpec], *, dtype: torch.dtype, codec: str
) -> tuple[Codec, ...]:
    """Return the codec of each layer. Raises ModelRefused for a shape that it cannot hold."""
    shapes = [
        KVShape(kv_heads=each.kv_heads, head_dim=each.head_dim, dtype=dtype) for each in layers
    ]
    try:
        return tuple(CODECS[codec](shape) for shape in shapes)
    except ShapeRefused as error:
        raise ModelRefused(str(error)) from error


class KVMemory:
    """The device's KV pools: `raw` for open blocks, `packed[group]` for sealed ones.

    It says where a layer's pages lie and how they are encoded; who holds a page is the pools'
    business (`BlockPool`), and which block it is the cache manager's. The engine's thread makes
    all calls; the attention backends read the pools within a step.
    """

    def __init__(
        self,
        layers: Sequence[LayerSpec],
        *,
        dtype: torch.dtype,
        device: torch.device,
        codec: str,
        pool_bytes: int,
        step_blocks: int,
        ranks: int = 1,
        staging_blocks: int = 0,
    ) -> None:
        """`step_blocks`: the most blocks that grow at once; the raw pool holds as many.

        `ranks`: over how many ranks the pages of global layers are sharded. `staging_blocks`:
        pages of global layers through which other ranks' blocks pass.

        Raises ModelRefused where the codec has no page layout for a layer's shape.
        """
        self.groups = layer_groups(layers)
        self.reserved_blocks = 0  # pages of the first packed pool that no sequence gets
        self.step_blocks = step_blocks
        # False for an attention that reads no row beyond a sequence's own
        self.clears_rows = True
        self.device = device
        self.codecs = layer_codecs(layers, dtype=dtype, codec=codec)
        self._shapes = shapes = [each.shape for each in self.codecs]
        self.raw = BlockPool(
            page_bytes=[shape.values_per_page * dtype.itemsize for shape in shapes],
            num_pages=step_blocks + 1,
            device=device,
        )
        staging_bytes = staging_blocks * sum(
            self.codecs[layer].page_bytes for layer in self.groups[0].layers
        )
        left_bytes = max(pool_bytes - staging_bytes, pool_bytes // 2)
        pages = _pages_per_group(self.groups, self.codecs, left_bytes, step_blocks)
        self.packed = tuple(
            BlockPool(
                page_bytes=[self.codecs[layer].page_bytes for layer in group.layers],
                num_pages=count + 1,
                device=device,
                ranks=ranks if group.window is None else 1,
                staging_pages=staging_blocks if group.window is None else 0,
            )
            for group, count in zip(self.groups, pages, strict=True)
        )
        self._raw_rows = tuple(
            pool.view(dtype).view(-1, *shape.rows[1:])
            for pool, shape in zip(self.raw.pages, shapes, strict=True)
        )
        self._packed_pages: dict[int, Tensor] = {}
        self.group_of: dict[int, int] = {}
        for index, group in enumerate(self.groups):
            for slot, layer in enumerate(group.layers):
                self._packed_pages[layer] = self.packed[index].pages[slot]
                self.group_of[layer] = index

    @property
    def capacity_tokens(self) -> int:
        """Return how many tokens of sealed KV fit; a window group never limits them."""
        return self.capacity_blocks * BLOCK_TOKENS

    @property
    def capacity_blocks(self) -> int:
        return self.packed[0].capacity - self.reserved_blocks

    @property
    def can_stream(self) -> bool:
        """Whether blocks of global layers may be attended to that no page holds."""
        return self.groups[0].window is None and self.packed[0].ranks == 1

    def reserve(self, blocks: int) -> list[int]:
        """Reserve up to `blocks` staging pages in the first group's pool.

        It gives at most an eighth of the pool, and an even number: with 300 pages and 64 wanted,
        36 are reserved. Where that is none, two: one is attended while the other is read.
        """
        capacity = self.packed[0].capacity
        wanted = max(2, min(blocks, capacity // 8) // 2 * 2)
        pages = self.packed[0].allocate(min(wanted, capacity - 1))
        self.reserved_blocks += len(pages)
        return pages

    @property
    def block_bytes(self) -> int:
        """Return the bytes of one sealed block in all global layers."""
        pairs = zip(self.groups, self.packed, strict=True)
        return sum(sum(pool.page_bytes) for group, pool in pairs if group.window is None)

    @property
    def window_bytes(self) -> int:
        """Return the bytes of the last windows of one prompt, in all layers that have a window."""
        return sum(
            (group.window // BLOCK_TOKENS + 1) * sum(pool.page_bytes)
            for group, pool in zip(self.groups, self.packed, strict=True)
            if group.window is not None
        )

    def tokens_in(self, size_bytes: int) -> int:
        """Return how many tokens of long prompts fit `size_bytes`, their windows aside."""
        block_bytes = self.block_bytes or sum(sum(pool.page_bytes) for pool in self.packed)
        return size_bytes // block_bytes * BLOCK_TOKENS

    def pages_needed(self, blocks: range, spare: int = 0) -> list[list[int]]:
        """Return the pages that more blocks of one sequence take: by group, then by rank."""
        return [[self._most_pages(group, len(blocks) + spare)] for group in self.groups]

    def _most_pages(self, group: LayerGroup, blocks: int) -> int:
        if group.window is None:
            return blocks
        return min(blocks, group.window // BLOCK_TOKENS + 2 + self.step_blocks)

    def allocate(self, group: int, blocks: Sequence[int]) -> list[int]:
        """Allocate a page for each of these blocks of a sequence, given by their indices in it."""
        return self.packed[group].allocate(len(blocks))

    def raw_rows(self, layer: int) -> Tensor:
        """Return the raw pool row by row: [raw pages * block_tokens, 2, kv_heads, head_dim]."""
        return self._raw_rows[layer]

    def decoded(self, layer: int, pages: PoolIndices) -> Tensor:
        """Decode sealed blocks in place where possible: [blocks, rows, 2, kv_heads, head_dim]."""
        return self.codecs[layer].decode(_take(self.packed_pages(layer), pages))

    def own_blocks(self, layer: int, pages: PoolIndices) -> Tensor:
        """Return blocks of the raw pool: [blocks, block_tokens, 2, kv_heads, head_dim]."""
        return _take(self._raw_rows[layer].view(-1, *self._shapes[layer].rows), pages)

    def packed_pages(self, layer: int) -> Tensor:
        """Return the layer's pages in its group's packed pool: uint8 [pages, page_bytes]."""
        return self._packed_pages[layer]

    def write(self, layer: int, slots: PoolIndices, key: Tensor, value: Tensor) -> None:
        """Put new rows into the raw pool. `key`, `value`: [tokens, kv_heads, head_dim]."""
        rows = self._raw_rows[layer]
        rows[slots, 0] = key
        rows[slots, 1] = value

    def seal(self, layer: int, raw: PoolIndices, packed: PoolIndices) -> None:
        """Encode full raw blocks into their packed pages."""
        encoded = self.codecs[layer].encode(self.own_blocks(layer, raw))
        # As int64: torch scatters element by element, and a page has an eighth as many of these.
        self._packed_pages[layer].view(torch.int64)[packed] = encoded.view(torch.int64)

    def clear_raw(self, pages: Tensor) -> None:
        """Zero raw pages that will not be filled at once: attention weighs the rest by 0."""
        # Most steps that decode have none, and an empty write is launched too
        if not self.clears_rows or not len(pages):
            return
        for pool in self.raw.pages:
            pool[pages] = 0

    def copy_raw(self, block: int, source: int, target: int) -> None:
        """Copy the raw page of a sequence's open block, which is number `block` in it."""
        for pool in self.raw.pages:
            pool[target] = pool[source]


def _take(pool: Tensor, pages: PoolIndices) -> Tensor:
    """Return a view for a slice; else copy whole pages (indexing copies element by element)."""
    return pool[pages] if isinstance(pages, slice) else pool.index_select(0, pages)


def pool_bytes(
    gib: float | None, device: torch.device, *, ranks: int = 1, beside_bytes: int = 0
) -> int:
    """Return the bytes that the packed pools of one rank may take: as told, or what can be spared.

    On a GPU that is nine tenths of what is free, less `beside_bytes`, which raw pool and kernels
    take. On a CPU it is a quarter of the memory that the machine, or a container's limit, leaves
    this process; ranks on CPUs are taken to share one machine's RAM. Raises ModelRefused where
    nothing is left.
    """
    if gib is not None:
        return int(gib * GIB)
    if device.type == "cuda":
        free_bytes, _ = torch.cuda.mem_get_info(device)
        spare = int(GPU_SHARE * free_bytes) - beside_bytes
        if spare <= 0:
            raise ModelRefused(
                f"{device} has {free_bytes / GIB:.1f} GiB free beside the weights, and a step "
                f"takes {beside_bytes / GIB:.1f} GiB beside the KV cache; use a smaller "
                "--max-batch-tokens or --max-sequences, a smaller model, or a larger GPU"
            )
        return spare
    return memory_bytes() // 4 // ranks


def raw_pool_bytes(layers: Sequence[LayerSpec], dtype: torch.dtype, step_blocks: int) -> int:
    """Return the bytes of the raw pool of a memory that is made for so many blocks a step."""
    return (step_blocks + 1) * BLOCK_TOKENS * raw_token_bytes(layers, dtype)


def raw_token_bytes(layers: Sequence[LayerSpec], dtype: torch.dtype) -> int:
    """Return the bytes of a token's keys and values in all layers, as they are computed."""
    return sum(2 * layer.kv_heads * layer.head_dim for layer in layers) * dtype.itemsize


def _pages_per_group(
    groups: Sequence[LayerGroup], codecs: Sequence[Codec], pool_bytes: int, step_blocks: int
) -> list[int]:
    """Share the bytes out: how many blocks each group's pool holds.

    Global layers get N blocks, window groups a share of N.

    A window group needs the windows of what runs and the blocks of a step; what it has beyond them
    caches windows of finished prompts, so a quarter of N more is plenty.
    """
    block_bytes = [sum(codecs[layer].page_bytes for layer in group.layers) for group in groups]
    if groups[0].window is not None:
        total = sum(block_bytes)
        return [max(1, pool_bytes // total)] * len(groups)
    low, high = 1, max(2, pool_bytes // block_bytes[0])
    while low + 1 < high:  # the largest N whose pools fit
        middle = (low + high) // 2
        counts = _counts(groups, middle, step_blocks)
        fits = sum(n * size for n, size in zip(counts, block_bytes, strict=True)) <= pool_bytes
        low, high = (middle, high) if fits else (low, middle)
    return _counts(groups, low, step_blocks)


def _counts(groups: Sequence[LayerGroup], blocks: int, step_blocks: int) -> list[int]:
    counts = []
    for group in groups:
        if group.window is None:
            counts.append(blocks)
        else:
            running = step_blocks + 4 * (group.window // BLOCK_TOKENS + 2)
            counts.append(min(blocks, running + blocks // 4))
    return counts
