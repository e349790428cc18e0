"""The device's memory for KV blocks: which pages are in use, and which cached one leaves first.

A `BlockPool` holds one uint8 tensor per layer, all with the same number of pages; page p of every
layer together is one block. A page is in one of three states:

    free      nobody holds it, and it has no key
    held      refs > 0: a sequence computes or reads it
    cached    nobody holds it, but its key finds it until its room is needed

Page 0 is never given out. It is all zeros, and a rectangular batch points at it where a sequence is
shorter than the others.

One pool may account for several ranks whose pools are alike. With `pages_per_rank=100`, page 207 is
page 7 of rank 2; only the first rank's pages lie in this process.
"""

import heapq
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from offload.descent import Stem, descendants
from offload.key import BlockKey

NO_PAGE = 0


@dataclass(slots=True)
class KVBlock:
    """One page of a pool: how many hold it, and the key that finds it once it is sealed.

    With the key come the block's parent and sources, as in a `BlockRun`.
    """

    page: int
    refs: int = 0
    key: BlockKey | None = None
    parent: BlockKey | None = None
    sources: tuple[str, ...] = ()


class _Share:
    """The pages of one rank that nobody holds."""

    def __init__(self, first_page: int, num_pages: int) -> None:
        # A heap that gives low pages first, so that chains lie side by side and are read in place
        self.free = list(range(first_page + 1, first_page + num_pages))
        self.cached: OrderedDict[int, None] = OrderedDict()  # oldest first
        self.superseded: OrderedDict[int, None] = OrderedDict()  # cached; all leave before those

    @property
    def available(self) -> int:
        return len(self.free) + len(self.cached) + len(self.superseded)

    def drop(self, page: int) -> None:
        self.cached.pop(page, None)
        self.superseded.pop(page, None)


class BlockPool:
    """Gives out pages, finds sealed ones by key, and evicts cached ones when it runs out.

    The life of a page: `allocate`, then `publish` once its block is sealed, `acquire` for each
    further sequence that uses it, `release` by each of them. Whoever got a page from `allocate` or
    `acquire` gives it back exactly once, by `release` or `supersede`; a mistake there is a bug, and
    asserts.

    Only the engine's thread calls it. Every call costs time proportional to the pages it is given,
    but for the heap's logarithm.
    """

    def __init__(
        self,
        *,
        page_bytes: Sequence[int],
        num_pages: int,
        device: torch.device,
        ranks: int = 1,
        staging_pages: int = 0,
    ) -> None:
        """Allocate the pages of this process. `page_bytes` has one number for each layer.

        Each rank has `num_pages`, page 0 among them, and behind these `staging_pages` that are
        never given out.
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
        """How many pages `allocate` can give, on all ranks: the free ones and the cached ones."""
        return sum(share.available for share in self._shares)

    @property
    def available_by_rank(self) -> list[int]:
        """`available`, for each rank."""
        return [share.available for share in self._shares]

    @property
    def cached(self) -> int:
        """How many pages hold a block which nobody uses."""
        return sum(len(share.cached) + len(share.superseded) for share in self._shares)

    def allocate(self, count: int, *, rank: int = 0) -> list[int]:
        """Return `count` pages of a rank with one reference each, in ascending order.

        Cached blocks leave as needed. There must be so many `available`.
        """
        share = self._shares[rank]
        assert count <= share.available, f"{count} pages wanted, {share.available} available"
        pages = sorted(self._take(share) for _ in range(count))  # neighbors are read in place
        for page in pages:
            self._blocks[page].refs = 1
        return pages

    def lookup(self, key: BlockKey) -> int | None:
        """Return the page that has the key, held or cached."""
        block = self._by_key.get(key)
        return None if block is None else block.page

    def acquire(self, pages: Iterable[int]) -> None:
        """Add one reference to each page; each is held already, or cached."""
        for page in pages:
            block = self._blocks[page]
            if block.refs == 0:
                assert block.key is not None, f"acquired a free page: {block}"
                self._share(page).drop(page)
            block.refs += 1

    def release(self, pages: Sequence[int]) -> None:
        """Give back one reference to each of `pages`, which are in the order of their chain.

        Those that nobody holds any more are cached, or free if they have no key. A chain's last
        page leaves first: without its beginning the rest of a chain is of no use.
        """
        for page in self._give_back(pages):
            self._share(page).cached[page] = None

    def supersede(self, pages: Sequence[int]) -> None:
        """Give back one reference as `release` does; the pages leave before all others.

        It is for blocks that are seldom found again: those between two checkpoints that a sliding
        window has passed.
        """
        for page in self._give_back(pages):
            self._share(page).superseded[page] = None

    def publish(
        self,
        page: int,
        key: BlockKey,
        *,
        parent: BlockKey | None = None,
        sources: tuple[str, ...] = (),
    ) -> None:
        """Let `key` find a sealed page. Another page that already has the key keeps it.

        `parent` is the key before it, and `sources` are as in a `BlockRun`: `erase` needs both.
        """
        block = self._blocks[page]
        assert block.refs > 0 and block.key is None, f"published twice or unheld: {block}"
        if key not in self._by_key:
            block.key, block.parent, block.sources = key, parent, sources
            self._by_key[key] = block

    def forget(self, pages: Iterable[int]) -> int:
        """Free those of the pages that are cached; return how many were."""
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

    def erase(
        self, source: str | None, keys: Iterable[BlockKey], is_owned: Callable[[BlockKey], bool]
    ) -> int:
        """Forget what stems from a source or follows one of these keys; return how many pages.

        What is owned stays (`descendants`). A page that is held is not found any more, and is free
        once nobody holds it.
        """
        stems = [Stem((key,), block.parent, block.sources) for key, block in self._by_key.items()]
        found = descendants(stems, source, keys, is_owned)
        pages = [block.page for key in found if (block := self._by_key.get(key)) is not None]
        for page in pages:
            if not self.forget([page]):
                self._drop(self._blocks[page])
        return len(pages)

    def _share(self, page: int) -> _Share:
        return self._shares[page // self.pages_per_rank]

    def _give_back(self, pages: Sequence[int]) -> Iterator[int]:
        """Take back one reference to each page, from the last on; yield those to be cached."""
        for page in reversed(pages):
            block = self._blocks[page]
            assert block.refs > 0, f"released twice: {block}"
            block.refs -= 1
            if block.refs == 0:
                if block.key is None:
                    heapq.heappush(self._share(page).free, page)
                else:
                    yield page

    def _take(self, share: _Share) -> int:
        if share.free:
            return heapq.heappop(share.free)
        oldest_first = share.superseded or share.cached
        page, _ = oldest_first.popitem(last=False)
        self._drop(self._blocks[page])
        self.evicted += 1
        return page

    def _drop(self, block: KVBlock) -> None:
        assert block.key is not None
        del self._by_key[block.key]
        block.key, block.parent, block.sources = None, None, ()


def _zeros(num_pages: int, page_bytes: int, device: torch.device) -> Tensor:
    if device.type == "cpu":
        # calloc: a page costs memory only once it is used; numpy asks for huge pages
        return torch.from_numpy(np.zeros((num_pages, page_bytes), dtype=np.uint8))
    return torch.zeros(num_pages, page_bytes, dtype=torch.uint8, device=device)
