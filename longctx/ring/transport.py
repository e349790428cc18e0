"""The seam between ranks: tensors from one to another, while both go on computing.

`VirtualTransport` joins ranks that are threads of one process: for tests, and to see what the
engine does on many ranks without having them.
"""

import queue
import threading
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from longctx.errors import PeerLost


class Transfer(Protocol):
    def wait(self) -> None:
        """What was to be received is there, and what was sent may be overwritten.

        Raises PeerLost.
        """
        ...


class Transport(Protocol):
    """How one rank reaches the others."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    @property
    def bytes_sent(self) -> int:
        """By this rank, ever."""
        ...

    def begin(
        self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]
    ) -> Transfer:
        """Start to send tensors to ranks, and to receive into tensors from ranks.

        Tensors are contiguous. Between two ranks the n-th one received is the n-th one sent, of the
        same size and type. Nobody touches them until `wait` has returned. Raises PeerLost.
        """
        ...


class VirtualLinks:
    """What joins the ranks of one process: a queue from each to each."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.lost = threading.Event()
        self._queues = [[queue.SimpleQueue[Tensor]() for _ in range(size)] for _ in range(size)]

    def between(self, source: int, target: int) -> "queue.SimpleQueue[Tensor]":
        return self._queues[source][target]


class VirtualTransport:
    def __init__(self, links: VirtualLinks, rank: int) -> None:
        self._links = links
        self.rank = rank
        self.size = links.size
        self.bytes_sent = 0

    def begin(
        self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]
    ) -> "_VirtualTransfer":
        for target, tensor in sends:
            assert target != self.rank and tensor.is_contiguous()
            self._links.between(self.rank, target).put(tensor.clone())
            self.bytes_sent += tensor.nbytes
        return _VirtualTransfer(self._links, self.rank, receives)


class _VirtualTransfer:
    def __init__(
        self, links: VirtualLinks, rank: int, receives: Sequence[tuple[int, Tensor]]
    ) -> None:
        self._links = links
        self._rank = rank
        self._receives = receives

    def wait(self) -> None:
        for source, into in self._receives:
            into.copy_(self._next(source).view(into.shape))
        self._receives = ()

    def _next(self, source: int) -> Tensor:
        arrived = self._links.between(source, self._rank)
        while not self._links.lost.is_set():
            try:
                return arrived.get(timeout=0.1)
            except queue.Empty:
                continue
        raise PeerLost("another rank has ended")

