"""A follower's process: it does what the leader says, and ends when the leader is gone."""

import os
import queue
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

import torch

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

FILE_THREADS = 3  # as many as the leader's offload tiers have


def follow(rendezvous: FollowerRendezvous) -> None:
    """Serve the leader that the rendezvous found until it sends `EndRank`.

    Returns then. Ends the process where the leader is lost or silent. Call it from the main thread.
    """
    channel = rendezvous.channel
    follower = _Follower(channel)
    send_heartbeats([channel], encode(Heartbeat()))
    monitor = HeartbeatMonitor({"the leader": channel}, _exit_process)
    transport = follower.begin(rendezvous)
    if transport is None:
        return
    monitor.silence_seconds = SILENCE_SECONDS
    follower.serve()
    transport.close()


class _Follower:
    """Obeys the leader on several threads.

    One thread receives: it queues what the main thread has to do in order (`begin`, then `serve`)
    and hands requests for pages to the file threads, which reply by themselves.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._commands: queue.SimpleQueue[JoinGroup | OpenRank | RunStep | None] = (
            queue.SimpleQueue()
        )
        self._files = ThreadPoolExecutor(FILE_THREADS, thread_name_prefix="longctx-files")
        self._opened = threading.Event()
        self._pages: LocalPages
        self._rank: Rank
        threading.Thread(target=self._receive, name="longctx-leader", daemon=True).start()

    def begin(self, rendezvous: FollowerRendezvous) -> ProcessGroupTransport | None:
        """Join the process group, load the model and make the pools.

        Returns the transport, or None where the leader ends this rank before that.
        """
        group = self._commands.get()
        if group is None:
            return None
        assert isinstance(group, JoinGroup), group
        config = rendezvous.rank_config(group.config)
        if config.model.threads:
            torch.set_num_threads(config.model.threads)
        transport = rendezvous.join_group(group, config)
        try:
            model = load_model(config.model, group.model_folder, cache_dir=group.cache_dir)
        except LongctxError as error:
            self._refuse(f"rank {transport.rank}: {error}")
            return None
        self._channel.send(encode(Ready()))
        command = self._commands.get()
        if command is None:
            return None
        assert isinstance(command, OpenRank), command
        if command.fingerprint != model.spec.fingerprint:
            self._refuse(
                f"rank {transport.rank} has other weights than rank 0, or another kind of CPU "
                f"rounds its rows otherwise; {group.model_folder} must be the same on every "
                "machine, and --activations exact rounds no rows"
            )
            return None
        self._channel.send(encode(Ready()))
        self._rank = Rank(model, command.memory, transport)
        self._pages = LocalPages(self._rank.memory)
        self._opened.set()
        return transport

    def _refuse(self, message: str) -> None:
        self._channel.send(encode(Ready(Fault.of(ModelRefused(message)))))
        assert self._commands.get() is None  # the leader gives up, and tells all ranks to end

    def serve(self) -> None:
        """Run the leader's steps until it tells this rank to end."""
        while (step := self._commands.get()) is not None:
            assert isinstance(step, RunStep), step
            try:
                self._rank.run(RankStep.decode(step.body))
            except Exception as error:  # whatever it is, the leader reports it
                reason = f"{type(error).__name__}: {error}"
                self._channel.send(encode(StepDone(self._rank.transport.bytes_sent, reason)))
                if isinstance(error, PeerLost):
                    continue  # the leader finds out which rank is lost, and ends all
                raise
            self._channel.send(encode(StepDone(self._rank.transport.bytes_sent)))

    def _receive(self) -> None:
        while (body := self._channel.receive()) is not None:
            match decode_from_leader(body):
                case WritePages() | ReadPages() | CopyPages() as request:
                    self._files.submit(self._reply, request)
                case JoinGroup() | OpenRank() | RunStep() as command:
                    self._commands.put(command)
                case EndRank():
                    self._commands.put(None)
                    return
        _exit_process("the leader has ended")

    def _reply(self, request: PagesRequest) -> None:
        try:
            self._opened.wait()
            reply = self._handle(request)
        except Exception as error:
            reply = PagesReply.failed(request.ticket, error)
        self._channel.send(encode(reply))

    def _handle(self, request: PagesRequest) -> PagesReply:
        match request:
            case WritePages():
                self._pages.write(Path(request.path), request.meta, request.pages)
                return PagesReply(request.ticket)
            case ReadPages():
                path = Path(request.path)
                found = self._pages.read(path, request.run, request.blocks, request.pages)
                return PagesReply(request.ticket, found=found)
            case CopyPages():
                copies = self._pages.copy(request.group, request.pages)
                return PagesReply(request.ticket, copies=copies)


def _exit_process(reason: str) -> NoReturn:
    os._exit(1)  # other threads may wait for what never comes; the leader has logged the reason
