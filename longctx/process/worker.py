"""The engine process, a child of whoever holds the socket: `python -m longctx.process.worker FD`.

It reads commands from the socket, steps the engine while there is work, and writes what comes out.
It ends when it is told to, or when the other end is gone: an engine never outlives its server.
One thread has the engine; a second one receives commands, and a third measures levels.

With many ranks torchrun starts it (`-m longctx.process.worker --head ADDRESS --secret FILE`):
rank 0 calls the head and is the engine, the other ranks do what rank 0 says.
"""

import argparse
import contextlib
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
import transformers

from longctx.engine.engine import Engine
from longctx.errors import ConnectionLost, InvalidRequest, LongctxError, ModelRefused, PeerLost
from longctx.ipc import protocol
from longctx.ipc.channel import Channel
from longctx.ipc.lifetime import die_with_parent
from longctx.ipc.protocol import Command, Done, Event, Fault, decode_command, encode
from longctx.open_engine import choose_type, open_engine
from longctx.quality.level_gate import judge_level
from longctx.ring.processes.follower import follow
from longctx.ring.processes.remote_ranks import RemoteRanks
from longctx.ring.processes.rendezvous import FollowerRendezvous, LeaderRendezvous, RankCoordinates
from longctx.ring.processes.secret import read_secret

FLUSH_SECONDS = 5.0  # at the end, for blocks that are on their way to the disk
SEND_BUFFER_BYTES = 4 << 20  # a server that is busy for a moment does not stop the engine
REASON_SECONDS = 1.0


def run(argv: Sequence[str], environment: Mapping[str, str]) -> NoReturn:
    """Be the engine process, then end this process: status 1 and a line on stderr for an error."""
    try:
        main(argv, environment)
    except LongctxError as error:
        print(f"longctx: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)  # nothing is left to flush, and taking torch down takes seconds


def main(argv: Sequence[str], environment: Mapping[str, str]) -> None:
    """Be what `argv` says: an engine alone, rank 0, or another rank. Raises LongctxError."""
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    parser = argparse.ArgumentParser(prog="longctx.process.worker", description=__doc__)
    parser.add_argument("descriptor", type=int, nargs="?", help="of a socket to the server")
    parser.add_argument("--head", metavar="HOST:PORT", help="the --head of longctx serve")
    parser.add_argument("--secret", type=Path, metavar="FILE", help="a copy of the head's file")
    arguments = parser.parse_args(argv)
    if arguments.descriptor is not None:
        # A service manager signals every process of a service; the server decides what it means.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with socket.socket(fileno=arguments.descriptor) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
            _alone(Channel(connection))
        return
    if arguments.head is None or arguments.secret is None:
        parser.error("--head and --secret are needed; see docs/ring.md")
    die_with_parent()
    coordinates, secret = RankCoordinates.of(environment), read_secret(arguments.secret)
    if coordinates.rank == 0:
        _lead(LeaderRendezvous(arguments.head, secret, coordinates), coordinates)
    else:
        follow(FollowerRendezvous(arguments.head, secret, coordinates))


def _alone(channel: Channel) -> None:
    """Be an engine of one rank until the server says stop or is gone."""
    commands = _commands(channel)
    start = commands.get()
    if isinstance(start, protocol.Start):
        with contextlib.suppress(ConnectionLost):  # nobody is there to hear it
            _run(channel, commands, start, ranks=None)


def _lead(rendezvous: LeaderRendezvous, coordinates: RankCoordinates) -> None:
    """Be rank 0: the engine, with other ranks behind it. Ends the process where one is lost."""

    def lost(reason: str) -> NoReturn:
        with contextlib.suppress(ConnectionLost):
            rendezvous.channel.send(encode(protocol.RanksLost(reason)))
        rendezvous.kill_local_followers()
        os._exit(1)  # whatever other threads wait for will not come

    commands = _commands(rendezvous.channel)
    start = commands.get()
    if isinstance(start, protocol.LeaderAddress) and start.fault is not None:
        raise start.fault.error()
    if not isinstance(start, protocol.Start):
        lost("the head is gone")
    try:
        start = _with_compute_type(rendezvous.channel, start, coordinates)
        transport = rendezvous.join_group(start.config, start.model_folder, start.cache_dir)
        ranks = RemoteRanks(transport, rendezvous.followers, lost)
        start = protocol.Start(
            coordinates.rank_config(start.config), start.model_folder, start.cache_dir
        )
        if _run(rendezvous.channel, commands, start, ranks=ranks):
            ranks.close()
        else:
            lost("the head is gone")
    except ConnectionLost:
        lost("the head is gone")
    except PeerLost as error:
        time.sleep(REASON_SECONDS)  # who sees which rank it was says so now, and ends this
        lost(str(error))


def _with_compute_type(
    channel: Channel, start: protocol.Start, coordinates: RankCoordinates
) -> protocol.Start:
    """Choose the compute type for all ranks, each of which might choose another by itself."""

    def say(step: str) -> None:
        channel.send(encode(protocol.Loading(step)))

    own = coordinates.rank_config(start.config)
    try:
        chosen = choose_type(own, start.model_folder, cache_dir=start.cache_dir, say=say)
    except ModelRefused:
        return start  # it is refused again, and told, when it is opened
    if chosen.reason is not None:
        say(f"all ranks compute in {chosen.reason}")
    model = replace(start.config.model, dtype=chosen.dtype)
    return protocol.Start(replace(start.config, model=model), start.model_folder, start.cache_dir)


def _run(
    channel: Channel,
    commands: "queue.SimpleQueue[Command | None]",
    start: protocol.Start,
    *,
    ranks: RemoteRanks | None,
) -> bool:
    """Load the model and serve; returns False where the server is gone before it says stop.

    Raises ConnectionLost (the server), PeerLost (a rank).
    """
    folder, cache_dir = start.model_folder, start.cache_dir

    def say(step: str) -> None:
        channel.send(encode(protocol.Loading(step)))

    try:
        engine = open_engine(start.config, folder, cache_dir=cache_dir, ranks=ranks, say=say)
    except PeerLost:
        raise
    except LongctxError as error:
        channel.send(encode(protocol.Loaded(None, Fault.of(error))))
        return True
    channel.send(encode(protocol.Loaded(engine.info)))
    try:
        return _serve(engine, channel, commands, cache_dir)
    finally:
        failure = sys.exception()
        alone = ranks is None or not isinstance(failure, PeerLost)
        if alone and not isinstance(failure, torch.AcceleratorError):
            engine.close(flush_seconds=FLUSH_SECONDS)


def _commands(channel: Channel) -> "queue.SimpleQueue[Command | None]":
    """Start to receive: commands as they come, then None when the server is gone."""
    commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()

    def receive() -> None:
        while (body := channel.receive()) is not None:
            commands.put(decode_command(body))
        commands.put(None)

    threading.Thread(target=receive, daemon=True).start()
    return commands


def _serve(
    engine: Engine,
    channel: Channel,
    commands: "queue.SimpleQueue[Command | None]",
    cache_dir: Path,
) -> bool:
    """Obey and step, until told to stop; returns False where the server is gone before that.

    Without work it sleeps until a command comes; with work it looks for commands between steps.
    """
    judging = ThreadPoolExecutor(max_workers=1)  # takes seconds, and answers have to flow
    while True:
        while not (engine.has_work or engine.has_transfers) or not commands.empty():
            command = commands.get()
            if command is None or isinstance(command, protocol.Stop):
                return command is not None
            if isinstance(command, protocol.JudgeLevel):
                judging.submit(_judge, engine, command, channel, cache_dir)
                continue
            event = _obey(engine, command)
            if event is not None:
                channel.send(encode(event))
            _tell_erased(engine, channel)
        outputs = engine.step()
        documents = engine.durable_changes()
        if documents:  # first: what ends with these outputs is durable by then
            channel.send(encode(protocol.Durable(documents)))
        if outputs:
            channel.send(encode(protocol.Outputs(outputs)))
        _tell_erased(engine, channel)


def _tell_erased(engine: Engine, channel: Channel) -> None:
    erasures = engine.take_erased()
    if erasures:
        channel.send(encode(protocol.Erased(erasures)))


def _obey(engine: Engine, command: Command) -> Event | None:
    """Carry a command out; returns the answer to it, where there is one."""
    try:
        match command:
            case protocol.Submit():
                engine.submit(command.request)
            case protocol.Abort():
                engine.abort(command.request_id)
            case protocol.OpenDocument():
                token_ids = _token_ids(command.tokens)
                engine.open_document(command.document_id, token_ids, keep=command.keep)
                return Done(command.ticket)
            case protocol.CloseDocument():
                return Done(command.ticket, erasure=engine.close_document(command.document_id))
            case protocol.OpenModule():
                engine.open_module(
                    command.module_id, command.pieces, keep=command.keep, sources=command.sources
                )
                return Done(command.ticket)
            case protocol.CloseModule():
                return Done(command.ticket, erasure=engine.close_module(command.module_id))
            case protocol.GetModules():
                modules = engine.module_states(command.module_ids)
                return Done(command.ticket, modules=modules)
            case protocol.GetStats():
                return Done(command.ticket, stats=engine.stats())
            case protocol.Clear():
                return Done(command.ticket, cleared=engine.clear(command.tiers))
    except LongctxError as error:
        if isinstance(command, protocol.Submit):
            return protocol.Rejected(command.request.request_id, Fault.of(error))
        assert isinstance(
            command,
            protocol.OpenDocument | protocol.CloseDocument | protocol.OpenModule | protocol.Clear,
        ), command
        return Done(command.ticket, Fault.of(error))
    return None


def _judge(engine: Engine, command: protocol.JudgeLevel, channel: Channel, cache_dir: Path) -> None:
    """Measure a level with an engine of its own, beside what is served.

    Whatever happens, who asked is told.
    """
    try:
        done = Done(command.ticket, level=judge_level(engine, command.level, cache_dir=cache_dir))
    except LongctxError as error:
        done = Done(command.ticket, Fault.of(error))
    except Exception as error:
        reason = f"{command.level.name} could not be measured: {type(error).__name__}: {error}"
        done = Done(command.ticket, Fault.of(LongctxError(reason)))
    with contextlib.suppress(ConnectionLost):  # nobody is there to hear it
        channel.send(encode(done))


def _token_ids(file: Path) -> "np.memmap[tuple[int, ...], np.dtype[np.int32]]":
    """Map the file's ids: pages of it come into memory when they are needed.

    Raises InvalidRequest.
    """
    try:
        return np.memmap(file, dtype="<i4", mode="r")
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"{file} cannot be read as token ids: {error}") from error


if __name__ == "__main__":
    run(sys.argv[1:], os.environ)
