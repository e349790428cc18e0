"""Where ranks call the server: rank 0 stays connected, the others learn where rank 0 is."""

import asyncio
import contextlib
import socket
import threading

from longctx.errors import ConnectionLost, EngineDied, PeerLost
from longctx.ipc.channel import Channel
from longctx.ipc.protocol import Fault, LeaderAddress, RankJoined, decode_event, encode
from longctx.ring.processes.listener import Listener

WAITING_SECONDS = 60.0  # of another rank for rank 0


class Head:
    def __init__(self, address: str, secret: bytes, ranks: int) -> None:
        """Raises OSError."""
        self._ranks = ranks
        self._changed = threading.Condition()
        self._leader: RankJoined | None = None
        self._waiting: asyncio.Future[tuple[socket.socket, RankJoined]] | None = None
        self._listener = Listener(address, secret, self._answer)
        self.address = self._listener.address

    async def next_leader(self) -> tuple[socket.socket, RankJoined]:
        """The next rank 0 that calls, once its connection awaits `Start`."""
        with self._changed:
            self._waiting = asyncio.get_running_loop().create_future()
        return await self._waiting

    def forget_leader(self) -> None:
        """The leader has gone: who asks waits for the next one."""
        with self._changed:
            self._leader = None

    def close(self) -> None:
        self._listener.close()

    def _answer(self, connection: socket.socket, word: bytes) -> None:
        joined = decode_event(word)
        assert isinstance(joined, RankJoined), joined
        if joined.rank == 0 and joined.ranks == self._ranks:
            self._take(connection, joined)
            return
        channel = Channel(connection)
        with contextlib.suppress(ConnectionLost):
            channel.send(encode(self._where(joined)))
        channel.close()

    def _take(self, connection: socket.socket, joined: RankJoined) -> None:
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

    def _where(self, joined: RankJoined) -> LeaderAddress:
        if joined.ranks != self._ranks:
            message = f"torchrun started {joined.ranks} ranks, the head has --ranks {self._ranks}"
            return LeaderAddress("", Fault.of(EngineDied(message)))
        with self._changed:
            self._changed.wait_for(lambda: self._leader is not None, WAITING_SECONDS)
            if self._leader is None:
                return LeaderAddress("", Fault.of(PeerLost("rank 0 has not called yet")))
            return LeaderAddress(self._leader.address)
