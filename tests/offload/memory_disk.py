"""A disk made of a dictionary, which hangs, fails and forgets when told to."""

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Final, Literal

import numpy as np

from offload.block_run import BlockRun, PageSlots, Slots
from offload.descent import Stem
from offload.key import BlockKey
from offload.stats import Dropped, TierStats
from offload.tier_names import TierName

PAGE_BYTES = (96, 64)  # of the two layers of every group in these tests


def key(number: int) -> BlockKey:
    return BlockKey(number.to_bytes(32, "big"))


def chain(first: int, count: int, *, group: int = 0) -> BlockRun:
    """Return `count` blocks of one chain, from block `first` on. Its root is key 0."""
    keys = tuple(key(number) for number in range(first, first + count))
    return BlockRun(key(0), group, first - 1, key(first - 1), keys)


def blank_slots(count: int) -> PageSlots:
    """Return empty slots, in descending order of their rows."""
    arrays = tuple(np.zeros((count + 3, size), dtype=np.uint8) for size in PAGE_BYTES)
    return PageSlots(arrays, tuple(range(count, 0, -1)))


def filled_slots(run: BlockRun, *, seed: int = 0) -> PageSlots:
    """Return slots with pages whose bytes follow from key, group and seed."""
    slots = blank_slots(len(run.keys))
    for name, row in zip(run.keys, slots.pages, strict=True):
        random = np.random.default_rng([*name[-4:], run.group, seed])
        for array in slots.arrays:
            array[row] = random.integers(0, 256, array.shape[1], dtype=np.uint8)
    return slots


def pages(slots: PageSlots) -> list[bytes]:
    """Return what each block of the slots holds, its layers one after another."""
    return [b"".join(array[row].tobytes() for array in slots.arrays) for row in slots.pages]


class MemoryDisk:
    """A `DurableTier` for tests, which remembers the calls that were made."""

    durable: Final[Literal[True]] = True

    def __init__(self, name: TierName = "disk") -> None:
        self.name = name
        self.blocks: dict[tuple[int, BlockKey], list[bytes]] = {}
        self.runs: list[BlockRun] = []  # as written
        self.reads: list[tuple[BlockKey, ...]] = []
        self.used: list[set[BlockKey]] = []
        self.retained: set[BlockKey] = set()
        self.full = False
        self.losses = 0
        self.unreadable: set[BlockKey] = set()
        self.bug: Exception | None = None
        self.while_reading: Callable[[], None] = lambda: None
        self.go_on_reading = threading.Event()
        self.go_on_writing = threading.Event()
        self.go_on_reading.set()
        self.go_on_writing.set()
        self.collections = 0
        self.closed = False

    def has(self, group: int, key: BlockKey) -> bool:
        return (group, key) in self.blocks

    def write(self, run: BlockRun, slots: Slots, *, cost_seconds: float, retained: bool) -> bool:
        assert isinstance(slots, PageSlots), slots
        assert self.go_on_writing.wait(10)
        if self.bug is not None:
            raise self.bug
        if self.full:
            return False
        self.runs.append(run)
        if retained:
            self.retained.update(run.keys)
        for name, row in zip(run.keys, slots.pages, strict=True):
            assert (run.group, name) not in self.blocks, "written twice"
            self.blocks[run.group, name] = [array[row].tobytes() for array in slots.arrays]
        return True

    def read(self, group: int, keys: Sequence[BlockKey], slots: Slots) -> list[bool]:
        assert isinstance(slots, PageSlots), slots
        self.reads.append(tuple(keys))
        assert self.go_on_reading.wait(10)
        self.while_reading()
        if self.bug is not None:
            raise self.bug
        found = []
        for name, row in zip(keys, slots.pages, strict=True):
            page = None if name in self.unreadable else self.blocks.get((group, name))
            found.append(page is not None)
            for array, raw in zip(slots.arrays, page or (), strict=page is not None):
                array[row] = np.frombuffer(raw, dtype=np.uint8)
        return found

    def use(self, keys: Iterable[BlockKey]) -> None:
        self.used.append(set(keys))

    def retain(self, keys: Iterable[BlockKey]) -> None:
        self.retained.update(keys)

    def release(self, keys: Iterable[BlockKey]) -> None:
        self.retained.difference_update(keys)

    def drop(self, keys: Iterable[BlockKey]) -> Dropped:
        gone = set(keys)
        before = len(self.blocks)
        self.blocks = {block: raw for block, raw in self.blocks.items() if block[1] not in gone}
        return Dropped(before - len(self.blocks), (before - len(self.blocks)) * sum(PAGE_BYTES))

    def stems(self) -> list[Stem]:
        return [Stem.of(run) for run in self.runs]

    def explain(self, group: int, key: BlockKey) -> str | None:
        return None if self.has(group, key) else "expired"

    def gc(self) -> None:
        self.collections += 1

    def stats(self) -> TierStats:
        return TierStats(
            held_bytes=sum(len(page) for pages in self.blocks.values() for page in pages),
            capacity_bytes=None,
            blocks=len(self.blocks),
            hits=0,
            misses=0,
            evictions={},
            extents=len(self.runs),
        )

    def close(self) -> None:
        self.closed = True
