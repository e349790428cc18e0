"""The leader's memory: its own pools, and the books of every rank's pages.

A page of layers that see everything is one of some rank; pages of layers with a window stand on
every rank under the same number. So does the raw pool's numbering: a raw page is used by the rank
that computes its block.
"""

from collections.abc import Sequence

import numpy as np

from longctx.kv.memory import KVMemory
from longctx.model.spec import ModelSpec
from longctx.ring import placement as layout
from longctx.ring.rank import RingMemory


class LeaderMemory(KVMemory):
    def __init__(self, spec: ModelSpec, ring: RingMemory) -> None:
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
        """Of one sequence: it ends where one rank's share of it is full."""
        pool = self.packed[0]
        if self.groups[0].window is not None:
            return pool.capacity
        return layout.capacity(pool.capacity // pool.ranks, pool.ranks)

    def pages_needed(self, blocks: range, spare: int = 0) -> list[list[int]]:
        needed = super().pages_needed(blocks, spare)
        if self.groups[0].window is None:
            shares = layout.owned(blocks.start, blocks.stop, self.ring.ranks)
            needed[0] = [share + spare for share in shares]
        return needed

    def allocate(self, group: int, blocks: Sequence[int]) -> list[int]:
        if self.groups[group].window is not None:
            return super().allocate(group, blocks)
        owners = layout.owners(np.array(blocks, dtype=np.int64), self.ring.ranks)
        pages = np.empty(len(owners), dtype=np.int64)
        for rank in range(self.ring.ranks):
            own = np.flatnonzero(owners == rank)
            pages[own] = self.packed[group].allocate(len(own), rank=rank)
        allocated: list[int] = pages.tolist()
        return allocated

    def copy_raw(self, block: int, source: int, target: int) -> None:
        self._copies.append((layout.owner(block, self.ring.ranks), source, target))

    def take_copies(self) -> list[tuple[int, int, int]]:
        """(rank, source, target) of raw pages to be copied before the next step begins."""
        copies, self._copies = self._copies, []
        return copies
