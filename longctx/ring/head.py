"""Where ranks call the server: rank 0 stays connected, the others learn where rank 0 is."""

import asyncio
import contextlib
import socket
import threading

from longctx.channel import Channel, listen, prove, receive_one
from longctx.errors import EngineDied, PeerLost
from longctx.protocol import Fault, Joined, Leader, encode, read_event

WAITING_SECONDS = 60.0  # of another rank for rank 0


class Head:
    """Calls are answered by threads, so that strangers who say nothing keep nobody waiting."""

    def __init__(self, address: str, secret: bytes, ranks: int) -> None:
        """Raises OSError."""
        self._secret, self._ranks = secret, ranks
        self._listener = listen(address)
        self.address = address
        if not address.startswith("unix:"):
            host, port = self._listener.getsockname()[:2]
            self.address = f"{host}:{port}"
        self._changed = threading.Condition()
        self._leader: Joined | None = None
        self._waiting: asyncio.Future[tuple[socket.socket, Joined]] | None = None
        threading.Thread(target=self._listen, name="longctx-head", daemon=True).start()

    async def leader(self) -> tuple[socket.socket, Joined]:
        """The next rank 0 that calls, once its connection awaits `Start`."""
        with self._changed:
            self._waiting = asyncio.get_running_loop().create_future()
        return await self._waiting

    def forget(self) -> None:
        """The leader has gone: who asks waits for the next one."""
        with self._changed:
            self._leader = None

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._listener.close()

    def _listen(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        try:
            prove(connection, self._secret, caller=False)
            joined = read_event(receive_one(connection))
        except PeerLost:
            connection.close()
            return
        assert isinstance(joined, Joined), joined
        if joined.rank == 0 and joined.ranks == self._ranks:
            self._take(connection, joined)
            return
        channel = Channel(connection)
        with contextlib.suppress(PeerLost):
            channel.send(encode(self._where(joined)))
        channel.close()

    def _take(self, connection: socket.socket, joined: Joined) -> None:
        with self._changed:
            waiting = self._waiting
            if waiting is None:  # a second leader: one of the two is of an older attempt
                connection.close()
                return
            self._waiting, self._leader = None, joined
            self._changed.notify_all()

        def give() -> None:
            if waiting.done():
                connection.close()  # nobody waits any more
            else:
                waiting.set_result((connection, joined))

        with contextlib.suppress(RuntimeError):  # the loop has ended
            waiting.get_loop().call_soon_threadsafe(give)

    def _where(self, joined: Joined) -> Leader:
        if joined.ranks != self._ranks:
            message = f"torchrun started {joined.ranks} ranks, the head has --ranks {self._ranks}"
            return Leader("", Fault.of(EngineDied(message)))
        with self._changed:
            self._changed.wait_for(lambda: self._leader is not None, WAITING_SECONDS)
            if self._leader is None:
                return Leader("", Fault.of(PeerLost("rank 0 has not called yet")))
            return Leader(self._leader.address)
