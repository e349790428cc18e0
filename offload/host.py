"""The tier in host memory: one bounded arena, faster than any disk, and gone with the process.

The arena is cut into equal units and a page takes as many as it needs, so that pages of different
layers share the room without leaving gaps. With pages of 96 and 64 bytes a unit has 32 bytes, their
greatest common divisor; a block of one page each takes 3 + 2 units, which may lie anywhere.

The arena grows by slabs as it is filled (`arena.py`). On a CUDA machine they are pinned memory: the
caller says how memory is allocated.
"""

import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from offload.arena import SLAB_BYTES, Arena, paged
from offload.block_run import PageSlots, Slots
from offload.descent import Stem
from offload.eviction import Evictable, EvictionPolicy
from offload.eviction_log import EvictionLog
from offload.key import BlockKey, GroupKey
from offload.stats import Cleared, Dropped, TierStats
from offload.tier_names import TierName

_UNITS_PER_PAGE = 16  # at most, since each unit is copied by a call of its own


class HostTier:
    """A `MemoryTier`: copies pages into its arena and out of it, and evicts blocks one by one.

    Any thread may call anything. One lock is held while pages are copied, and while a slab is
    allocated for them, so a call may wait for another thread; `has` takes no lock and returns at
    once.
    """

    name: Final[TierName] = "host"
    durable: Final[Literal[False]] = False

    def __init__(
        self,
        *,
        capacity_bytes: int,
        page_bytes: Iterable[int],
        policy: EvictionPolicy[GroupKey],
        allocate: Callable[[int], NDArray[np.uint8]] = paged,
        slab_bytes: int = SLAB_BYTES,
    ) -> None:
        """Plan the arena: at most `capacity_bytes`, rounded down to whole slabs of whole units.

        `page_bytes` are the page sizes of the layers of all groups, from which the unit follows.
        `allocate` and `slab_bytes` are as in `Arena`.
        """
        sizes = sorted(set(page_bytes))
        unit_bytes = math.gcd(*sizes)
        if unit_bytes * _UNITS_PER_PAGE < sizes[-1]:
            unit_bytes = sizes[0]
        self._unit_bytes = unit_bytes
        self._arena = Arena(
            capacity_bytes=capacity_bytes,
            unit_bytes=unit_bytes,
            slab_bytes=slab_bytes,
            allocate=allocate,
        )
        self._policy = policy
        self._lock = threading.Lock()
        self._units: dict[GroupKey, list[int]] = {}  # a block's units: layer by layer, in order
        self._origins: dict[GroupKey, tuple[BlockKey | None, tuple[str, ...]]] = {}  # for `stems`
        self._groups: dict[int, tuple[int, ...]] = {}  # page sizes of the layers of each
        self._log = EvictionLog()
        self._hits = self._misses = self._evictions = 0
        self._read_bytes = self._write_bytes = 0
        self._read_seconds = self._write_seconds = 0.0

    def has(self, group: int, key: BlockKey) -> bool:
        return (group, key) in self._units  # without the lock, which is held while pages are copied

    def put(
        self,
        group: int,
        keys: Sequence[BlockKey],
        slots: Slots,
        *,
        parent: BlockKey | None,
        cost_seconds: float,
        retained: bool,
        sources: tuple[str, ...] = (),
    ) -> int:
        """Copy consecutive blocks in; return how many of them, from the first on, are here now.

        `parent` is the key before the first one. All fit, unless they would have to displace their
        own beginning: of a chain of 7 blocks, a tier of 4 keeps the first 4. A block that is here
        already counts as used.
        """
        assert isinstance(slots, PageSlots), slots
        begin, count = time.perf_counter(), 0
        with self._lock:
            self._groups[group] = tuple(array.shape[1] for array in slots.arrays)
            for row, key in zip(slots.pages, keys, strict=True):
                block = (group, key)
                if block in self._units:
                    self._policy.used(block)
                elif not self._store(
                    block,
                    slots,
                    row,
                    parent=None if parent is None else (group, parent),
                    cost_seconds=cost_seconds / len(keys),
                    retained=retained,
                ):
                    break
                else:
                    self._origins[block] = (parent, sources)
                parent = key
                count += 1
            self._write_seconds += time.perf_counter() - begin
        return count

    def read(self, group: int, keys: Sequence[BlockKey], slots: Slots) -> list[bool]:
        assert isinstance(slots, PageSlots), slots
        begin = time.perf_counter()
        found = []
        with self._lock:
            for row, key in zip(slots.pages, keys, strict=True):
                units = self._units.get((group, key))
                found.append(units is not None)
                if units is not None:
                    # Units of layers before the first one that was asked for are skipped
                    before = self._groups[group][: slots.first_layer]
                    skipped = sum(-(-size // self._unit_bytes) for size in before)
                    for page, part in self._parts(slots.arrays, row, units[skipped:]):
                        page[:] = part
                    self._read_bytes += slots.block_bytes
                    self._policy.used((group, key))
            hits = sum(found)
            self._hits += hits
            self._misses += len(found) - hits
            self._read_seconds += time.perf_counter() - begin
        return found

    def use(self, keys: Iterable[BlockKey]) -> None:
        with self._lock:
            for block in self._held(keys):
                self._policy.used(block)

    def retain(self, keys: Iterable[BlockKey]) -> None:
        with self._lock:
            for block in self._held(keys):
                self._policy.retain(block)

    def release(self, keys: Iterable[BlockKey]) -> None:
        with self._lock:
            for block in self._held(keys):
                self._policy.release(block)

    def drop(self, keys: Iterable[BlockKey]) -> Dropped:
        with self._lock:
            blocks = self._held(keys)
            units = sum(len(self._units[block]) for block in blocks)
            for block in blocks:
                self._remove(block, "deleted")
        return Dropped(len(blocks), units * self._unit_bytes)

    def stems(self) -> list[Stem]:
        with self._lock:
            return [
                Stem((key,), parent, sources)
                for (_, key), (parent, sources) in self._origins.items()
            ]

    def clear(self) -> Cleared:
        """Empty the tier and return what it held."""
        with self._lock:
            blocks = list(self._units)
            units = sum(len(held) for held in self._units.values())
            for block in blocks:
                self._remove(block, "flushed")
            return Cleared(len(blocks), units * self._unit_bytes)

    def explain(self, group: int, key: BlockKey) -> str | None:
        """Return why a block left: evicted, deleted or flushed; see `Tier.explain`."""
        return None if self.has(group, key) else self._log.reason((group, key))

    def stats(self) -> TierStats:
        with self._lock:
            return TierStats(
                held_bytes=self._arena.used_bytes,
                capacity_bytes=self._arena.capacity_bytes,
                blocks=len(self._units),
                hits=self._hits,
                misses=self._misses,
                evictions={"cap": self._evictions},
                read_bytes=self._read_bytes,
                read_seconds=self._read_seconds,
                write_bytes=self._write_bytes,
                write_seconds=self._write_seconds,
            )

    def close(self) -> None:
        """Do nothing: nothing outlives the process."""

    def _held(self, keys: Iterable[BlockKey]) -> list[GroupKey]:
        """Return the blocks of these keys that are here, in any group."""
        blocks = ((group, key) for key in keys for group in self._groups)
        return [block for block in blocks if block in self._units]

    def _store(
        self,
        block: GroupKey,
        slots: PageSlots,
        row: int,
        *,
        parent: GroupKey | None,
        cost_seconds: float,
        retained: bool,
    ) -> bool:
        """Copy a block in, evicting others for it; False where it would displace its parent."""
        wanted = sum(-(-array.shape[1] // self._unit_bytes) for array in slots.arrays)
        while not self._arena.has_room(wanted):
            victim = self._policy.victim()
            if victim is None or victim == parent:  # a leaf, so nothing but this chain is left
                return False
            self._remove(victim, "evicted")
            self._evictions += 1
        units = self._arena.take(wanted)
        for page, part in self._parts(slots.arrays, row, units):
            part[:] = page
        self._write_bytes += slots.block_bytes
        self._policy.added(
            Evictable(block, slots.block_bytes, cost_seconds, (block,), parent, retained)
        )
        self._log.forget(block)
        self._units[block] = units  # last: `has` may be asked at any moment
        return True

    def _remove(self, block: GroupKey, reason: str) -> None:
        self._arena.give_back(self._units.pop(block))
        self._origins.pop(block, None)
        self._policy.removed(block)
        self._log.record(block, reason)

    def _parts(
        self, arrays: Sequence[NDArray[np.uint8]], row: int, units: Iterable[int]
    ) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
        """Yield (slice of a page, the same bytes in the arena), one pair for each unit."""
        of_block = iter(units)
        for array in arrays:
            page = array[row]
            for begin in range(0, len(page), self._unit_bytes):
                piece = page[begin : begin + self._unit_bytes]
                yield piece, self._arena.unit(next(of_block))[: len(piece)]
