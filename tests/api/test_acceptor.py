"""More connections than descriptors: some wait or give way, nothing fails, and it is said once."""

import asyncio
import contextlib
import logging
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from unittest import mock

import httpx
import pytest
import uvicorn

from api import acceptor as acceptor_module
from api import listener as listener_module
from api.acceptor import Acceptor, Connection
from api.listener import most_connections, raise_descriptor_limit
from tests.api.test_cli import OPTIONS, longctx
from tests.support.waiting import eventually, patient

DESCRIPTORS = 256
IDLE = 400


class Site:
    """An application behind an acceptor: `/wait` is answered when `gate` is open."""

    def __init__(self, limit: int) -> None:
        self.gate = asyncio.Event()
        self.writers: list[asyncio.StreamWriter] = []
        config = uvicorn.Config(
            self._answer, interface="asgi3", lifespan="off", log_config=None, access_log=False
        )
        config.load()
        self.state = uvicorn.server.ServerState()
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.acceptor = Acceptor(
            self.socket,
            lambda *, lost: Connection(config, self.state, {}, lost=lost),
            self.state.connections,
            limit=limit,
        )
        self.port = self.socket.getsockname()[1]

    async def _answer(self, scope, receive, send) -> None:  # type: ignore[no-untyped-def]
        if scope["path"] == "/wait":
            await self.gate.wait()
        headers = [(b"content-length", b"2")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"ok"})

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        connected = await asyncio.open_connection("127.0.0.1", self.port)
        self.writers.append(connected[1])
        return connected

    async def ask(
        self, path: str, connected: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
    ) -> bytes:
        reader, writer = connected or await self.connect()
        writer.write(f"GET {path} HTTP/1.1\r\nhost: here\r\n\r\n".encode())
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), patient())
        assert await reader.readexactly(2) == b"ok"
        return head.split(b"\r\n")[0]


@contextlib.asynccontextmanager
async def site(limit: int) -> AsyncIterator[Site]:
    served = Site(limit)
    try:
        yield served
    finally:
        await served.acceptor.close()
        served.socket.close()
        served.gate.set()
        for writer in served.writers:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
        await eventually(lambda: not served.state.connections)


@pytest.fixture(autouse=True)
def impatient() -> Iterator[None]:
    with mock.patch.object(acceptor_module, "IDLE_SECONDS", 0.05):
        yield


def test_the_connection_that_was_idle_for_longest_gives_way(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def test() -> None:
        async with site(3) as served:
            connected = [await served.connect() for _ in range(3)]
            for each in connected:
                assert await served.ask("/", each) == b"HTTP/1.1 200 OK"
            await served.ask("/", connected[0])  # so the second one is the one
            assert not caplog.messages, "nobody needs their place yet"
            for _ in range(2):
                assert await served.ask("/") == b"HTTP/1.1 200 OK"
            assert await connected[1][0].read() == b"" and await connected[2][0].read() == b""
            assert await served.ask("/", connected[0]) == b"HTTP/1.1 200 OK"

    with caplog.at_level(logging.WARNING):
        asyncio.run(test())
    (told,) = caplog.messages
    assert "3 connections are open" in told and "LimitNOFILE" in told


def test_who_is_being_answered_keeps_the_connection_and_the_next_waits() -> None:
    async def test() -> None:
        async with site(2) as served:
            busy = [asyncio.ensure_future(served.ask("/wait")) for _ in range(2)]
            await eventually(lambda: len(served.state.tasks) == 2)
            late = asyncio.ensure_future(served.ask("/"))
            done, _ = await asyncio.wait([late, *busy], timeout=0.3)
            assert not done
            served.gate.set()
            assert await asyncio.gather(late, *busy) == [b"HTTP/1.1 200 OK"] * 3
            assert len(served.state.connections) <= 2

    asyncio.run(test())


def test_without_a_descriptor_it_is_said_once_and_tried_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def test() -> None:
        loop = asyncio.get_running_loop()
        accept, failures = loop.sock_accept, 5

        async def sometimes(listener: socket.socket):  # type: ignore[no-untyped-def]
            nonlocal failures
            if failures:
                failures -= 1
                raise OSError(24, "Too many open files")
            return await accept(listener)

        with (
            mock.patch.object(loop, "sock_accept", sometimes),
            mock.patch.object(acceptor_module, "RETRY_SECONDS", 0.01),
        ):
            async with site(2) as served:
                assert await served.ask("/") == b"HTTP/1.1 200 OK"
        assert not failures

    with caplog.at_level(logging.WARNING):
        asyncio.run(test())
    assert caplog.messages == [
        "longctx: cannot accept connections: Too many open files; trying again"
    ]


@pytest.mark.parametrize(
    ("limits", "raised", "connections"),
    [
        ((1024, 4096), 4096, 1984),
        ((1024, resource.RLIM_INFINITY), 65_536, 32_704),
        ((1 << 20, 1 << 20), None, 32_704),  # high enough: left alone
        ((256, 256), None, 64),
        ((64, 64), None, 16),
    ],
)
def test_the_soft_limit_is_raised_and_bounds_the_connections(
    limits: tuple[int, int], raised: int | None, connections: int
) -> None:
    now = limits

    def set_limits(kind: int, wanted: tuple[int, int]) -> None:
        nonlocal now
        now = wanted

    with (
        mock.patch.object(listener_module.resource, "getrlimit", lambda kind: now),
        mock.patch.object(listener_module.resource, "setrlimit", set_limits),
    ):
        raise_descriptor_limit()
        assert now == (limits if raised is None else (raised, limits[1]))
        assert most_connections() == connections


@pytest.mark.skipif(sys.platform != "linux", reason="limits of Linux")
def test_a_server_with_few_descriptors_outlives_a_crowd_of_idle_clients(
    model_folder: Path, tmp_path: Path
) -> None:
    server = longctx(
        *("serve", "--model", model_folder, "--store-dir", tmp_path, "--port", "0", *OPTIONS),
        preexec_fn=lambda: resource.setrlimit(
            resource.RLIMIT_NOFILE, (DESCRIPTORS // 2, DESCRIPTORS)
        ),
    )
    log: list[str] = []
    reading = threading.Thread(target=lambda: log.extend(server.stderr or ()))
    reading.start()
    try:
        assert server.stdout is not None and server.stderr is not None
        url = server.stdout.readline().split()[-1]
        soft, hard = resource.prlimit(server.pid, resource.RLIMIT_NOFILE)
        assert (soft, hard) == (DESCRIPTORS, DESCRIPTORS)
        address = ("127.0.0.1", int(url.rpartition(":")[2]))
        with contextlib.ExitStack() as crowd:
            for _ in range(IDLE):
                crowd.enter_context(socket.create_connection(address, patient()))
            # Without a wait: the eldest of the crowd gives way.
            assert httpx.get(f"{url}/health", timeout=patient()).status_code == 200
            body = {"prompt": "a tale", "max_tokens": 3}
            answered = httpx.post(f"{url}/v1/completions", json=body, timeout=patient())
            assert answered.status_code == 200, answered.text
        assert httpx.get(f"{url}/health", timeout=patient()).status_code == 200
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            assert server.wait(patient()) == 0
        except subprocess.TimeoutExpired:
            server.kill()
            raise
        reading.join()
        server.communicate()
    assert sum("connections are open" in line for line in log) == 1, log
    assert len("".join(log)) < 2_000
