"""The other ranks as the leader has them when they are processes: one channel to each.

A rank that is lost is everybody's end: `lost` is told why, from whatever thread notices, and ends
this process; the launcher starts all of them again.
"""

import itertools
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path

from longctx.errors import ConnectionLost, PeerLost
from longctx.ipc.channel import Channel
from longctx.ipc.protocol import Heartbeat
from longctx.model.loader import LoadedModel
from longctx.ring.pages import RankPages
from longctx.ring.process_group import ProcessGroupTransport
from longctx.ring.processes.heartbeat import SILENCE_SECONDS, HeartbeatMonitor, send_heartbeats
from longctx.ring.processes.messages import (
    CopyPages,
    EndRank,
    OpenRank,
    PagesReply,
    PagesRequest,
    ReadPages,
    Ready,
    RunStep,
    StepDone,
    WritePages,
    decode_to_leader,
    encode,
)
from longctx.ring.rank import RingMemorySpec
from longctx.ring.step import RankStep
from offload.block_run import BlockRun
from offload.disk.extent_header import ExtentMeta

LEAVING_SECONDS = 5.0  # for the other ranks to end when they are told to


class RemoteRanks:
    """`Ranks` over channels; `channels[r]` leads to rank r, from 1 on."""

    def __init__(
        self,
        transport: ProcessGroupTransport,
        channels: Mapping[int, Channel],
        lost: Callable[[str], None],
    ) -> None:
        self.transport = transport
        self.size = transport.size
        self._followers = [_RemoteRank(rank, channels[rank], lost) for rank in range(1, self.size)]
        names = {f"rank {follower.rank}": follower.channel for follower in self._followers}
        self._watch = HeartbeatMonitor(names, lost)
        send_heartbeats(list(channels.values()), encode(Heartbeat()))

    def open(self, memory: RingMemorySpec, model: LoadedModel) -> None:
        """Raises what kept a rank from loading its model."""
        opening = encode(OpenRank(memory, model.spec.fingerprint))
        self._all_ready()  # with their models
        for follower in self._followers:
            follower.send(opening)
        self._all_ready()  # to make their pools
        self._watch.silence_seconds = SILENCE_SECONDS

    def _all_ready(self) -> None:
        for follower in self._followers:
            ready = follower.ready.get()
            if ready.fault is not None:
                raise ready.fault.error()

    def start(self, steps: Sequence[RankStep]) -> None:
        for follower, step in zip(self._followers, steps[1:], strict=True):
            follower.send(encode(RunStep(step.encode())))

    def finish(self) -> None:
        for follower in self._followers:
            done = follower.done.get()
            follower.sent_bytes = done.sent_bytes
            if done.failure is not None:
                raise PeerLost(f"rank {follower.rank} failed: {done.failure}")

    def pages(self, rank: int) -> RankPages:
        return self._followers[rank - 1]

    def stats(self) -> dict[str, float]:
        """As `Engine.stats`."""
        sent_bytes = self.transport.bytes_sent + sum(each.sent_bytes for each in self._followers)
        return {"ring_sent_bytes_total": sent_bytes}

    def close(self) -> None:
        """Let the other ranks end, and leave the process group."""
        for follower in self._followers:
            follower.leave()
        for follower in self._followers:
            follower.gone.wait(LEAVING_SECONDS)
        self.transport.close()


class _RemoteRank:
    """Another rank, and its pages (`RankPages`)."""

    def __init__(self, rank: int, channel: Channel, lost: Callable[[str], None]) -> None:
        self.rank = rank
        self.channel = channel
        self.ready: queue.SimpleQueue[Ready] = queue.SimpleQueue()
        self.done: queue.SimpleQueue[StepDone] = queue.SimpleQueue()
        self.gone = threading.Event()
        self.sent_bytes = 0
        self._lost = lost
        self._leaving = False
        self._tickets = itertools.count()
        self._asked: dict[int, Future[PagesReply]] = {}
        threading.Thread(target=self._receive, name=f"longctx-rank-{rank}", daemon=True).start()

    def send(self, body: bytes) -> None:
        """Raises PeerLost."""
        try:
            self.channel.send(body)
        except ConnectionLost as error:
            raise PeerLost(f"rank {self.rank} has ended: {error}") from error

    def leave(self) -> None:
        self._leaving = True
        self.send(encode(EndRank()))

    def write(self, path: Path, meta: ExtentMeta, pages: Sequence[int]) -> None:
        self._ask(lambda ticket: WritePages(ticket, str(path), meta, list(pages)))

    def read(
        self, path: Path, run: BlockRun, blocks: Sequence[int], pages: Sequence[int]
    ) -> list[bool]:
        answer = self._ask(
            lambda ticket: ReadPages(ticket, str(path), run, list(blocks), list(pages))
        )
        assert answer.found is not None
        return answer.found

    def copy(self, group: int, pages: Sequence[int]) -> list[bytes]:
        answer = self._ask(lambda ticket: CopyPages(ticket, group, list(pages)))
        assert answer.copies is not None
        return answer.copies

    def _ask(self, order: Callable[[int], PagesRequest]) -> PagesReply:
        ticket = next(self._tickets)
        asked = self._asked[ticket] = Future[PagesReply]()
        self.send(encode(order(ticket)))
        answer = asked.result()
        answer.raise_failure()
        return answer

    def _receive(self) -> None:
        while (body := self.channel.receive()) is not None:
            match decode_to_leader(body):
                case Ready() as ready:
                    self.ready.put(ready)
                case StepDone() as done:
                    self.done.put(done)
                case PagesReply() as answer:
                    self._asked.pop(answer.ticket).set_result(answer)
        self.gone.set()
        if not self._leaving:
            self._lost(f"rank {self.rank} has ended")
