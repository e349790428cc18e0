"""Who moves the bytes of extents between files and pages.

The tier decides what is written where, and when; an `ExtentIO` does it for the slots that it knows.
`LocalExtents` is for pages in this process. Pages of other processes are written and read by those
processes themselves, so that their bytes never travel (`longctx/ring/pages.py`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from offload.block_run import BlockRun, PageSlots, Slots
from offload.disk import extent_file
from offload.disk.extent_header import ExtentHeader, ExtentMeta, ExtentUnreadable
from offload.disk.filesystem import FileSystem
from offload.disk.shuffle import PageShuffle


@dataclass(frozen=True, slots=True)
class UnwrittenExtent:
    """An extent whose size is known, and whose file can be written. `write` raises OSError."""

    header: ExtentHeader
    write: Callable[[Path], None]


class ExtentIO(Protocol):
    """Moves pages. Writes come one at a time; reads come from any thread, also during a write."""

    def pack(self, meta: ExtentMeta, slots: Slots) -> UnwrittenExtent:
        """Prepare an extent of these pages; the caller leaves them alone until it is written."""
        ...

    def read(self, path: Path, run: BlockRun, blocks: Sequence[int], slots: Slots) -> list[bool]:
        """Fill `slots` with blocks of the extent, by index; return which of them are whole.

        Raises ExtentUnreadable (also if the file does not hold `run`), LayoutDiffers, OSError.
        """
        ...


class LocalExtents:
    """An `ExtentIO` for `PageSlots`."""

    def __init__(
        self, files: FileSystem, shuffle: PageShuffle | None = None, *, compress: bool = False
    ) -> None:
        self._files, self._shuffle, self._compress = files, shuffle or PageShuffle(), compress

    def pack(self, meta: ExtentMeta, slots: Slots) -> UnwrittenExtent:
        assert isinstance(slots, PageSlots), slots
        packed = extent_file.pack(meta, slots, shuffle=self._shuffle if self._compress else None)
        return UnwrittenExtent(
            packed.header, lambda path: extent_file.write(self._files, path, packed)
        )

    def read(self, path: Path, run: BlockRun, blocks: Sequence[int], slots: Slots) -> list[bool]:
        assert isinstance(slots, PageSlots), slots
        descriptor = self._files.open(path)
        try:
            header = extent_file.read_header(self._files, descriptor)
            if header.meta.run != run:
                raise ExtentUnreadable("holds other blocks than it did")
            return extent_file.read_pages(
                self._files, descriptor, header, blocks, slots, self._shuffle
            )
        finally:
            self._files.close(descriptor)
