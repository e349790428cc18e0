"""The engine process: `python -m longctx.worker FD`, a child of whoever holds the other end.

It reads commands from the socket, steps the engine while there is work, and writes what comes out.
It ends when it is told to, or when the other end is gone: an engine never outlives its server.
"""

import contextlib
import os
import queue
import signal
import socket
import sys
import threading
from pathlib import Path

import numpy as np
import transformers

from longctx.engine import Engine
from longctx.errors import InvalidRequest, LongctxError
from longctx.protocol import (
    HEADER,
    Abort,
    Clear,
    CloseDocument,
    CloseModule,
    Command,
    Done,
    Durable,
    Event,
    Fault,
    GetModules,
    GetStats,
    JudgeLevel,
    Loaded,
    OpenDocument,
    OpenModule,
    Outputs,
    Rejected,
    Start,
    Stop,
    Submit,
    frame,
    read_command,
)
from longctx.quality.level_gate import judge_level

FLUSH_SECONDS = 5.0  # at the end, for blocks that are on their way to the disk
SEND_BUFFER_BYTES = 4 << 20  # a server that is busy for a moment does not stop the engine


def main(descriptor: int) -> None:
    # A service manager signals every process of a service; the server decides what it means.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    with socket.socket(fileno=descriptor) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        threading.Thread(target=_receive, args=(connection, commands), daemon=True).start()
        start = commands.get()
        if not isinstance(start, Start):
            return
        try:
            engine = Engine(start.config, Path(start.model_folder), cache_dir=Path(start.cache_dir))
        except LongctxError as error:
            _send(connection, Loaded(None, Fault.of(error)))
            return
        _send(connection, Loaded(engine.info))
        try:
            _serve(engine, connection, commands)
        finally:
            engine.close(flush_seconds=FLUSH_SECONDS)


def _receive(connection: socket.socket, commands: "queue.SimpleQueue[Command | None]") -> None:
    """Commands as they come, then None when the other end is gone."""
    with connection.makefile("rb") as stream, contextlib.suppress(ConnectionError):
        while header := stream.read(HEADER.size):
            commands.put(read_command(stream.read(*HEADER.unpack(header))))
    commands.put(None)


def _send(connection: socket.socket, event: Event) -> None:
    try:
        connection.sendall(frame(event))
    except OSError:
        sys.exit(0)  # nobody is there to hear it


def _serve(
    engine: Engine, connection: socket.socket, commands: "queue.SimpleQueue[Command | None]"
) -> None:
    while True:
        while not (engine.has_work or engine.is_writing) or not commands.empty():
            command = commands.get()
            if command is None or isinstance(command, Stop):
                return
            event = _obey(engine, command)
            if event is not None:
                _send(connection, event)
        outputs = engine.step()
        documents = engine.durable_documents()
        if documents:  # first: what ends with these outputs is durable by then
            _send(connection, Durable(documents))
        if outputs:
            _send(connection, Outputs(outputs))


def _obey(engine: Engine, command: Command) -> Event | None:
    try:
        match command:
            case Submit():
                engine.submit(command.request)
            case Abort():
                engine.abort(command.request_id)
            case OpenDocument():
                engine.open_document(command.document_id, _token_ids(Path(command.tokens)))
                return Done(command.ticket)
            case CloseDocument():
                engine.close_document(command.document_id)
                return Done(command.ticket)
            case OpenModule():
                engine.open_module(command.module_id, command.pieces)
                return Done(command.ticket)
            case CloseModule():
                engine.close_module(command.module_id)
                return Done(command.ticket)
            case GetModules():
                modules = engine.module_states(command.module_ids)
                return Done(command.ticket, modules=modules)
            case JudgeLevel():
                return Done(command.ticket, level=judge_level(engine, command.level))
            case GetStats():
                return Done(command.ticket, stats=engine.stats())
            case Clear():
                return Done(command.ticket, stats=engine.clear(command.tiers))
    except LongctxError as error:
        if isinstance(command, Submit):
            return Rejected(command.request.request_id, Fault.of(error))
        assert isinstance(
            command, OpenDocument | CloseDocument | OpenModule | JudgeLevel | Clear
        ), command
        return Done(command.ticket, Fault.of(error))
    return None


def _token_ids(file: Path) -> "np.memmap[tuple[int, ...], np.dtype[np.int32]]":
    """The file's ids, mapped: pages of it come into memory when they are needed."""
    try:
        return np.memmap(file, dtype="<i4", mode="r")
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"{file} cannot be read as token ids: {error}") from error


if __name__ == "__main__":
    main(int(sys.argv[1]))
    os._exit(0)  # nothing is left to flush, and taking torch down takes seconds
