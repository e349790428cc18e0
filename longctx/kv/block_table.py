"""What a sequence sees in one layer group: its block table."""

import numpy as np
from numpy.typing import NDArray

from longctx.kv.block_entry import ENTRY_COLUMNS, PAGE
from longctx.kv.layout import PLAIN, Layout


class BlockTable:
    """What a sequence sees in one layer group: a growing array of entries, in reading order.

    Its own sealed blocks are appended one after the other; what it reuses is there from the start.
    """

    def __init__(
        self, layout: Layout = PLAIN, entries: NDArray[np.int64] | None = None, blocks: int = 0
    ) -> None:
        """`entries`: those of the first `blocks` own blocks, and of all that is reused."""
        self.blocks = blocks
        self._layout = layout
        self._length = 0 if entries is None else len(entries)
        self._entries = np.zeros((self._length + 16, ENTRY_COLUMNS), dtype=np.int64)
        if entries is not None:
            self._entries[: self._length] = entries

    @property
    def entries(self) -> NDArray[np.int64]:
        """Return [entries, ENTRY_COLUMNS], a view."""
        return self._entries[: self._length]

    def pages(self, begin: int, end: int) -> list[int]:
        """Return the pages of own blocks `begin` to `end`."""
        pages: list[int] = self._entries[self._layout.own(begin, end), PAGE].tolist()
        return pages

    def append(self, page: int, *, rows: int, first_position: int) -> None:
        """Enter the sequence's next own block."""
        at = self._layout.entry(self.blocks)
        if at >= len(self._entries):
            grown = np.zeros((2 * at, ENTRY_COLUMNS), dtype=np.int64)
            grown[: self._length] = self._entries[: self._length]
            self._entries = grown
        self._entries[at] = (page, 0, rows, first_position, 0)
        self._length = max(self._length, at + 1)
        self.blocks += 1

    def fork(self) -> "BlockTable":
        """Copy the table: the same pages, which the copy's owner has to acquire."""
        return BlockTable(self._layout, self.entries, self.blocks)
