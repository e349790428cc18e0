"""The seam between ranks: tensors are sent from one to another while both go on computing.

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

POLL_SECONDS = 0.1  # between two checks whether another rank has ended


class Transfer(Protocol):
    """What one `Transport.begin` has started."""

    def wait(self) -> None:
        """Return when all is received and what was sent may be overwritten. Raises PeerLost."""
        ...


class Transport(Protocol):
    """How one rank reaches the others; it belongs to the one thread that runs the rank."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    @property
    def bytes_sent(self) -> int:
        """Bytes that this rank has sent since it was started."""
        ...

    def begin(
        self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]
    ) -> Transfer:
        """Start to send tensors to ranks, and to receive into tensors from ranks.

        Each pair is (rank, contiguous tensor). Between two ranks the n-th tensor received is the
        n-th one sent, of the same size and type. The caller must not touch any of them until
        `Transfer.wait` has returned. Raises PeerLost.
        """
        ...


class VirtualLinks:
    """Joins the ranks of one process by a queue from each to each; safe from any thread.

    Setting `lost` makes every transfer that still waits raise PeerLost.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.lost = threading.Event()
        self._queues = [[queue.SimpleQueue[Tensor]() for _ in range(size)] for _ in range(size)]

    def between(self, source: int, target: int) -> "queue.SimpleQueue[Tensor]":
        return self._queues[source][target]


class VirtualTransport:
    """A `Transport` of a rank that is a thread of this process: what is sent is copied at once."""

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
        """Receive everything from its source up to `receive`, in the order of `begin`."""
        while not receive.has_arrived:
            first = self._expected[receive.source].popleft()
            arrived = self._next(receive.source)
            assert arrived.nbytes == first.into.nbytes and arrived.dtype == first.into.dtype
            first.into.copy_(arrived.view(first.into.shape))
            first.has_arrived = True

    def _next(self, source: int) -> Tensor:
        arrived = self._links.between(source, self.rank)
        while not self._links.lost.is_set():
            try:
                return arrived.get(timeout=POLL_SECONDS)
            except queue.Empty:
                continue
        raise PeerLost("another rank has ended")


@dataclass(slots=True)
class _Receive:
    source: int
    into: Tensor
    has_arrived: bool = False


class _VirtualTransfer:
    def __init__(self, transport: VirtualTransport, receives: Sequence[_Receive]) -> None:
        self._transport = transport
        self._receives = receives

    def wait(self) -> None:
        for receive in self._receives:
            self._transport.complete(receive)
