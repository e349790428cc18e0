"""What travels between tiers: consecutive blocks of one chain, and where their pages lie."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from offload.key import BlockKey

EXTENT_BLOCKS = 16  # blocks of one extent: the unit of disk I/O


@dataclass(frozen=True, slots=True)
class BlockRun:
    """Consecutive blocks of one chain in one layer group.

    `first_block` is the index of the first one in its chain, `parent` the key before it: the
    namespace where it is the chain's first.
    """

    namespace: BlockKey
    group: int
    first_block: int
    parent: BlockKey
    keys: tuple[BlockKey, ...]


class Slots(Protocol):
    """Where the pages of some blocks lie, in a form that an `ExtentIO` knows."""

    @property
    def pages(self) -> tuple[int, ...]: ...

    @property
    def block_bytes(self) -> int:
        """Of one block: its pages in all layers."""
        ...

    def pick(self, indices: Sequence[int]) -> Self:
        """The slots of some blocks."""
        ...

    def rows(self, begin: int, end: int) -> Self:
        """The slots of the blocks from `begin` to before `end`."""
        ...


@dataclass(frozen=True, slots=True)
class PageSlots:
    """Slots of this process: rows `pages` of `arrays`, which are [pages, page_bytes], one of each
    layer of the group.

    To read only some layers: arrays for these alone, which follow each other from `first_layer`.

    Whoever passes slots on keeps these rows as they are until the transfer has ended.
    """

    arrays: tuple[NDArray[np.uint8], ...]
    pages: tuple[int, ...]
    first_layer: int = 0

    @property
    def block_bytes(self) -> int:
        return sum(array.shape[1] for array in self.arrays)

    def pick(self, indices: Sequence[int]) -> "PageSlots":
        pages = tuple(self.pages[index] for index in indices)
        return PageSlots(self.arrays, pages, self.first_layer)

    def rows(self, begin: int, end: int) -> "PageSlots":
        return PageSlots(self.arrays, self.pages[begin:end], self.first_layer)
