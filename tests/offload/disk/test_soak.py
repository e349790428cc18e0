"""Ten times more than there is room for: bytes, memory and descriptors stay where they are."""

import gc
import os
import random
import resource
from contextlib import closing
from pathlib import Path

from offload.block_run import BlockRun
from offload.disk.filesystem import FileSystem
from tests.offload.extents import open_tier, run_of, served, store

WRITES = 2000
FILE_BYTES = 4160 + 16 * 160
CAP_BYTES = WRITES * FILE_BYTES // 10
LEAK_BYTES = 8 << 20


class WatchedFiles(FileSystem):
    """Looks at the whole folder whenever a file has been written, before it has its name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.peak_bytes = self.index_bytes = 0

    def sync(self, descriptor: int) -> None:
        """Do not wait for the disk: durability is tested elsewhere, and 4,000 waits take long."""
        with os.scandir(self.folder) as found:
            sizes = {entry.name: entry.stat().st_size for entry in found if entry.is_file()}
        self.index_bytes = max(self.index_bytes, sizes.pop("index", 0))
        self.peak_bytes = max(self.peak_bytes, sum(sizes.values()))

    def sync_folder(self, folder: Path) -> None:
        pass


def memory_bytes() -> int:
    gc.collect()
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()


def test_a_small_cap_holds_for_a_long_time(tmp_path: Path) -> None:
    folder, choose = tmp_path / "kv", random.Random(0)
    files = WatchedFiles(folder)
    recent: list[BlockRun] = []
    descriptors = memory = 0
    with closing(open_tier(folder, cap_bytes=CAP_BYTES, files=files)) as tier:
        for number in range(WRITES):
            if number == WRITES // 2:  # the index, and what it remembers, are as large as ever
                descriptors, memory = len(os.listdir("/proc/self/fd")), memory_bytes()
            run = run_of(f"{number // 4}", number % 4 * 16, 16)
            assert store(tier, run, retained=choose.random() < 0.1 and number % 4 == 0)
            recent = [*recent[-50:], run]
            served(tier, choose.choice(recent))
            if number % 50 == 0:
                tier.drop(choose.choice(recent).keys)
                tier.gc()
        stats = tier.stats()
        assert stats.evictions["cap"] > 0.8 * WRITES
        assert stats.corrupt_files == stats.incidents["missing_files"] == 0
    assert 0.9 * CAP_BYTES < files.peak_bytes <= CAP_BYTES
    assert 0 < files.index_bytes < 1000 * CAP_BYTES // FILE_BYTES
    assert len(os.listdir("/proc/self/fd")) <= descriptors
    assert memory_bytes() - memory < LEAK_BYTES
