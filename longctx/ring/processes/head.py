"""Where ranks connect to the server: rank 0 stays connected, the others learn where it listens."""

import asyncio
import contextlib
import socket
import threading

from longctx.errors import ConnectionLost, EngineDied, PeerLost
from longctx.ipc.channel import Channel
from longctx.ipc.protocol import Fault, LeaderAddress, RankJoined, decode_event, encode
from longctx.ring.processes.listener import Listener

LEADER_WAIT_SECONDS = 60.0  # that a follower's question may wait for rank 0


class Head:
    """The server's end of the rendezvous.

    The event loop awaits `next_leader`, starts that leader's engine, and calls `forget_leader` when
    it has ended, again and again; meanwhile followers are answered from threads of the listener.
    """

    def __init__(self, address: str, secret: bytes, ranks: int) -> None:
        """Listen at the address, as `channel.listen` takes it. Raises OSError."""
        self._ranks = ranks
        self._changed = threading.Condition()
        self._leader: RankJoined | None = None
        self._waiting: asyncio.Future[tuple[socket.socket, RankJoined]] | None = None
        self._listener = Listener(address, secret, self._answer)
        self.address = self._listener.address

    async def next_leader(self) -> tuple[socket.socket, RankJoined]:
        """Wait for the next rank 0 that connects; it then expects `Start`.

        Returns its connection and what it said.
        """
        with self._changed:
            self._waiting = asyncio.get_running_loop().create_future()
        return await self._waiting

    def forget_leader(self) -> None:
        """Note that the leader has ended: followers that ask now wait for the next one."""
        with self._changed:
            self._leader = None

    def close(self) -> None:
        """Accept no more ranks."""
        self._listener.close()

    def _answer(self, connection: socket.socket, message: bytes) -> None:
        joined = decode_event(message)
        assert isinstance(joined, RankJoined), joined
        if joined.rank == 0 and joined.ranks == self._ranks:
            self._accept_leader(connection, joined)
            return
        channel = Channel(connection)
        with contextlib.suppress(ConnectionLost):
            channel.send(encode(self._leader_address(joined)))
        channel.close()

    def _accept_leader(self, connection: socket.socket, joined: RankJoined) -> None:
        with self._changed:
            waiting = self._waiting
            if waiting is None:  # a second leader: one of the two belongs to an older attempt
                connection.close()
                return
            self._waiting, self._leader = None, joined
            self._changed.notify_all()

        def hand_over() -> None:
            if waiting.done():
                connection.close()  # nobody awaits it any more
            else:
                waiting.set_result((connection, joined))

        with contextlib.suppress(RuntimeError):  # the loop has ended
            waiting.get_loop().call_soon_threadsafe(hand_over)

    def _leader_address(self, joined: RankJoined) -> LeaderAddress:
        if joined.ranks != self._ranks:
            message = f"torchrun started {joined.ranks} ranks, the head has --ranks {self._ranks}"
            return LeaderAddress("", Fault.of(EngineDied(message)))
        with self._changed:
            self._changed.wait_for(lambda: self._leader is not None, LEADER_WAIT_SECONDS)
            if self._leader is None:
                return LeaderAddress("", Fault.of(PeerLost("rank 0 has not connected yet")))
            return LeaderAddress(self._leader.address)
