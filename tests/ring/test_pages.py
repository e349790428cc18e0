"""What any number of ranks has written is read by any other number, wherever its pages are."""

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compress.shape import BLOCK_TOKENS
from longctx.kv.memory import KVMemory
from longctx.model.spec import LayerSpec
from longctx.ring.pages import LocalPages, RingExtents, RingTransfer
from offload.disk.tier import DiskTier, DiskTierConfig
from offload.eviction import LRU
from tests.offload.extents import run_of

BLOCKS = 8


class Ranks:
    """The pools of several ranks, and the disk tier of their leader."""

    def __init__(self, size: int, folder: Path) -> None:
        window = LayerSpec(heads=1, kv_heads=1, head_dim=16, window=BLOCK_TOKENS)
        layers = [LayerSpec(heads=1, kv_heads=1, head_dim=16, window=None)] * 2 + [window]
        self.memories = [
            KVMemory(
                layers,
                dtype=torch.float32,
                device=torch.device("cpu"),
                codec="raw",
                pool_bytes=1 << 21,
                step_blocks=2,
            )
            for _ in range(size)
        ]
        leader: Any = self.memories[0]
        self.disk = DiskTier(
            DiskTierConfig(folder=folder),
            LRU(),
            extents=RingExtents(leader, [LocalPages(memory) for memory in self.memories]),
        )
        self.transfers = [RingTransfer(g, sum(p.page_bytes)) for g, p in enumerate(leader.packed)]

    def number(self, rank: int, page: int) -> int:
        """Return the leader's number of a rank's page."""
        return rank * self.memories[0].packed[0].pages_per_rank + page

    def put(self, group: int, rank: int, page: int, seed: int) -> None:
        for layer, pages in enumerate(self.memories[rank].packed[group].pages):
            pages[page] = contents(group, layer, seed, pages.shape[1])

    def holds(self, group: int, rank: int, page: int, seed: int) -> bool:
        pools = enumerate(self.memories[rank].packed[group].pages)
        return all(torch.equal(p[page], contents(group, i, seed, p.shape[1])) for i, p in pools)

    def write(self, chain: str, group: int, pages: list[int]) -> bool:
        slots, ready = self.transfers[group].outgoing(pages)
        run = run_of(chain, 0, len(pages), group=group)
        assert ready()
        return self.disk.write(run, slots, cost_seconds=1.0, retained=False)

    def read(self, chain: str, group: int, pages: list[int]) -> list[bool]:
        run = run_of(chain, 0, len(pages), group=group)
        return self.disk.read(group, run.keys, self.transfers[group].incoming(pages))


def contents(group: int, layer: int, seed: int, size: int) -> torch.Tensor:
    chance = np.random.default_rng((group, layer, seed))
    return torch.from_numpy(chance.integers(0, 256, size, dtype=np.uint8))


def test_one_rank_writes_and_another_restores(tmp_path: Path) -> None:
    two = Ranks(2, tmp_path)
    for block in range(BLOCKS):
        two.put(0, 1, 10 + block, seed=block)
    assert two.write("a", 0, [two.number(1, 10 + block) for block in range(BLOCKS)])
    two.disk.close()
    three = Ranks(3, tmp_path)
    assert all(three.read("a", 0, [three.number(2, 5 + block) for block in range(BLOCKS)]))
    assert all(three.holds(0, 2, 5 + block, seed=block) for block in range(BLOCKS))
    three.disk.close()


def test_blocks_of_one_chain_may_lie_on_several_ranks(tmp_path: Path) -> None:
    ranks = Ranks(3, tmp_path)
    where = [(block % 3, 20 - block) for block in range(BLOCKS)]
    for seed, (rank, page) in enumerate(where):
        ranks.put(0, rank, page, seed)
    assert ranks.write("a", 0, [ranks.number(*page) for page in where])
    elsewhere = [((block + 1) % 3, 30 + block) for block in range(BLOCKS)]
    assert all(ranks.read("a", 0, [ranks.number(*page) for page in elsewhere]))
    for seed, (rank, page) in enumerate(elsewhere):
        assert ranks.holds(0, rank, page, seed)
    ranks.disk.close()


def test_windows_are_written_once_and_restored_everywhere(tmp_path: Path) -> None:
    ranks = Ranks(3, tmp_path)
    for rank in range(3):
        ranks.put(1, rank, 1, seed=rank)
    assert ranks.write("a", 1, [1])
    assert ranks.read("a", 1, [2]) == [True]
    assert all(ranks.holds(1, rank, 2, seed=0) for rank in range(3))
    ranks.disk.close()


def test_what_cannot_be_read_is_a_miss(tmp_path: Path) -> None:
    ranks = Ranks(2, tmp_path)
    assert ranks.write("a", 0, [ranks.number(1, 1)]) and ranks.write("b", 0, [ranks.number(1, 2)])
    first, second = tmp_path.glob("*.kv")
    first.unlink()
    second.write_bytes(second.read_bytes()[:-1])
    assert ranks.read("a", 0, [ranks.number(0, 3)]) == [False]
    assert ranks.read("b", 0, [ranks.number(0, 3)]) == [False]
    assert ranks.disk.stats().incidents["missing_files"] == 1
    assert ranks.disk.stats().corrupt_files == 1
    ranks.disk.close()


def test_a_full_disk_of_another_rank_turns_writing_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = Ranks(2, tmp_path)

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(LocalPages, "write", full)
    assert not ranks.write("a", 0, [ranks.number(1, 1)])
    assert ranks.disk.stats().incidents["full_disks"] == 1 and ranks.disk.stats().writes_off
    ranks.disk.close()
