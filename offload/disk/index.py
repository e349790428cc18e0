"""What the disk tier knows of its files without reading them: a copy of their headers."""

import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from offload.disk.extent_header import ExtentMeta
from offload.eviction import Evictable, EvictionPolicy
from offload.eviction_log import EvictionLog
from offload.key import BlockKey, GroupKey


@dataclass(slots=True, eq=False)
class Extent:
    """One file, as the index has it.

    `used_at` is in seconds since 1970. What is retained now, the index knows: `meta.retained` is
    only how the extent came into it.
    """

    meta: ExtentMeta
    file_bytes: int
    used_at: float
    name: str = field(init=False)
    blocks: tuple[GroupKey, ...] = field(init=False)

    def __post_init__(self) -> None:
        run = self.meta.run
        self.name = self.meta.file_name
        self.blocks = tuple([(run.group, key) for key in run.keys])


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskEntry:
    """An extent as it was when the index was asked; `used_at` is in seconds since 1970.

    `meta.retained` is true while any document retains one of its blocks.
    """

    meta: ExtentMeta
    file_bytes: int
    used_at: float

    @property
    def name(self) -> str:
        return self.meta.file_name

    @property
    def keys(self) -> tuple[BlockKey, ...]:
        return self.meta.run.keys

    @property
    def num_blocks(self) -> int:
        return len(self.keys)


class DiskIndex:
    """Finds extents by name and by block, and knows which blocks are retained.

    Which extent leaves next is up to `policy`. Whoever calls holds `lock`; only `holder` may be
    asked without it, from any thread.

    Several extents may hold one block: window checkpoints overlap, and prompts fork. `holder` gives
    the latest of them; the others are in `_copies` until it leaves.
    """

    def __init__(self, policy: EvictionPolicy[str]) -> None:
        self.lock = threading.Lock()
        self._policy = policy
        self._by_name: dict[str, Extent] = {}
        self._by_block: dict[GroupKey, Extent] = {}
        self._copies: dict[GroupKey, list[Extent]] = {}  # where a block is in several files: all
        self._groups: dict[int, int] = {}  # the number of extents of each layer group
        self._retained: set[BlockKey] = set()
        self._log = EvictionLog()
        self._used: set[str] = set()  # names of extents whose files do not know of their last use
        self.num_bytes = 0
        self.changes = 0  # extents that came or left, ever
        self.removed = 0  # extents that left, ever

    def __len__(self) -> int:
        return len(self._by_name)

    def __iter__(self) -> Iterator[Extent]:
        return iter(self._by_name.values())

    @property
    def num_blocks(self) -> int:
        return len(self._by_block)

    def named(self, name: str) -> Extent | None:
        """Return the extent of that file name."""
        return self._by_name.get(name)

    def holder(self, block: GroupKey) -> Extent | None:
        """Return the extent to read a block from."""
        return self._by_block.get(block)

    def add(self, extent: Extent) -> None:
        """Take up an extent, which counts as used now and is retained if its `meta` says so."""
        assert extent.name not in self._by_name, f"added twice: {extent.name}"
        run = extent.meta.run
        self._by_name[extent.name] = extent
        self.changes += 1
        self._groups[run.group] = self._groups.get(run.group, 0) + 1
        self.num_bytes += extent.file_bytes
        for block in extent.blocks:
            self._point(block, extent)
        if extent.meta.retained:
            self._retained.update(run.keys)
        parent = None if run.parent == run.namespace else (run.group, run.parent)
        self._policy.added(
            Evictable(
                name=extent.name,
                size_bytes=extent.file_bytes,
                cost_seconds=extent.meta.cost_seconds,
                blocks=extent.blocks,
                parent=parent,
                retained=self.is_retained(extent),
            )
        )

    def remove(self, extent: Extent, reason: str) -> None:
        """Forget an extent; `reason` goes to the eviction log for blocks that no other one has."""
        run = extent.meta.run
        self.removed += 1
        self.changes += 1
        del self._by_name[extent.name]
        self._used.discard(extent.name)
        self._groups[run.group] -= 1
        if not self._groups[run.group]:
            del self._groups[run.group]
        self.num_bytes -= extent.file_bytes
        for block in extent.blocks:
            self._unpoint(block, extent, reason)
        self._policy.removed(extent.name)
        self._retained.difference_update(key for key in run.keys if not self._is_held(key))

    def use(self, extent: Extent, now: float) -> None:
        """Count the extent as used at `now`."""
        extent.used_at = now
        self._used.add(extent.name)
        self._policy.used(extent.name)

    def shift(self, seconds: float) -> None:
        """Move all times by a jump of the clock, so that nothing is older for that."""
        for extent in self:
            extent.used_at += seconds
            self._used.add(extent.name)

    def take_uses(self) -> list[tuple[str, float]]:
        """Return (name, last use) of the extents that were used since the last call."""
        extents = [self._by_name[name] for name in self._used]
        self._used.clear()
        return [(extent.name, extent.used_at) for extent in extents]

    def entries(self) -> list[DiskEntry]:
        """Return all extents, in the order in which they came."""
        return [
            DiskEntry(
                meta=self.meta_now(extent),
                file_bytes=extent.file_bytes,
                used_at=extent.used_at,
            )
            for extent in self
        ]

    def meta_now(self, extent: Extent) -> ExtentMeta:
        """Return the extent's meta, with `retained` as it is at present."""
        retained = self.is_retained(extent)
        meta = extent.meta
        return meta if meta.retained == retained else replace(meta, retained=retained)

    def holding(self, keys: Iterable[BlockKey]) -> Iterable[Extent]:
        """Return each extent that has one of the keys, in any group, once."""
        return dict.fromkeys(extent for key in keys for extent in self._holding(key))

    def victim(self) -> Extent | None:
        """Return the extent that should leave next; None if there is none at all."""
        name = self._policy.victim()
        return None if name is None else self._by_name[name]

    def retain(self, keys: Iterable[BlockKey]) -> None:
        """Let extents of these keys leave last. Keys that no extent holds are passed over."""
        for key in keys:
            for extent in self._holding(key):
                self._retained.add(key)
                self._policy.retain(extent.name)

    def release(self, keys: Iterable[BlockKey]) -> None:
        """End what `retain` began, for extents of which no other key is retained."""
        released = [key for key in keys if key in self._retained]
        self._retained.difference_update(released)
        for key in released:
            for extent in self._holding(key):
                if not self.is_retained(extent):
                    self._policy.release(extent.name)

    def is_retained(self, extent: Extent) -> bool:
        return not self._retained.isdisjoint(extent.meta.run.keys)

    def explain(self, block: GroupKey) -> str | None:
        """Return why a block left; None for one that is here, or that nobody remembers."""
        return None if block in self._by_block else self._log.reason(block)

    def _holding(self, key: BlockKey) -> list[Extent]:
        """Return the extents that have the key, in any group."""
        found: list[Extent] = []
        for group in self._groups:
            extent = self._by_block.get((group, key))
            if extent is not None:
                found.extend(self._copies.get((group, key), (extent,)))
        return found

    def _is_held(self, key: BlockKey) -> bool:
        return any((group, key) in self._by_block for group in self._groups)

    def _point(self, block: GroupKey, extent: Extent) -> None:
        """Let a block be found in the extent."""
        before = self._by_block.get(block)
        if before is not None:
            self._copies.setdefault(block, [before]).append(extent)
        self._by_block[block] = extent
        self._log.forget(block)

    def _unpoint(self, block: GroupKey, extent: Extent, reason: str) -> None:
        """Let a block no longer be found in the extent, but in another one that has it."""
        copies = self._copies.pop(block, [extent])
        copies.remove(extent)
        if not copies:
            del self._by_block[block]
            self._log.record(block, reason)
            return
        self._by_block[block] = copies[-1]
        if len(copies) > 1:
            self._copies[block] = copies
