"""Runs uvicorn in front of the application: answers until told to stop, then ends in order.

At the end nothing new is taken, running answers get time to finish, then the engine process stops.
"""

import asyncio
import contextlib
import importlib
import os
import signal
import socket
import sys
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn

from api.acceptor import Acceptor, Connection
from api.app import Application, open_application
from api.background.store_dir import StoreDir
from api.config import ServerConfig
from api.files.tokenizer_process import TokenizerProcess
from api.http.json_log import log_as_json, log_request
from api.http.observing import Observer
from api.listener import most_connections
from longctx.config import EngineConfig
from longctx.engine_info import EngineInfo
from longctx.process.launcher import EngineProcesses
from longctx.text.tokenizer import Tokenizer

if TYPE_CHECKING:  # what it imports comes with an extra
    from api.http.traces import Traces

# Read by OpenTelemetry's exporter, in all services alike; traces are sent where one is set.
TRACE_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
KEEP_ALIVE_SECONDS = 75  # longer than clients keep idle connections: they close them, not we
LAST_BYTES_SECONDS = 5  # to send what is left of answers that the engine has ended


def run(
    engine_config: EngineConfig,
    model_folder: Path,
    config: ServerConfig,
    *,
    keys: tuple[str, ...],
    listener: socket.socket,
    folder: StoreDir,
    processes: EngineProcesses,
) -> None:
    """Answer on `listener` until SIGTERM or Ctrl-C; `processes` have been launched.

    Call it before there are threads: the tokenizer's process is forked here. Raises LongctxError,
    and asyncio.CancelledError when it is told to stop before it is ready.
    """
    tokenizer = Tokenizer(model_folder)
    tokenizer_process = TokenizerProcess(tokenizer)
    asyncio.run(
        _run(
            engine_config,
            config,
            keys=keys,
            listener=listener,
            folder=folder,
            tokenizer=tokenizer,
            tokenizer_process=tokenizer_process,
            processes=processes,
        )
    )


async def _run(
    engine_config: EngineConfig,
    config: ServerConfig,
    *,
    keys: tuple[str, ...],
    listener: socket.socket,
    folder: StoreDir,
    tokenizer: Tokenizer,
    tokenizer_process: TokenizerProcess,
    processes: EngineProcesses,
) -> None:
    server: Server | None = None
    starting = asyncio.current_task()
    assert starting is not None

    def stop(number: int) -> None:
        if server is None:
            starting.cancel()
        elif server.should_exit and number == signal.SIGINT:
            os._exit(130)  # a second Ctrl-C: the other processes end when this one is gone
        else:
            server.should_exit = True

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop, number)
    observers: list[Observer] = []
    if config.log_format == "json":
        log_as_json()
        observers.append(log_request)
    traces = _traces(os.environ)
    if traces is not None:
        observers.append(traces)
    async with open_application(
        engine_config,
        config,
        keys=keys,
        folder=folder,
        tokenizer=tokenizer,
        tokenizer_process=tokenizer_process,
        processes=processes,
        observers=observers,
    ) as application:
        info = application.engine.info
        print(startup_line(info), file=sys.stderr)
        if info.dtype_reason is not None:
            print(f"longctx computes in {info.dtype_reason}", file=sys.stderr)
        print(f"longctx stores KV as {info.codec_choice.reason}", file=sys.stderr)
        wanted = engine_config.model.attention_backend
        if wanted == "auto" and info.backend == "torch" and info.device == "cpu":
            print(
                "longctx computes attention with torch, slowly: its compiled kernels are not "
                "installed; they need an x86-64 CPU with AVX2, and a C++ compiler while installing",
                file=sys.stderr,
            )
        server = Server(application, config)
        await server.serve([listener])
    if traces is not None:
        await asyncio.to_thread(traces.close)


def _traces(environment: Mapping[str, str]) -> "Traces | None":
    """Returns what sends traces, where OpenTelemetry's own variables say where to."""
    if not any(environment.get(name) for name in TRACE_ENDPOINTS):
        return None
    try:
        module = importlib.import_module("api.http.traces")
    except ModuleNotFoundError as error:
        print(
            f"longctx sends no traces: {error}; pip install 'longctx[otel]' brings what is missing",
            file=sys.stderr,
        )
        return None
    traces: Traces = module.send_traces()
    return traces


def startup_line(info: EngineInfo) -> str:
    """Says what is served, and how many tokens each tier has room for."""
    line = (
        f"longctx serves {info.model_name} on {info.device} in {info.dtype}: "
        f"{info.capacity_tokens:,} tokens of {info.kv_codec} KV fit the device"
    )
    capacity = info.tier_capacity_tokens
    if capacity["host"]:
        line += f", about {capacity['host']:,} the host's RAM"
    if capacity["disk"]:
        line += (
            f", about {capacity['disk']:,} the disk ({info.disk_bytes / 1e9:.1f} of "
            f"{info.disk_capacity_bytes / 1e9:.1f} GB are used)"
        )
    return f"{line}; a context has at most {info.max_context_tokens:,}"


class Server(uvicorn.Server):
    """Runs uvicorn with our ready line, and drains the engine while connections finish."""

    def __init__(self, application: Application, config: ServerConfig) -> None:
        super().__init__(
            uvicorn.Config(
                application.asgi,
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                ws="none",
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=int(config.drain_seconds) + LAST_BYTES_SECONDS,
            )
        )
        self.application = application
        self.drain_seconds = config.drain_seconds

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Accepts by ourselves, which uvicorn leaves to asyncio."""
        assert sockets is not None
        await super().startup([])  # of no socket
        self._acceptor = Acceptor(
            sockets[0],
            self._make_connection,
            self.server_state.connections,
            limit=most_connections(),
        )
        host, port = sockets[0].getsockname()[:2]
        print(f"longctx ready http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)

    def _make_connection(self, *, lost: asyncio.Event) -> Connection:
        return Connection(
            config=self.config,
            server_state=self.server_state,
            app_state=self.lifespan.state,
            lost=lost,
        )

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self._acceptor.close()
        # A deletion at work needs the engine to end. Where that does not answer in time, stopping
        # the engine ends the wait, and the next start takes the deletion up again.
        closing = asyncio.create_task(self.application.library.close())
        await asyncio.wait({closing}, timeout=self.drain_seconds)
        draining = asyncio.create_task(self.application.engine.drain(self.drain_seconds))
        await super().shutdown(sockets)
        await draining
        await closing

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Signals are `serve`'s: a stop that was asked for is a success, not death by signal."""
        yield
