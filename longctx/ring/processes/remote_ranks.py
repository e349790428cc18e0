"""The followers as the leader sees them when they are processes: one channel to each.

A rank that is lost ends all ranks: `lost` is called with the reason, from whichever thread notices,
and ends this process; the launcher then starts all of them again.
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

END_SECONDS = 5.0  # for the followers to end when they are told to


class RemoteRanks:
    """`Ranks` that are processes.

    The engine's thread calls `open`, then `start` and `finish` in turn, and `close` at the end;
    `sent_bytes` is for the same thread. Pages are written and read from any thread.
    """

    def __init__(
        self,
        transport: ProcessGroupTransport,
        channels: Mapping[int, Channel],
        lost: Callable[[str], None],
    ) -> None:
        """`channels[r]` leads to rank r, from 1 on; messages are received from it from now on."""
        self.transport = transport
        self.size = transport.size
        self._followers = [_RemoteRank(rank, channels[rank], lost) for rank in range(1, self.size)]
        names = {f"rank {follower.rank}": follower.channel for follower in self._followers}
        self._monitor = HeartbeatMonitor(names, lost)
        send_heartbeats(list(channels.values()), encode(Heartbeat()))

    def open(self, memory: RingMemorySpec, model: LoadedModel) -> None:
        """As `Ranks.open`; raises ModelRefused with what kept a rank from serving its model."""
        opening = encode(OpenRank(memory, model.spec.fingerprint))
        self._wait_ready()  # their models are loaded
        for follower in self._followers:
            follower.send(opening)
        self._wait_ready()  # they have the same weights, and make their pools
        self._monitor.silence_seconds = SILENCE_SECONDS

    def _wait_ready(self) -> None:
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

    @property
    def sent_bytes(self) -> int:
        return self.transport.bytes_sent + sum(each.sent_bytes for each in self._followers)

    def close(self) -> None:
        """Tell the followers to end, wait for that, and leave the process group."""
        for follower in self._followers:
            follower.end()
        for follower in self._followers:
            follower.ended.wait(END_SECONDS)
        self.transport.close()


class _RemoteRank:
    """A follower and its pages (`RankPages`).

    A thread of its own receives: it puts `Ready` and `StepDone` into queues for the engine's
    thread, and hands each reply about pages to the thread that asked.
    """

    def __init__(self, rank: int, channel: Channel, lost: Callable[[str], None]) -> None:
        self.rank = rank
        self.channel = channel
        self.ready: queue.SimpleQueue[Ready] = queue.SimpleQueue()
        self.done: queue.SimpleQueue[StepDone] = queue.SimpleQueue()
        self.ended = threading.Event()
        self.sent_bytes = 0
        self._lost = lost
        self._is_ending = False
        self._tickets = itertools.count()
        self._replies: dict[int, Future[PagesReply]] = {}
        threading.Thread(target=self._receive, name=f"longctx-rank-{rank}", daemon=True).start()

    def send(self, body: bytes) -> None:
        """Send a message. Raises PeerLost."""
        try:
            self.channel.send(body)
        except ConnectionLost as error:
            raise PeerLost(f"rank {self.rank} has ended: {error}") from error

    def end(self) -> None:
        """Tell the rank to end; its end is not a loss then."""
        self._is_ending = True
        self.send(encode(EndRank()))

    def write(self, path: Path, meta: ExtentMeta, pages: Sequence[int]) -> None:
        self._ask(lambda ticket: WritePages(ticket, str(path), meta, list(pages)))

    def read(
        self, path: Path, run: BlockRun, blocks: Sequence[int], pages: Sequence[int]
    ) -> list[bool]:
        reply = self._ask(
            lambda ticket: ReadPages(ticket, str(path), run, list(blocks), list(pages))
        )
        assert reply.found is not None
        return reply.found

    def copy(self, group: int, pages: Sequence[int]) -> list[bytes]:
        reply = self._ask(lambda ticket: CopyPages(ticket, group, list(pages)))
        assert reply.copies is not None
        return reply.copies

    def _ask(self, request: Callable[[int], PagesRequest]) -> PagesReply:
        """Send the request for a new ticket and wait for its reply.

        Raises what failed on the rank, and PeerLost. Where the rank ends meanwhile this process
        does so, too, so nobody waits for ever.
        """
        ticket = next(self._tickets)
        future = self._replies[ticket] = Future[PagesReply]()
        self.send(encode(request(ticket)))
        reply = future.result()
        reply.raise_failure()
        return reply

    def _receive(self) -> None:
        while (body := self.channel.receive()) is not None:
            match decode_to_leader(body):
                case Ready() as ready:
                    self.ready.put(ready)
                case StepDone() as done:
                    self.done.put(done)
                case PagesReply() as reply:
                    self._replies.pop(reply.ticket).set_result(reply)
        self.ended.set()
        if not self._is_ending:
            self._lost(f"rank {self.rank} has ended")
