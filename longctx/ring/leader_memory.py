"""The leader's memory: its own pools, and page accounting for all ranks.

Global-layer pages are sharded over ranks; window-layer pages are replicated under the same number
on every rank. Raw pages are numbered once for all ranks: each is used by the rank that computes its
block.
"""

from collections.abc import Sequence

import numpy as np

from longctx.kv.memory import KVMemory
from longctx.model.spec import ModelSpec
from longctx.ring import placement
from longctx.ring.rank import RingMemorySpec


class LeaderMemory(KVMemory):
    """A `KVMemory` whose pages of global layers may be on any rank.

    The leader numbers a page of rank r as r * pages_per_rank + page; with 1,000 pages a rank, page
    2005 is page 5 of rank 2. A block's page is allocated on the rank that owns the block
    (`placement.owner`). Like `KVMemory` it belongs to the engine's thread.
    """

    def __init__(self, spec: ModelSpec, ring: RingMemorySpec) -> None:
        super().__init__(
            spec.layers,
            dtype=spec.dtype,
            device=spec.device,
            codec=ring.codec,
            pool_bytes=ring.pool_bytes,
            step_blocks=ring.step_blocks,
            ranks=ring.ranks,
            staging_blocks=ring.staging_blocks,
        )
        self.ring = ring
        self._copies: list[tuple[int, int, int]] = []

    @property
    def capacity_blocks(self) -> int:
        """Blocks of the longest sequence: it ends where one rank's share of it is full."""
        pool = self.packed[0]
        if self.groups[0].window is not None:
            return pool.capacity
        return placement.capacity_blocks(pool.capacity // pool.ranks, pool.ranks)

    def pages_needed(self, blocks: range, spare: int = 0) -> list[list[int]]:
        """As in `KVMemory`; of global layers each rank needs pages for the blocks it owns."""
        needed = super().pages_needed(blocks, spare)
        if self.groups[0].window is None:
            shares = placement.count_owned(blocks.start, blocks.stop, self.ring.ranks)
            needed[0] = [share + spare for share in shares]
        return needed

    def allocate(self, group: int, blocks: Sequence[int]) -> list[int]:
        """As in `KVMemory`; a page of a global layer is allocated on the block's owner."""
        if self.groups[group].window is not None:
            return super().allocate(group, blocks)
        owners = placement.owners(np.array(blocks, dtype=np.int64), self.ring.ranks)
        pages = np.empty(len(owners), dtype=np.int64)
        for rank in range(self.ring.ranks):
            owned = np.flatnonzero(owners == rank)
            pages[owned] = self.packed[group].allocate(len(owned), rank=rank)
        allocated: list[int] = pages.tolist()
        return allocated

    def copy_raw(self, block: int, source: int, target: int) -> None:
        """As in `KVMemory`, but later: the block's owner copies when the next step begins."""
        self._copies.append((placement.owner(block, self.ring.ranks), source, target))

    def take_copies(self) -> list[tuple[int, int, int]]:
        """Return and forget the copies of raw pages to make before the next step begins.

        Each is (rank, source page, target page).
        """
        copies, self._copies = self._copies, []
        return copies
