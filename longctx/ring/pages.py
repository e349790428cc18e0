"""How the offload tiers reach pages of other ranks: each rank writes and reads files of its own.

One store, in the leader, decides which extent goes where and when; `RingExtents` tells the rank
that owns the pages to move the bytes, so they are not sent between ranks. What is on disk is the
same for any number of ranks.
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

COPY_POLL_SECONDS = 0.0005  # between two checks whether a GPU has copied pages out


class RankPages(Protocol):
    """The pages of one rank, by the rank's own numbers.

    Calls come from any thread and return when the files are written or read.
    """

    def write(self, path: Path, meta: ExtentMeta, pages: Sequence[int]) -> None:
        """Write a new extent file, durable when this returns. Raises OSError, PeerLost."""
        ...

    def read(
        self, path: Path, run: BlockRun, blocks: Sequence[int], pages: Sequence[int]
    ) -> list[bool]:
        """Read blocks of an extent file into pages, as `ExtentIO.read` does.

        Returns which blocks were whole. Raises PeerLost beside the errors of `ExtentIO.read`.
        """
        ...

    def copy(self, group: int, pages: Sequence[int]) -> list[bytes]:
        """Return the contents of the pages: per layer, one page after the other.

        Raises PeerLost.
        """
        ...


class LocalPages:
    """The `RankPages` of a rank in this process."""

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
            time.sleep(COPY_POLL_SECONDS)
        return slots


@dataclass(frozen=True, slots=True)
class RingSlots:
    """`Slots` that are pages of one layer group by the leader's numbers, on whatever rank."""

    group: int
    pages: tuple[int, ...]
    block_bytes: int

    def pick(self, indices: Sequence[int]) -> Self:
        return replace(self, pages=tuple(self.pages[index] for index in indices))

    def rows(self, begin: int, end: int) -> Self:
        return replace(self, pages=self.pages[begin:end])


class RingTransfer:
    """A `Transfer` of one layer group over all ranks, which leaves the bytes where they are."""

    def __init__(self, group: int, block_bytes: int) -> None:
        self._group, self._block_bytes = group, block_bytes

    def outgoing(self, pages: Sequence[int]) -> tuple[RingSlots, Callable[[], bool]]:
        return self.incoming(pages), _is_ready

    def copies(self, pages: Sequence[int]) -> None:
        """Copy nothing: each rank's memory is its own."""
        return

    def incoming(self, pages: Sequence[int]) -> RingSlots:
        return RingSlots(self._group, tuple(pages), self._block_bytes)

    def arrived(self, slots: Slots, pages: Sequence[int]) -> None:
        """Do nothing: the rank that read the pages has put them into place."""

    def fetch(self, layer: int, pages: Sequence[int], read: Callable[[Slots], bool]) -> bool:
        """Never called: many ranks do not stream."""
        raise AssertionError("contexts larger than the device are not streamed through many ranks")


class RingExtents:
    """An `ExtentIO` for `RingSlots`; like the tiers that call it, safe from any thread."""

    def __init__(self, memory: KVMemory, ranks: Sequence[RankPages]) -> None:
        """`memory`: the leader's, which accounts for the pages of all. `ranks[r]`: rank r's."""
        self._ranks = ranks
        self._page_bytes = [pool.page_bytes for pool in memory.packed]
        self._pages_per_rank = [pool.pages_per_rank for pool in memory.packed]
        self._replicated = [group.window is not None for group in memory.groups]
        self._local = LocalExtents(FileSystem())

    def pack(self, meta: ExtentMeta, slots: Slots) -> UnwrittenExtent:
        """As `ExtentIO.pack`, but without checksums: the rank that owns the pages adds them."""
        assert isinstance(slots, RingSlots), slots
        parts = self._parts(slots)
        if len(parts) > 1:  # two prompts have computed parts of one chain
            return self._local.pack(meta, self._gather_pages(slots, parts))
        ((rank, (_, pages)),) = parts.items()
        page_bytes = self._page_bytes[meta.run.group]
        table = page_table(len(page_bytes), len(meta.run.keys))
        table["stored_bytes"] = np.array(page_bytes)[:, None]
        header = ExtentHeader(meta, page_bytes, table)
        return UnwrittenExtent(header, lambda path: self._ranks[rank].write(path, meta, pages))

    def read(self, path: Path, run: BlockRun, blocks: Sequence[int], slots: Slots) -> list[bool]:
        """As `ExtentIO.read`: each rank reads the blocks whose pages are its own.

        Every rank reads all blocks of window layers; those count as whole that are so everywhere.
        """
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
        """Return, by rank, the indices of the slots there and the rank's own pages for them.

        With 1,000 pages a rank, pages 2005, 7 and 2009 are {2: ([0, 2], [5, 9]), 0: ([1], [7])}.
        Window pages are the same everywhere, so rank 0 has them all.
        """
        if self._replicated[slots.group]:
            return {0: (list(range(len(slots.pages))), list(slots.pages))}
        parts: dict[int, tuple[list[int], list[int]]] = {}
        for index, page in enumerate(slots.pages):
            rank, own = divmod(page, self._pages_per_rank[slots.group])
            indices, pages = parts.setdefault(rank, ([], []))
            indices.append(index)
            pages.append(own)
        return parts

    def _gather_pages(
        self, slots: RingSlots, parts: dict[int, tuple[list[int], list[int]]]
    ) -> PageSlots:
        """Copy pages of several ranks into this process."""
        count = len(slots.pages)
        arrays = tuple(np.empty((count, size), np.uint8) for size in self._page_bytes[slots.group])
        for rank, (indices, pages) in parts.items():
            copies = self._ranks[rank].copy(slots.group, pages)
            for array, copy in zip(arrays, copies, strict=True):
                array[indices] = np.frombuffer(copy, np.uint8).reshape(len(pages), -1)
        return PageSlots(arrays, tuple(range(count)))


def _is_ready() -> bool:
    return True  # nothing copies pages out before a step has ended on every rank
