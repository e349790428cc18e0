"""Ranks that are threads of this process: they differ from real ones only in speed."""

import contextlib
import queue
import threading
import weakref
from collections.abc import Sequence

from longctx.errors import PeerLost
from longctx.model.loader import LoadedModel
from longctx.ring.pages import LocalPages, RankPages
from longctx.ring.rank import Rank, RingMemorySpec
from longctx.ring.step import RankStep
from longctx.ring.transport import VirtualLinks, VirtualTransport


class VirtualRanks:
    """`Ranks` of one process that share one copy of the weights.

    The followers' threads end when this object is collected.
    """

    def __init__(self, size: int) -> None:
        self._links = VirtualLinks(size)
        self.size = size
        self.transports = [VirtualTransport(self._links, rank) for rank in range(size)]
        self.followers: list[VirtualFollower] = []

    @property
    def transport(self) -> VirtualTransport:
        return self.transports[0]

    @property
    def sent_bytes(self) -> int:
        return sum(transport.bytes_sent for transport in self.transports)

    def open(self, memory: RingMemorySpec, model: LoadedModel) -> None:
        for transport in self.transports[1:]:
            follower = VirtualFollower(model, memory, transport, self._links)
            self.followers.append(follower)
            weakref.finalize(self, follower.stop)

    def start(self, steps: Sequence[RankStep]) -> None:
        for follower, step in zip(self.followers, steps[1:], strict=True):
            follower.steps.put(step.encode())  # encoded, to find what could not be sent

    def finish(self) -> None:
        for follower in self.followers:
            error = follower.done.get()
            if error is not None:
                raise PeerLost(f"rank {follower.transport.rank}: {error}")

    def pages(self, rank: int) -> RankPages:
        return LocalPages(self.followers[rank - 1].rank.memory)


class VirtualFollower:
    """A follower that is a thread of this process.

    The leader's thread puts encoded steps into `steps` and gets from `done`, for each, None or what
    the step failed with; after a failure the thread has ended. `rank` waits until it is made.
    """

    def __init__(
        self,
        model: LoadedModel,
        memory: RingMemorySpec,
        transport: VirtualTransport,
        links: VirtualLinks,
    ) -> None:
        self.transport = transport
        self.steps: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.done: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
        self._links = links
        self._created: queue.SimpleQueue[Rank] = queue.SimpleQueue()
        self._rank: Rank | None = None
        name = f"longctx-rank-{transport.rank}"
        self._thread = threading.Thread(
            target=self._run, args=(model, memory), name=name, daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """End the thread, and with it every transfer of this ring that still waits."""
        self.steps.put(None)
        self._links.lost.set()
        self._thread.join()

    @property
    def rank(self) -> Rank:
        if self._rank is None:
            self._rank = self._created.get()
        return self._rank

    def _run(self, model: LoadedModel, memory: RingMemorySpec) -> None:
        with contextlib.suppress(PeerLost):
            rank = Rank(model, memory, self.transport)
            self._created.put(rank)
            while (body := self.steps.get()) is not None:
                try:
                    rank.run(RankStep.decode(body))
                except Exception as error:
                    self._links.lost.set()
                    self.done.put(error)
                    return
                self.done.put(None)
