"""What travels between tiers: a `BlockRun` says which blocks, `Slots` say where their pages lie."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from offload.key import BlockKey

EXTENT_BLOCKS = 16  # blocks of one extent: the unit of disk I/O


@dataclass(frozen=True, slots=True)
class BlockRun:
    """Consecutive blocks of one chain in one layer group.

    `first_block` is the index of the first one in its chain, `parent` is the key before it. Where
    the run begins the chain, `parent` is the namespace. `sources` are the ids of the documents and
    modules of which the prompt had text by the end of the run: when one of them is deleted, so are
    these blocks.
    """

    namespace: BlockKey
    group: int
    first_block: int
    parent: BlockKey
    keys: tuple[BlockKey, ...]
    sources: tuple[str, ...] = ()

    def stretch(self, begin: int, end: int) -> "BlockRun":
        """Return its blocks from index `begin` to before `end`, as a run."""
        return replace(
            self,
            first_block=self.first_block + begin,
            parent=self.keys[begin - 1] if begin else self.parent,
            keys=self.keys[begin:end],
        )


class Slots(Protocol):
    """Where the pages of some blocks lie, in a form that an `ExtentIO` knows.

    Whoever passes slots on leaves their rows alone until the transfer has ended.
    """

    @property
    def pages(self) -> tuple[int, ...]:
        """The number of each block's page, in the order of the blocks."""
        ...

    @property
    def block_bytes(self) -> int:
        """The size of one block: of its pages in all layers together."""
        ...

    def pick(self, indices: Sequence[int]) -> Self:
        """Return the slots of the blocks with these indices, in that order."""
        ...

    def rows(self, begin: int, end: int) -> Self:
        """Return the slots of the blocks from `begin` to before `end`."""
        ...


@dataclass(frozen=True, slots=True)
class PageSlots:
    """Slots in this process: the rows `pages` of one array [pages, page_bytes] for each layer.

    To read only some layers of the group, give the arrays of these alone; they follow each other
    from `first_layer` on. So layers 4 and 5 of a group of 8 are two arrays and `first_layer=4`.
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
