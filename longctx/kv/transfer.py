"""Where a tier finds the pages of a block: in the pool itself, or in a copy on its way.

On a CPU the pool is ordinary memory, so the tiers' threads read and write its pages in place. A
GPU's pages pass through pinned memory, on a stream of their own beside the steps
(`copy_streams.py`): what a step wrote is complete before it is copied out, what is copied in is
there before a step reads it.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longctx.kv.copy_streams import CopyStreams, streams_for
from offload.block_pool import BlockPool
from offload.block_run import PageSlots, Slots


class Transfer(Protocol):
    """Moves pages of one layer group to and from the tiers; called by the engine's thread."""

    def outgoing(self, pages: Sequence[int]) -> tuple[Slots, Callable[[], bool]]:
        """Return where the contents of `pages` can be read, and a callable: may they be yet?"""
        ...

    def copies(self, pages: Sequence[int]) -> tuple[Slots, Callable[[], bool]] | None:
        """Return the same of copies, whatever is written into `pages` from now on; None where
        the pages do not lie in this process."""
        ...

    def incoming(self, pages: Sequence[int]) -> Slots:
        """Return where a tier has to write what belongs into `pages`."""
        ...

    def arrived(self, slots: Slots, pages: Sequence[int]) -> None:
        """Move what a tier has written into the slots of `incoming(pages)` into the pages."""
        ...

    def fetch(self, layer: int, pages: Sequence[int], read: Callable[[Slots], bool]) -> bool:
        """Let `read` fill these pages of one layer (its index in the group); return its result."""
        ...


class PageTransfer:
    """Moves the pages of a pool in this process: in place, or through copies in pinned memory."""

    def __init__(
        self, pool: BlockPool, *, staged: bool, streams: CopyStreams | None = None
    ) -> None:
        """`staged`: pages pass through copies, since the tiers cannot address the pool's memory.

        `streams` are those of the pool's device by default.
        """
        self._pool = pool
        self._staged = staged
        self._in_place: tuple[NDArray[np.uint8], ...] = ()
        self._streams = streams or streams_for(pool.pages[0].device)
        if not staged:
            self._in_place = tuple(layer.numpy() for layer in pool.pages)

    def outgoing(self, pages: Sequence[int]) -> tuple[PageSlots, Callable[[], bool]]:
        """As `Transfer.outgoing`; the pages are held until the tiers have them."""
        if not self._staged:
            return PageSlots(self._in_place, tuple(pages)), _now
        return self._copied_out(pages)

    def copies(self, pages: Sequence[int]) -> tuple[PageSlots, Callable[[], bool]]:
        slots, ready = self._copied_out(pages)
        self._streams.wait_for_copies()  # a step may write into the pages
        return slots, ready

    def _copied_out(self, pages: Sequence[int]) -> tuple[PageSlots, Callable[[], bool]]:
        staged = [self._staging(len(pages), layer) for layer in self._pool.pages]

        def gather() -> None:
            for copy, layer in zip(staged, self._pool.pages, strict=True):
                copy.copy_(layer[_index(pages, layer)], non_blocking=True)

        self._streams.wait_for_steps()  # which may be sealing into these pages
        self._streams.copy(gather)
        slots = PageSlots(tuple(copy.numpy() for copy in staged), tuple(range(len(pages))))
        return slots, self._streams.copied()

    def incoming(self, pages: Sequence[int]) -> PageSlots:
        if not self._staged:
            return PageSlots(self._in_place, tuple(pages))
        copies = (self._staging(len(pages), layer).numpy() for layer in self._pool.pages)
        return PageSlots(tuple(copies), tuple(range(len(pages))))

    def arrived(self, slots: Slots, pages: Sequence[int]) -> None:
        if not self._staged:
            return
        assert isinstance(slots, PageSlots), slots
        arrays = slots.arrays

        def scatter() -> None:
            for layer, array in zip(self._pool.pages, arrays, strict=True):
                there = torch.from_numpy(array).to(layer.device, non_blocking=True)
                layer[_index(pages, layer)] = there

        self._streams.wait_for_steps()  # which may be reading what the pages held before
        self._streams.copy(scatter)
        self._streams.wait_for_copies()  # a step will read what they hold now

    def fetch(self, layer: int, pages: Sequence[int], read: Callable[[PageSlots], bool]) -> bool:
        if not self._staged:
            return read(PageSlots((self._in_place[layer],), tuple(pages), first_layer=layer))
        target = self._pool.pages[layer]
        staging = self._staging(len(pages), target)
        there = read(PageSlots((staging.numpy(),), tuple(range(len(pages))), first_layer=layer))
        target[torch.tensor(pages, device=target.device)] = staging.to(target.device)
        return there

    def _staging(self, pages: int, layer: Tensor) -> Tensor:
        shape = (pages, layer.shape[1])
        return torch.empty(shape, dtype=torch.uint8, pin_memory=layer.is_cuda)


def _index(pages: Sequence[int], layer: Tensor) -> Tensor:
    return torch.tensor(pages, device=layer.device)


def _now() -> bool:
    return True
