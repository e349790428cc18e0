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
    """Pages of one layer group on their way to or from the tiers."""

    def outgoing(self, pages: Sequence[int]) -> tuple[Slots, Callable[[], bool]]:
        """The contents of `pages`, and whether they may be read yet."""
        ...

    def incoming(self, pages: Sequence[int]) -> Slots:
        """Where a tier puts what is to stand in `pages`."""
        ...

    def arrived(self, slots: Slots, pages: Sequence[int]) -> None:
        """Everything of `incoming(pages)` is in its slots."""
        ...

    def fetch(self, layer: int, pages: Sequence[int], read: Callable[[Slots], bool]) -> bool:
        """Let `read` fill these pages of one layer, a number within the group; what it returned."""
        ...


class PageTransfer:
    """Pages of one pool of this process on their way to or from the tiers."""

    def __init__(self, pool: BlockPool, *, staged: bool) -> None:
        """`staged`: through copies, as a pool needs whose memory the tiers cannot address."""
        self._pool = pool
        self._staged = staged
        self._in_place: tuple[NDArray[np.uint8], ...] = ()
        if not staged:
            self._in_place = tuple(layer.numpy() for layer in pool.pages)

    def outgoing(self, pages: Sequence[int]) -> tuple[PageSlots, Callable[[], bool]]:
        if not self._staged:
            return PageSlots(self._in_place, tuple(pages)), _now
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
    """Whether all has been done that this thread has asked of the device until now."""
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))  # by default: of the current device, not this
    query: Callable[[], bool] = event.query
    return query


def _now() -> bool:
    return True
