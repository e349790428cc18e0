"""Restoring runs at the speed of the disk, or of memory where the page cache holds the files."""

import os
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from statistics import median

import numpy as np
import pytest

from offload.block_run import PageSlots
from offload.disk.filesystem import FileSystem
from offload.disk.tier import DiskTier
from tests.offload.extents import extent_files, open_tier, run_of

PAGE_BYTES = (33 << 10,) * 12  # int8 pages of four heads of 64
EXTENTS, BLOCKS = 40, 16
ROUNDS = 7

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Store 250 MB of extents."""
    folder = tmp_path_factory.mktemp("speed") / "kv"
    noise = np.random.default_rng(0).integers(0, 256, (BLOCKS, PAGE_BYTES[0]), dtype=np.uint8)
    slots = PageSlots((noise,) * len(PAGE_BYTES), tuple(range(BLOCKS)))
    with closing(open_tier(folder)) as tier:
        for extent in range(EXTENTS):
            run = run_of("a", extent * BLOCKS, BLOCKS)
            assert tier.write(run, slots, cost_seconds=1.0, retained=True)
    return folder


def drop_page_cache(folder: Path) -> None:
    for path in extent_files(folder):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def plain_read(folder: Path) -> None:
    """Read a file from its beginning to its end, 1 MiB at a time; larger requests gain nothing."""
    target = np.ones((1 << 20) + 64, np.uint8)[64:].data
    for path in extent_files(folder):
        descriptor, offset = os.open(path, os.O_RDONLY), 0
        while moved := os.preadv(descriptor, [target], offset):
            offset += moved
        os.close(descriptor)


def restore(tier: DiskTier, slots: PageSlots) -> None:
    for extent in range(EXTENTS):
        keys = run_of("a", extent * BLOCKS, BLOCKS).keys
        assert all(tier.read(0, keys, slots.rows(extent * BLOCKS, (extent + 1) * BLOCKS)))


def seconds(act: Callable[[], None]) -> float:
    begin = time.perf_counter()
    act()
    return time.perf_counter() - begin


def pool() -> PageSlots:
    """Allocate as a block pool does, and touch every page."""
    arrays = tuple(np.zeros((EXTENTS * BLOCKS + 1, size), np.uint8) for size in PAGE_BYTES)
    for array in arrays:
        array[:] = 1
    return PageSlots(arrays, tuple(range(1, EXTENTS * BLOCKS + 1)))


def test_restoring_keeps_up_with_a_plain_read(folder: Path) -> None:
    slots, ratios = pool(), []
    with closing(open_tier(folder)) as tier:
        for _ in range(ROUNDS):
            drop_page_cache(folder)
            plain = seconds(lambda: plain_read(folder))
            drop_page_cache(folder)
            ratios.append(plain / seconds(lambda: restore(tier, slots)))
    print(f"restoring runs at {median(ratios):.2f} of a plain read without page cache")
    assert median(ratios) >= 0.7


def test_restoring_from_the_page_cache_is_fast(folder: Path) -> None:
    slots = pool()
    with closing(open_tier(folder)) as tier:
        restore(tier, slots)
        times = [seconds(lambda: restore(tier, slots)) for _ in range(ROUNDS)]
    speeds = [EXTENTS * BLOCKS * sum(PAGE_BYTES) / duration / 1e9 for duration in times]
    print(f"restoring from page cache, checks included: {median(speeds):.1f} GB/s, one thread")
    assert max(speeds) >= 2.0  # whoever shares the machine only ever makes it slower


class UnsyncedFiles(FileSystem):
    def sync(self, descriptor: int) -> None:
        """Do not wait for the disk: the files are to be counted, not to be kept."""

    def sync_folder(self, folder: Path) -> None:
        pass


def test_ten_thousand_extents_open_in_a_moment(tmp_path: Path) -> None:
    files = UnsyncedFiles()
    with closing(open_tier(tmp_path / "kv", files=files)) as tier:
        slots = PageSlots((np.ones((BLOCKS, 64), np.uint8),) * 24, tuple(range(BLOCKS)))
        for number in range(10_000):
            run = run_of(f"{number // 30}", number % 30 * BLOCKS, BLOCKS)
            assert tier.write(run, slots, cost_seconds=1.0, retained=False)
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        with closing(open_tier(tmp_path / "kv", files=files)) as tier:
            times.append(time.perf_counter() - begin)
            assert tier.stats().extents == 10_000
    (tmp_path / "kv" / "index").unlink()
    begin = time.perf_counter()
    open_tier(tmp_path / "kv", files=files).close()
    scanned = time.perf_counter() - begin
    print(f"10,000 extents open in {min(times):.2f} s, {scanned:.2f} s without the index's copy")
    assert min(times) < 2.0
