"""The seam between ranks: tensors from one to another, while both go on computing.

`VirtualTransport` joins ranks that are threads of one process: for tests, and to see what the
engine does on many ranks without having them.
"""

import queue
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from longctx.errors import PeerLost

LOOK_SECONDS = 0.1  # between two looks whether another rank has ended


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
        self._expected: list[deque[_Receive]] = [deque() for _ in range(links.size)]
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
        begun = [_Receive(source, into) for source, into in receives]
        for receive in begun:
            self._expected[receive.source].append(receive)
        return _VirtualTransfer(self, begun)

    def complete(self, receive: "_Receive") -> None:
        """Receive everything up to this one, in order."""
        while not receive.is_there:
            first = self._expected[receive.source].popleft()
            arrived = self._next(receive.source)
            assert arrived.nbytes == first.into.nbytes and arrived.dtype == first.into.dtype
            first.into.copy_(arrived.view(first.into.shape))
            first.is_there = True

    def _next(self, source: int) -> Tensor:
        arrived = self._links.between(source, self.rank)
        while not self._links.lost.is_set():
            try:
                return arrived.get(timeout=LOOK_SECONDS)
            except queue.Empty:
                continue
        raise PeerLost("another rank has ended")


@dataclass(slots=True)
class _Receive:
    source: int
    into: Tensor
    is_there: bool = False


class _VirtualTransfer:
    def __init__(self, transport: VirtualTransport, receives: Sequence[_Receive]) -> None:
        self._transport = transport
        self._receives = receives

    def wait(self) -> None:
        for receive in self._receives:
            self._transport.complete(receive)
