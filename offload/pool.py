"""The device's memory for KV blocks: pages, who holds them, which cached one leaves first.

A `BlockPool` holds one uint8 tensor per layer, all with the same number of pages; page p of every
layer together is one block. A page is *free*, *held* (refs > 0), or *cached*: unheld, but still
findable by its key until its room is needed. Page 0 is never given out: it is all zeros and
stands wherever a rectangular batch has nothing to point at.
"""

import heapq
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from offload.key import BlockKey

NO_PAGE = 0


@dataclass(slots=True)
class KVBlock:
    """One page index of a pool and what it holds."""

    page: int
    refs: int = 0
    key: BlockKey | None = None


class BlockPool:
    def __init__(self, *, page_bytes: Sequence[int], num_pages: int, device: torch.device) -> None:
        """`page_bytes`: one per layer. `num_pages` includes page 0."""
        assert num_pages >= 2, num_pages
        self.num_pages = num_pages
        self.page_bytes = tuple(page_bytes)
        self.pages = tuple(_zeros(num_pages, size, device) for size in page_bytes)
        self._blocks = [KVBlock(page) for page in range(num_pages)]
        self._free = list(range(1, num_pages))  # a heap: low pages first, so chains stay contiguous
        self._by_key: dict[BlockKey, KVBlock] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()  # oldest first
        self._superseded: OrderedDict[int, None] = OrderedDict()  # cached, but leave before those
        self.evicted = 0  # cached blocks that left for want of room, so far

    @property
    def capacity(self) -> int:
        return self.num_pages - 1

    @property
    def held(self) -> int:
        return self.capacity - self.available

    @property
    def available(self) -> int:
        """Pages that `allocate` can give: free ones and cached ones."""
        return len(self._free) + self.cached

    @property
    def cached(self) -> int:
        """Pages that hold a block which nobody uses."""
        return len(self._cached) + len(self._superseded)

    def allocate(self, count: int) -> list[int]:
        """`count` pages with one reference each; drops cached blocks as needed."""
        assert count <= self.available, f"{count} pages wanted, {self.available} available"
        pages = sorted(self._take() for _ in range(count))  # neighbours are read in place
        for page in pages:
            self._blocks[page].refs = 1
        return pages

    def lookup(self, key: BlockKey) -> int | None:
        block = self._by_key.get(key)
        return None if block is None else block.page

    def acquire(self, pages: Iterable[int]) -> None:
        for page in pages:
            block = self._blocks[page]
            if block.refs == 0:
                assert block.key is not None, f"acquired a free page: {block}"
                self._cached.pop(page, None)
                self._superseded.pop(page, None)
            block.refs += 1

    def release(self, pages: Sequence[int]) -> None:
        """Give back one reference each; `pages` in chain order: leaves leave before parents."""
        self._release(pages, self._cached)

    def supersede(self, pages: Sequence[int]) -> None:
        """As `release`, for pages that are cached only while nothing better needs the room."""
        self._release(pages, self._superseded)

    def publish(self, page: int, key: BlockKey) -> None:
        """Make a sealed page findable. Another page that already has the key keeps it."""
        block = self._blocks[page]
        assert block.refs > 0 and block.key is None, f"published twice or unheld: {block}"
        if key not in self._by_key:
            block.key = key
            self._by_key[key] = block

    def forget(self, pages: Iterable[int]) -> int:
        """Drop the given pages from the cache where nobody holds them; how many were dropped."""
        dropped = 0
        for page in pages:
            block = self._blocks[page]
            if block.refs == 0 and block.key is not None:
                self._cached.pop(page, None)
                self._superseded.pop(page, None)
                self._drop(block)
                heapq.heappush(self._free, page)
                dropped += 1
        return dropped

    def _release(self, pages: Sequence[int], resting: OrderedDict[int, None]) -> None:
        for page in reversed(pages):
            block = self._blocks[page]
            assert block.refs > 0, f"released twice: {block}"
            block.refs -= 1
            if block.refs == 0:
                if block.key is None:
                    heapq.heappush(self._free, page)
                else:
                    resting[page] = None

    def _take(self) -> int:
        if self._free:
            return heapq.heappop(self._free)
        resting = self._superseded or self._cached
        page, _ = resting.popitem(last=False)
        self._drop(self._blocks[page])
        self.evicted += 1
        return page

    def _drop(self, block: KVBlock) -> None:
        assert block.key is not None
        del self._by_key[block.key]
        block.key = None


def _zeros(num_pages: int, page_bytes: int, device: torch.device) -> Tensor:
    if device.type == "cpu":
        # calloc: a page costs memory only once it is used; numpy asks for huge pages
        return torch.from_numpy(np.zeros((num_pages, page_bytes), dtype=np.uint8))
    return torch.zeros(num_pages, page_bytes, dtype=torch.uint8, device=device)
