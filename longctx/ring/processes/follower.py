"""A rank other than the leader: it does what the leader says, and ends when the leader is gone."""

import os
import queue
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

from longctx.errors import LongctxError, ModelRefused, PeerLost
from longctx.ipc.channel import Channel
from longctx.ipc.protocol import Fault, Heartbeat
from longctx.model.loader import load_model
from longctx.ring.pages import LocalPages
from longctx.ring.process_group import ProcessGroupTransport
from longctx.ring.processes.heartbeat import SILENCE_SECONDS, HeartbeatMonitor, send_heartbeats
from longctx.ring.processes.messages import (
    CopyPages,
    EndRank,
    JoinGroup,
    OpenRank,
    PagesReply,
    PagesRequest,
    ReadPages,
    Ready,
    RunStep,
    StepDone,
    WritePages,
    decode_from_leader,
    encode,
)
from longctx.ring.processes.rendezvous import FollowerRendezvous
from longctx.ring.rank import Rank
from longctx.ring.step import RankStep

FILE_THREADS = 3  # as many as the leader's tiers have


def follow(rendezvous: FollowerRendezvous) -> None:
    """Serve the leader that the rendezvous found until it says that this is the end.

    Ends the process where the leader is lost.
    """
    channel = rendezvous.channel
    follower = _Follower(channel)
    send_heartbeats([channel], encode(Heartbeat()))
    watch = HeartbeatMonitor({"the leader": channel}, _end)
    transport = follower.begin(rendezvous)
    if transport is None:
        return
    watch.silence_seconds = SILENCE_SECONDS
    follower.serve()
    transport.close()


class _Follower:
    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._orders: queue.SimpleQueue[JoinGroup | OpenRank | RunStep | None] = queue.SimpleQueue()
        self._files = ThreadPoolExecutor(FILE_THREADS, thread_name_prefix="longctx-files")
        self._opened = threading.Event()
        self._pages: LocalPages
        self._rank: Rank
        threading.Thread(target=self._receive, name="longctx-leader", daemon=True).start()

    def begin(self, rendezvous: FollowerRendezvous) -> ProcessGroupTransport | None:
        """Load the model and make the pools; None where the leader ends before that."""
        group = self._orders.get()
        if group is None:
            return None
        assert isinstance(group, JoinGroup), group
        config = rendezvous.rank_config(group.config)
        transport = rendezvous.join_group(group, config)
        try:
            model = load_model(
                config.model, Path(group.model_folder), cache_dir=Path(group.cache_dir)
            )
        except LongctxError as error:
            self._refuse(f"rank {transport.rank}: {error}")
            return None
        self._channel.send(encode(Ready()))
        order = self._orders.get()
        if order is None:
            return None
        assert isinstance(order, OpenRank), order
        if order.fingerprint != model.spec.fingerprint:
            self._refuse(
                f"rank {transport.rank} has other weights than rank 0; {group.model_folder} must "
                "be the same on every machine"
            )
            return None
        self._channel.send(encode(Ready()))
        self._rank = Rank(model, order.memory, transport)
        self._pages = LocalPages(self._rank.memory)
        self._opened.set()
        return transport

    def _refuse(self, message: str) -> None:
        self._channel.send(encode(Ready(Fault.of(ModelRefused(message)))))
        assert self._orders.get() is None  # the leader gives up

    def serve(self) -> None:
        while (step := self._orders.get()) is not None:
            assert isinstance(step, RunStep), step
            try:
                self._rank.run(RankStep.decode(step.body))
            except Exception as error:  # of whatever kind: the leader says what it means
                reason = f"{type(error).__name__}: {error}"
                self._channel.send(encode(StepDone(self._rank.transport.bytes_sent, reason)))
                if isinstance(error, PeerLost):
                    continue  # the leader knows better than this rank who is lost
                raise
            self._channel.send(encode(StepDone(self._rank.transport.bytes_sent)))

    def _receive(self) -> None:
        while (body := self._channel.receive()) is not None:
            match decode_from_leader(body):
                case WritePages() | ReadPages() | CopyPages() as order:
                    self._files.submit(self._answer, order)
                case JoinGroup() | OpenRank() | RunStep() as order:
                    self._orders.put(order)
                case EndRank():
                    self._orders.put(None)
                    return
        _end("the leader has ended")

    def _answer(self, order: PagesRequest) -> None:
        try:
            self._opened.wait()
            answer = self._obey(order)
        except Exception as error:
            answer = PagesReply.failed(order.ticket, error)
        self._channel.send(encode(answer))

    def _obey(self, order: PagesRequest) -> PagesReply:
        match order:
            case WritePages():
                self._pages.write(Path(order.path), order.meta, order.pages)
                return PagesReply(order.ticket)
            case ReadPages():
                path = Path(order.path)
                found = self._pages.read(path, order.run, order.blocks, order.pages)
                return PagesReply(order.ticket, found=found)
            case CopyPages():
                return PagesReply(order.ticket, copies=self._pages.copy(order.group, order.pages))


def _end(reason: str) -> NoReturn:
    os._exit(1)  # other threads may wait for what never comes; the leader says why it ended
