"""The processes that an engine runs in, as the server starts and ends them.

`Child` is an engine alone. `Ring` is many ranks: a launcher of ours starts them here, or torchrun
on any machines. Whichever it is, the server gets a connection to whoever takes commands.
"""

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Protocol

from longctx.config import EngineConfig
from longctx.errors import EngineDied, LongctxError
from longctx.ipc.channel import frame
from longctx.ipc.protocol import RankJoined, Start, encode
from longctx.model.named import find_model
from longctx.ring.processes.head import Head
from longctx.ring.processes.secret import make_secret
from offload.machine_limits import cores

STOP_SECONDS = 10.0  # a process that was told to stop and has not done so by then is killed
CALL_SECONDS = 90.0  # for ranks that are started to call: Python and torch, from a cold disk
LOOK_SECONDS = 0.1
# -P: the folder that a server is started in may hold an `api` or an `offload` that is not ours.
PYTHON = (sys.executable, "-P")


class EngineProcesses(Protocol):
    """One engine's processes, again and again: `launch`, `open`, `reap`; at the end `stop`.

    Called from the thread of the event loop, but for `launch` and `kill`, which need no loop.
    """

    def launch(self) -> None:
        """Start what is not running yet, and do not wait for it. Raises OSError.

        `open` does it where nobody has: only who has other work meanwhile calls it.
        """
        ...

    async def open(self) -> socket.socket:
        """A connection to an engine that loads its model. Raises EngineDied, OSError."""
        ...

    async def reap(self) -> str:
        """Call it after the connection was lost: nothing of this engine runs when it returns.

        Returns which process ended, in words.
        """
        ...

    def kill_unresponsive(self) -> None:
        """End the connection to an engine that says nothing any more, by killing it where it is."""
        ...

    async def stop(self) -> None:
        """The engine was told to stop: wait for that, by force if need be. Nothing is left."""
        ...

    def kill(self) -> None:
        """End at once what still runs; nothing is left. After `stop` it does nothing."""
        ...


def engine_processes(config: EngineConfig, cache_dir: Path) -> EngineProcesses:
    """Those that `config` asks for, none started yet; of the model that `find_model` finds.

    `cache_dir`: as that of `open_engine`. Raises LongctxError.
    """
    start = Start(config, find_model(config.model.model), cache_dir)
    return Child(start) if config.ring.ranks == 1 else Ring(start)


class Child:
    """One engine process, joined by a pair of sockets.

    It is told what to load before it has imported anything; it ends when its socket does.
    """

    def __init__(self, start: Start) -> None:
        self._start = start
        self._connection: socket.socket | None = None  # to a process that was launched
        self.process: subprocess.Popen[bytes] | None = None

    def launch(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                self.process = subprocess.Popen(
                    [*PYTHON, "-m", "longctx.process", str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,  # a terminal's Ctrl-C is for the server alone
                )
            except OSError:
                ours.close()
                raise
        with contextlib.suppress(BrokenPipeError):  # it has died already: who reads notices
            ours.sendall(frame(encode(self._start)))  # kept in the socket's buffer until it reads
        self._connection = ours

    async def open(self) -> socket.socket:
        if self._connection is None:
            self.launch()
        assert self._connection is not None
        connection, self._connection = self._connection, None
        return connection

    async def reap(self) -> str:
        assert self.process is not None
        code = await _end(self.process)
        return f"the engine process ended with code {code}"

    def kill_unresponsive(self) -> None:
        """Does nothing: an engine alone has no thread that would tell that it lives.

        Its requests have their own deadlines.
        """

    async def stop(self) -> None:
        if self.process is not None:
            await self.reap()

    def kill(self) -> None:
        if self._connection is not None:
            self._connection.close()
        if self.process is not None:
            self.process.kill()
            self.process.wait()


class Ring:
    """Many ranks, whose rank 0 calls here.

    Without `--head` a launcher is started, which starts the ranks and all of them again whenever
    one ends; it ends with its standard input, whose other end is here. With `--head` torchrun
    starts them, and all that is done here is to wait for the next rank 0.
    """

    def __init__(self, start: Start) -> None:
        """Listens for nobody yet: that takes a thread, which `open` starts."""
        ring = start.config.ring
        self._start = start
        self._ranks = ring.ranks
        self._head: Head | None = None
        self._leader: RankJoined | None = None
        self._connection: socket.socket | None = None
        self.launcher: subprocess.Popen[bytes] | None = None
        self._folder: Path | None = None  # of local ranks: private, so their sockets are too
        if ring.head is None:
            self._folder = Path(tempfile.mkdtemp(prefix="longctx-"))
            self._address = f"unix:{self._folder}/head"
            self._secret = self._folder / "secret"
        elif ring.head_secret is not None:
            self._address, self._secret = ring.head, ring.head_secret
        else:
            raise LongctxError("ranks that call a head need a secret; name its file by head_secret")
        make_secret(self._secret)

    def launch(self) -> None:
        if self._folder is not None and (self.launcher is None or self.launcher.poll() is not None):
            self.launcher = self._launch(self._folder)

    async def open(self) -> socket.socket:
        if self._head is None:
            self._head = self._listen()
        if self._folder is None:
            print(
                f"longctx waits for {self._ranks} ranks, to be started by torchrun ... -m "
                f"longctx.process.worker --head {self._head.address} --secret {self._secret}",
                file=sys.stderr,
            )
        self.launch()
        calling = asyncio.ensure_future(self._head.next_leader())
        try:
            await self._wait_for(calling)
        finally:
            calling.cancel()
        self._connection, self._leader = calling.result()
        self._connection.sendall(frame(encode(self._start)))
        return self._connection.dup()

    def _listen(self) -> Head:
        try:
            return Head(self._address, make_secret(self._secret), self._ranks)
        except OSError as error:
            raise LongctxError(
                f"cannot listen for ranks on {self._address}: {error.strerror}; choose another "
                "--head"
            ) from error

    async def _wait_for(self, calling: asyncio.Future[tuple[socket.socket, RankJoined]]) -> None:
        deadline = asyncio.get_running_loop().time() + CALL_SECONDS
        while not calling.done():
            await asyncio.wait([calling], timeout=LOOK_SECONDS)
            if self.launcher is None or calling.done():
                continue
            if (code := self.launcher.poll()) is not None:
                raise EngineDied(f"the launcher of the ranks ended with code {code}")
            if asyncio.get_running_loop().time() > deadline:
                await self._end_launcher(0.0)
                raise EngineDied(f"the ranks did not call within {CALL_SECONDS:.0f} s")

    def _launch(self, folder: Path) -> subprocess.Popen[bytes]:
        threads = self._start.config.model.threads or max(1, cores() // self._ranks)
        options = {
            "--ranks": self._ranks,
            "--threads": threads,
            "--folder": folder,
            "--head": self._address,
            "--secret": self._secret,
        }
        argv = [str(argument) for option in options.items() for argument in option]
        return subprocess.Popen(
            [*PYTHON, "-m", "longctx.ring.processes.launcher", *argv],
            stdin=subprocess.PIPE,  # its end is the launcher's
            start_new_session=True,
        )

    async def reap(self) -> str:
        assert self._head is not None
        self._head.forget_leader()
        self._leader = None
        return "the ranks of the engine ended"

    def kill_unresponsive(self) -> None:
        """Kill a local rank 0; one elsewhere ends when its connection does, which is ended here."""
        if self._folder is not None and self._leader is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._leader.pid, signal.SIGKILL)
        if self._connection is not None:
            with contextlib.suppress(OSError):
                self._connection.shutdown(socket.SHUT_RDWR)

    async def stop(self) -> None:
        await self._end_launcher(0.0 if self._leader is None else STOP_SECONDS)
        self._close()

    def kill(self) -> None:
        """The ranks end with their launcher."""
        if self.launcher is not None:
            assert self.launcher.stdin is not None
            self.launcher.stdin.close()
            self.launcher.kill()
            self.launcher.wait()
        self._close()

    async def _end_launcher(self, seconds: float) -> None:
        """Wait for the launcher, by force after a while; its ranks end with it."""
        if self.launcher is not None:
            await _end(self.launcher, seconds)
            assert self.launcher.stdin is not None
            self.launcher.stdin.close()

    def _close(self) -> None:
        if self._head is not None:
            self._head.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


async def _end(process: subprocess.Popen[bytes], seconds: float = STOP_SECONDS) -> int:
    """Wait for a process, by force after a while; returns its exit code."""
    try:
        return await asyncio.to_thread(process.wait, seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        return await asyncio.to_thread(process.wait)
