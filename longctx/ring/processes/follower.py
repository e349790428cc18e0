"""A rank other than the leader: it does what the leader says, and ends when the leader is gone."""

import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

from longctx.config import EngineConfig
from longctx.errors import LongctxError, ModelRefused, PeerLost
from longctx.ipc.channel import Channel
from longctx.ipc.protocol import Beat, Fault
from longctx.model.loader import load_model
from longctx.ring.pages import LocalPages
from longctx.ring.process_group import ProcessGroupTransport
from longctx.ring.processes.heartbeat import SILENCE_SECONDS, Watch, beat
from longctx.ring.processes.messages import (
    Answer,
    CopyPages,
    End,
    Group,
    Open,
    PagesOrder,
    ReadPages,
    Ready,
    Step,
    Stepped,
    WritePages,
    encode,
    from_leader,
)
from longctx.ring.rank import Rank
from longctx.ring.step import RankStep

FILE_THREADS = 3  # as many as the leader's tiers have

Prepare = Callable[[EngineConfig], EngineConfig]
Meet = Callable[[Group], ProcessGroupTransport]


def follow(channel: Channel, prepare: Prepare, meet: Meet) -> None:
    """Serve the leader at the other end of the channel until it says that this is the end.

    `prepare` makes the leader's configuration this rank's own, `meet` joins the process group.
    Ends the process where the leader is lost.
    """
    follower = _Follower(channel)
    beat([channel], encode(Beat()))
    watch = Watch({"the leader": channel}, _end)
    transport = follower.begin(prepare, meet)
    if transport is None:
        return
    watch.silence_seconds = SILENCE_SECONDS
    follower.serve()
    transport.close()


class _Follower:
    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._orders: queue.SimpleQueue[Group | Open | Step | None] = queue.SimpleQueue()
        self._files = ThreadPoolExecutor(FILE_THREADS, thread_name_prefix="longctx-files")
        self._opened = threading.Event()
        self._pages: LocalPages
        self._rank: Rank
        threading.Thread(target=self._receive, name="longctx-leader", daemon=True).start()

    def begin(self, prepare: Prepare, meet: Meet) -> ProcessGroupTransport | None:
        """Load the model and make the pools; None where the leader ends before that."""
        group = self._orders.get()
        if group is None:
            return None
        assert isinstance(group, Group), group
        config = prepare(group.config)
        transport = meet(group)
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
        assert isinstance(order, Open), order
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
            assert isinstance(step, Step), step
            try:
                self._rank.run(RankStep.decode(step.body))
            except Exception as error:  # of whatever kind: the leader says what it means
                reason = f"{type(error).__name__}: {error}"
                self._channel.send(encode(Stepped(self._rank.transport.bytes_sent, reason)))
                if isinstance(error, PeerLost):
                    continue  # the leader knows better than this rank who is lost
                raise
            self._channel.send(encode(Stepped(self._rank.transport.bytes_sent)))

    def _receive(self) -> None:
        while (body := self._channel.receive()) is not None:
            match from_leader(body):
                case WritePages() | ReadPages() | CopyPages() as order:
                    self._files.submit(self._answer, order)
                case Group() | Open() | Step() as order:
                    self._orders.put(order)
                case End():
                    self._orders.put(None)
                    return
        _end("the leader has ended")

    def _answer(self, order: PagesOrder) -> None:
        try:
            self._opened.wait()
            answer = self._obey(order)
        except Exception as error:
            answer = Answer.failed(order.ticket, error)
        self._channel.send(encode(answer))

    def _obey(self, order: PagesOrder) -> Answer:
        match order:
            case WritePages():
                self._pages.write(Path(order.path), order.meta, order.pages)
                return Answer(order.ticket)
            case ReadPages():
                path = Path(order.path)
                found = self._pages.read(path, order.run, order.blocks, order.pages)
                return Answer(order.ticket, found=found)
            case CopyPages():
                return Answer(order.ticket, copies=self._pages.copy(order.group, order.pages))


def _end(reason: str) -> NoReturn:
    os._exit(1)  # other threads may wait for what never comes; the leader says why it ended
