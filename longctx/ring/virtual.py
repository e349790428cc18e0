"""Ranks that are threads of this process: exact in everything but speed."""

import contextlib
import queue
import threading
import weakref
from collections.abc import Sequence

from longctx.errors import PeerLost
from longctx.model.loader import LoadedModel
from longctx.ring.pages import LocalPages, RankPages
from longctx.ring.rank import Rank, RingMemory
from longctx.ring.step import RankStep
from longctx.ring.transport import VirtualLinks, VirtualTransport


class VirtualRanks:
    """`Ranks` of one process and one copy of the weights."""

    def __init__(self, size: int) -> None:
        self._links = VirtualLinks(size)
        self.size = size
        self.transports = [VirtualTransport(self._links, rank) for rank in range(size)]
        self.members: list[VirtualRank] = []

    @property
    def transport(self) -> VirtualTransport:
        return self.transports[0]

    def open(self, memory: RingMemory, model: LoadedModel) -> None:
        for transport in self.transports[1:]:
            member = VirtualRank(model, memory, transport, self._links)
            self.members.append(member)
            weakref.finalize(self, member.stop)

    def start(self, steps: Sequence[RankStep]) -> None:
        for member, step in zip(self.members, steps[1:], strict=True):
            member.steps.put(step.encode())

    def finish(self) -> None:
        for member in self.members:
            error = member.done.get()
            if error is not None:
                raise PeerLost(f"rank {member.transport.rank}: {error}")

    def pages(self, rank: int) -> RankPages:
        return LocalPages(self.members[rank - 1].rank.memory)


class VirtualRank:
    """A follower: a thread that does one step after another."""

    def __init__(
        self,
        model: LoadedModel,
        memory: RingMemory,
        transport: VirtualTransport,
        links: VirtualLinks,
    ) -> None:
        self.transport = transport
        self.steps: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.done: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
        self._links = links
        self._made: queue.SimpleQueue[Rank] = queue.SimpleQueue()
        self._rank: Rank | None = None
        name = f"longctx-rank-{transport.rank}"
        self._thread = threading.Thread(
            target=self._live, args=(model, memory), name=name, daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        self.steps.put(None)
        self._links.lost.set()
        self._thread.join()

    @property
    def rank(self) -> Rank:
        if self._rank is None:
            self._rank = self._made.get()
        return self._rank

    def _live(self, model: LoadedModel, memory: RingMemory) -> None:
        with contextlib.suppress(PeerLost):
            rank = Rank(model, memory, self.transport)
            self._made.put(rank)
            while (body := self.steps.get()) is not None:
                try:
                    rank.run(RankStep.decode(body))
                except Exception as error:
                    self._links.lost.set()
                    self.done.put(error)
                    return
                self.done.put(None)
