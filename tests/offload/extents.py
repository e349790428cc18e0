"""Chains of blocks whose pages follow from their keys, so that whoever reads one can judge it."""

import hashlib
from pathlib import Path
from time import time as wall_clock

import numpy as np
from numpy.typing import NDArray

from offload.block_run import BlockRun, PageSlots
from offload.disk.clocks import seconds_since_boot
from offload.disk.extent_header import ExtentMeta
from offload.disk.filesystem import FileSystem
from offload.disk.tier import DiskBounds, DiskTier, DiskTierConfig
from offload.eviction import LRU
from offload.key import BlockKey

PAGE_BYTES = (96, 64)  # of the two layers of a group


def namespace(chain: str) -> BlockKey:
    return _hash(f"{chain}/root")


def keys_of(chain: str, first: int, count: int) -> tuple[BlockKey, ...]:
    return tuple(_hash(f"{chain}/{block}") for block in range(first, first + count))


def run_of(chain: str, first: int, count: int, *, group: int = 0) -> BlockRun:
    """Return `count` blocks of the chain of that name, from block `first` on."""
    root = namespace(chain)
    parent = keys_of(chain, first - 1, 1)[0] if first else root
    return BlockRun(root, group, first, parent, keys_of(chain, first, count))


def meta_of(run: BlockRun) -> ExtentMeta:
    return ExtentMeta(run=run, cost_seconds=1.0, created_at=0.0, retained=False)


def page_of(key: BlockKey, group: int, layer: int, num_bytes: int) -> NDArray[np.uint8]:
    seed = key + bytes((group, layer))
    return np.frombuffer(hashlib.shake_128(seed).digest(num_bytes), dtype=np.uint8)


def blank(count: int, page_bytes: tuple[int, ...] = PAGE_BYTES) -> PageSlots:
    """Return empty slots: every other row from the end, so that none lie side by side."""
    arrays = tuple(np.zeros((2 * count + 1, size), np.uint8) for size in page_bytes)
    return PageSlots(arrays, tuple(range(2 * count, 0, -2)))


def filled(run: BlockRun, page_bytes: tuple[int, ...] = PAGE_BYTES) -> PageSlots:
    slots = blank(len(run.keys), page_bytes)
    for key, row in zip(run.keys, slots.pages, strict=True):
        for layer, array in enumerate(slots.arrays):
            array[row] = page_of(key, run.group, layer, array.shape[1])
    return slots


def is_right(group: int, keys: tuple[BlockKey, ...], slots: PageSlots) -> list[bool]:
    """Return which rows hold exactly the pages of these keys."""
    return [
        all(
            np.array_equal(array[row], page_of(key, group, layer, array.shape[1]))
            for layer, array in enumerate(slots.arrays, slots.first_layer)
        )
        for key, row in zip(keys, slots.pages, strict=True)
    ]


def store(tier: DiskTier, run: BlockRun, *, retained: bool = False) -> bool:
    return tier.write(run, filled(run), cost_seconds=1.0, retained=retained)


def served(tier: DiskTier, run: BlockRun) -> list[bool]:
    """Return which blocks of the run the tier serves. A wrong page fails the test."""
    slots = blank(len(run.keys))
    found = tier.read(run.group, run.keys, slots)
    right = is_right(run.group, run.keys, slots)
    assert all(page for here, page in zip(found, right, strict=True) if here), "a wrong page"
    return found


class Time:
    """A time of day that only moves when told, and the clock that watches it."""

    def __init__(self) -> None:
        self.day, self.steady = 1_000_000.0, 500.0

    def passes(self, seconds: float) -> None:
        self.day += seconds
        self.steady += seconds

    def jumps(self, seconds: float) -> None:
        self.day += seconds


def open_tier(
    folder: Path,
    *,
    cap_bytes: int | None = None,
    ttl_seconds: float | None = None,
    free_floor_bytes: int = 0,
    files: FileSystem | None = None,
    time: Time | None = None,
    read_only: bool = False,
    compress: bool = False,
) -> DiskTier:
    bounds = DiskBounds(
        cap_bytes=cap_bytes, ttl_seconds=ttl_seconds, free_floor_bytes=free_floor_bytes
    )
    return DiskTier(
        DiskTierConfig(folder=folder, bounds=bounds, read_only=read_only, compress=compress),
        LRU(),
        clock=wall_clock if time is None else lambda: time.day,
        steady_clock=seconds_since_boot if time is None else lambda: time.steady,
        files=files,
    )


def extent_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.kv"))


def _hash(text: str) -> BlockKey:
    return BlockKey(hashlib.blake2b(text.encode(), digest_size=32).digest())
