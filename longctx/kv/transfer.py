"""Where a tier finds the pages of a block: in the pool itself, or in a copy on its way.

On a CPU the pool is ordinary memory, so the tiers' threads read and write its pages in place. A
GPU's pages pass through pinned memory, copied in the order of the engine's own stream: what a step
wrote is complete before it is copied out, what is copied in is there before a step reads it.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

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

    def __init__(self, pool: BlockPool, *, staged: bool) -> None:
        """`staged`: pages pass through copies, since the tiers cannot address the pool's memory."""
        self._pool = pool
        self._staged = staged
        self._in_place: tuple[NDArray[np.uint8], ...] = ()
        if not staged:
            self._in_place = tuple(layer.numpy() for layer in pool.pages)

    def outgoing(self, pages: Sequence[int]) -> tuple[PageSlots, Callable[[], bool]]:
        if not self._staged:
            return PageSlots(self._in_place, tuple(pages)), _now
        return self.copies(pages)

    def copies(self, pages: Sequence[int]) -> tuple[PageSlots, Callable[[], bool]]:
        copies, ready = [], _now
        for layer in self._pool.pages:
            copy = self._staging(len(pages), layer)
            copy.copy_(layer[torch.tensor(pages, device=layer.device)], non_blocking=True)
            copies.append(copy.numpy())
        if self._pool.pages[0].is_cuda:
            ready = _copied(self._pool.pages[0].device)
        return PageSlots(tuple(copies), tuple(range(len(pages)))), ready

    def incoming(self, pages: Sequence[int]) -> PageSlots:
        if not self._staged:
            return PageSlots(self._in_place, tuple(pages))
        copies = (self._staging(len(pages), layer).numpy() for layer in self._pool.pages)
        return PageSlots(tuple(copies), tuple(range(len(pages))))

    def arrived(self, slots: Slots, pages: Sequence[int]) -> None:
        if self._staged:
            assert isinstance(slots, PageSlots), slots
            for layer, array in zip(self._pool.pages, slots.arrays, strict=True):
                index = torch.tensor(pages, device=layer.device)
                layer[index] = torch.from_numpy(array).to(layer.device, non_blocking=True)

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


def _copied(device: torch.device) -> Callable[[], bool]:
    """Return a callable: has the device done all that this thread asked of it until now?"""
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))  # by default: of the current device, not this
    query: Callable[[], bool] = event.query
    return query


def _now() -> bool:
    return True
