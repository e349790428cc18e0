"""The tiers' way to pages of other ranks: each rank writes and reads the files of its own pages.

One store, in the leader, decides which extent goes where and when; `RingExtents` tells the rank
that owns the pages to move the bytes, so they never travel. What is on disk is the same for any
number of ranks.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, Self

import numpy as np

from longctx.kv.memory import KVMemory
from longctx.kv.transfer import PageTransfer
from offload.block_run import BlockRun, PageSlots, Slots
from offload.disk import extent_file
from offload.disk.extent_header import ExtentHeader, ExtentMeta, page_table
from offload.disk.extent_io import LocalExtents, UnwrittenExtent
from offload.disk.filesystem import FileSystem

COPY_SECONDS = 0.0005  # between two looks whether a GPU has copied pages out


class RankPages(Protocol):
    """The pages of one rank, by the rank's own numbers. Calls block and come from any thread."""

    def write(self, path: Path, meta: ExtentMeta, pages: Sequence[int]) -> None:
        """A new extent file, on the disk when this returns. Raises OSError, PeerLost."""
        ...

    def read(
        self, path: Path, run: BlockRun, blocks: Sequence[int], pages: Sequence[int]
    ) -> list[bool]:
        """As `ExtentIO.read`; raises PeerLost too."""
        ...

    def copy(self, group: int, pages: Sequence[int]) -> list[bytes]:
        """What stands in the pages: of each layer, one page after the other. Raises PeerLost."""
        ...


class LocalPages:
    """The pages of a rank in this process."""

    def __init__(self, memory: KVMemory) -> None:
        staged = memory.device.type != "cpu"
        self._transfers = [PageTransfer(pool, staged=staged) for pool in memory.packed]
        self._files = FileSystem()
        self._extents = LocalExtents(self._files)

    def write(self, path: Path, meta: ExtentMeta, pages: Sequence[int]) -> None:
        slots = self._outgoing(meta.run.group, pages)
        packed = extent_file.pack(meta, slots, shuffle=None)
        extent_file.write(self._files, path, packed)

    def read(
        self, path: Path, run: BlockRun, blocks: Sequence[int], pages: Sequence[int]
    ) -> list[bool]:
        transfer = self._transfers[run.group]
        slots = transfer.incoming(pages)
        found = self._extents.read(path, run, blocks, slots)
        transfer.arrived(slots, pages)
        return found

    def copy(self, group: int, pages: Sequence[int]) -> list[bytes]:
        slots = self._outgoing(group, pages)
        return [array[list(slots.pages)].tobytes() for array in slots.arrays]

    def _outgoing(self, group: int, pages: Sequence[int]) -> PageSlots:
        slots, ready = self._transfers[group].outgoing(pages)
        while not ready():
            time.sleep(COPY_SECONDS)
        return slots


@dataclass(frozen=True, slots=True)
class RingSlots:
    """Pages of one layer group by the leader's numbers, wherever they lie."""

    group: int
    pages: tuple[int, ...]
    block_bytes: int

    def pick(self, indices: Sequence[int]) -> Self:
        return replace(self, pages=tuple(self.pages[index] for index in indices))

    def rows(self, begin: int, end: int) -> Self:
        return replace(self, pages=self.pages[begin:end])


class RingTransfer:
    """Pages of one layer group of all ranks: a `Transfer` that leaves the bytes where they are."""

    def __init__(self, group: int, block_bytes: int) -> None:
        self._group, self._block_bytes = group, block_bytes

    def outgoing(self, pages: Sequence[int]) -> tuple[RingSlots, Callable[[], bool]]:
        return self.incoming(pages), _now  # a step has ended on every rank before this is called

    def incoming(self, pages: Sequence[int]) -> RingSlots:
        return RingSlots(self._group, tuple(pages), self._block_bytes)

    def arrived(self, slots: Slots, pages: Sequence[int]) -> None:
        """The rank that read them has put them into their place."""

    def fetch(self, layer: int, pages: Sequence[int], read: Callable[[Slots], bool]) -> bool:
        raise AssertionError("contexts larger than the device are not streamed through many ranks")


class RingExtents:
    """An `ExtentIO` for `RingSlots`."""

    def __init__(self, memory: KVMemory, ranks: Sequence[RankPages]) -> None:
        """`memory`: the leader's, which keeps the books of all."""
        self._ranks = ranks
        self._page_bytes = [pool.page_bytes for pool in memory.packed]
        self._pages_per_rank = [pool.pages_per_rank for pool in memory.packed]
        self._replicated = [group.window is not None for group in memory.groups]
        self._local = LocalExtents(FileSystem())

    def pack(self, meta: ExtentMeta, slots: Slots) -> UnwrittenExtent:
        """The header has no checksums yet: the rank that owns the pages computes them."""
        assert isinstance(slots, RingSlots), slots
        parts = self._parts(slots)
        if len(parts) > 1:  # two prompts have computed parts of one chain
            return self._local.pack(meta, self._collected(slots, parts))
        ((rank, (_, pages)),) = parts.items()
        page_bytes = self._page_bytes[meta.run.group]
        table = page_table(len(page_bytes), len(meta.run.keys))
        table["stored_bytes"] = np.array(page_bytes)[:, None]
        header = ExtentHeader(meta, page_bytes, table)
        return UnwrittenExtent(header, lambda path: self._ranks[rank].write(path, meta, pages))

    def read(self, path: Path, run: BlockRun, blocks: Sequence[int], slots: Slots) -> list[bool]:
        assert isinstance(slots, RingSlots), slots
        if self._replicated[run.group]:
            copies = [rank.read(path, run, blocks, slots.pages) for rank in self._ranks]
            return [all(whole) for whole in zip(*copies, strict=True)]
        found = [False] * len(blocks)
        for rank, (indices, pages) in self._parts(slots).items():
            own = [blocks[index] for index in indices]
            here = self._ranks[rank].read(path, run, own, pages)
            for index, whole in zip(indices, here, strict=True):
                found[index] = whole
        return found

    def _parts(self, slots: RingSlots) -> dict[int, tuple[list[int], list[int]]]:
        """By rank: which of the slots lie there, and as which of its pages."""
        if self._replicated[slots.group]:
            return {0: (list(range(len(slots.pages))), list(slots.pages))}
        parts: dict[int, tuple[list[int], list[int]]] = {}
        for index, page in enumerate(slots.pages):
            rank, own = divmod(page, self._pages_per_rank[slots.group])
            indices, pages = parts.setdefault(rank, ([], []))
            indices.append(index)
            pages.append(own)
        return parts

    def _collected(
        self, slots: RingSlots, parts: dict[int, tuple[list[int], list[int]]]
    ) -> PageSlots:
        """A copy in this process of pages that lie on several ranks."""
        count = len(slots.pages)
        arrays = tuple(np.empty((count, size), np.uint8) for size in self._page_bytes[slots.group])
        for rank, (indices, pages) in parts.items():
            copies = self._ranks[rank].copy(slots.group, pages)
            for array, copy in zip(arrays, copies, strict=True):
                array[indices] = np.frombuffer(copy, np.uint8).reshape(len(pages), -1)
        return PageSlots(arrays, tuple(range(count)))


def _now() -> bool:
    return True
