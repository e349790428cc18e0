"""The device's memory for KV blocks: pages, who holds them, which cached one leaves first.

A `BlockPool` holds one uint8 tensor per layer, all with the same number of pages; page p of every
layer together is one block. A page is *free*, *held* (refs > 0), or *cached*: unheld, but still
findable by its key until its room is needed. Page 0 is never given out: it is all zeros and
stands wherever a rectangular batch has nothing to point at.

One pool may keep the books of several ranks whose pools are alike: then a page's number is that of
its rank times `pages_per_rank`, plus its place there, and only the first rank's pages lie here.
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


class _Share:
    """One rank's pages that nobody holds."""

    def __init__(self, first_page: int, num_pages: int) -> None:
        # A heap: low pages first, so chains stay contiguous.
        self.free = list(range(first_page + 1, first_page + num_pages))
        self.cached: OrderedDict[int, None] = OrderedDict()  # oldest first
        self.superseded: OrderedDict[int, None] = OrderedDict()  # cached, but leave before those

    @property
    def available(self) -> int:
        return len(self.free) + len(self.cached) + len(self.superseded)

    def drop(self, page: int) -> None:
        self.cached.pop(page, None)
        self.superseded.pop(page, None)


class BlockPool:
    def __init__(
        self,
        *,
        page_bytes: Sequence[int],
        num_pages: int,
        device: torch.device,
        ranks: int = 1,
        staging_pages: int = 0,
    ) -> None:
        """`page_bytes`: one per layer. `num_pages` of each rank, includes page 0.

        `staging_pages` more stand behind them on each rank and are never given out.
        """
        assert num_pages >= 2, num_pages
        self.ranks = ranks
        self.pages_per_rank = num_pages + staging_pages
        self.capacity = ranks * (num_pages - 1)
        self.staging = range(num_pages, self.pages_per_rank)
        self.page_bytes = tuple(page_bytes)
        self.pages = tuple(_zeros(self.pages_per_rank, size, device) for size in page_bytes)
        self._blocks = [KVBlock(page) for page in range(ranks * self.pages_per_rank)]
        self._by_key: dict[BlockKey, KVBlock] = {}
        self._shares = [_Share(rank * self.pages_per_rank, num_pages) for rank in range(ranks)]
        self.evicted = 0  # cached blocks that left for want of room, so far

    @property
    def num_pages(self) -> int:
        return len(self._blocks)

    @property
    def held(self) -> int:
        return self.capacity - self.available

    @property
    def available(self) -> int:
        """Pages that `allocate` can give: free ones and cached ones."""
        return sum(share.available for share in self._shares)

    @property
    def room(self) -> list[int]:
        """`available` of each rank."""
        return [share.available for share in self._shares]

    @property
    def cached(self) -> int:
        """Pages that hold a block which nobody uses."""
        return sum(len(share.cached) + len(share.superseded) for share in self._shares)

    def allocate(self, count: int, *, rank: int = 0) -> list[int]:
        """`count` pages with one reference each; drops cached blocks as needed."""
        share = self._shares[rank]
        assert count <= share.available, f"{count} pages wanted, {share.available} available"
        pages = sorted(self._take(share) for _ in range(count))  # neighbours are read in place
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
                self._share(page).drop(page)
            block.refs += 1

    def release(self, pages: Sequence[int]) -> None:
        """Give back one reference each; `pages` in chain order: leaves leave before parents."""
        self._release(pages, superseded=False)

    def supersede(self, pages: Sequence[int]) -> None:
        """As `release`, for pages that are cached only while nothing better needs the room."""
        self._release(pages, superseded=True)

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
                share = self._share(page)
                share.drop(page)
                self._drop(block)
                heapq.heappush(share.free, page)
                dropped += 1
        return dropped

    def _share(self, page: int) -> "_Share":
        return self._shares[page // self.pages_per_rank]

    def _release(self, pages: Sequence[int], *, superseded: bool) -> None:
        for page in reversed(pages):
            block = self._blocks[page]
            assert block.refs > 0, f"released twice: {block}"
            block.refs -= 1
            if block.refs == 0:
                share = self._share(page)
                if block.key is None:
                    heapq.heappush(share.free, page)
                elif superseded:
                    share.superseded[page] = None
                else:
                    share.cached[page] = None

    def _take(self, share: "_Share") -> int:
        if share.free:
            return heapq.heappop(share.free)
        resting = share.superseded or share.cached
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
