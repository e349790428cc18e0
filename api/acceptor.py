"""Accepts connections, never more than the process has descriptors for.

asyncio's own server accepts whatever comes, and logs a traceback for each that it cannot have.
"""

import asyncio
import contextlib
import logging
import socket
from typing import Any, Protocol

from uvicorn.protocols.http.h11_impl import H11Protocol

logger = logging.getLogger("longctx.api")

IDLE_SECONDS = 1.0  # a connection that has been idle for so long gives way to a new one
RETRY_SECONDS = 1.0  # after an accept that failed for want of something else than room here


class Connection(H11Protocol):
    """One connection of uvicorn's, which also knows since when it is idle."""

    def __init__(self, *arguments: Any, lost: asyncio.Event, **options: Any) -> None:
        """`lost` is set when the connection has ended."""
        super().__init__(*arguments, **options)
        self._lost = lost
        self.idle_since = self.loop.time()

    @property
    def idle(self) -> bool:
        """Tells whether no request is being answered and no end is under way."""
        answered = self.cycle is None or self.cycle.response_complete
        return answered and not self.transport.is_closing()

    def data_received(self, data: bytes) -> None:
        self.idle_since = self.loop.time()
        super().data_received(data)

    def on_response_complete(self) -> None:
        self.idle_since = self.loop.time()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._lost.set()


class MakeConnection(Protocol):
    """Makes the protocol of a new connection, as `Connection` with this `lost`."""

    def __call__(self, *, lost: asyncio.Event) -> Connection: ...


class Acceptor:
    """Accepts on a listening socket until `close`, on the event loop that it is made on.

    Where there are `limit` connections and one more comes, the one that has been idle for longest
    is closed; where all are busy, the new one waits until one ends.
    """

    def __init__(
        self,
        listener: socket.socket,
        make_connection: MakeConnection,
        connections: set[Any],
        *,
        limit: int,
    ) -> None:
        """`connections`: those that are open, kept by the connections themselves."""
        listener.setblocking(False)
        self._listener = listener
        self._make_connection = make_connection
        self._connections = connections
        self._limit = limit
        self._lost = asyncio.Event()
        self._told: set[str] = set()
        self._accepting = asyncio.create_task(self._accept())

    async def close(self) -> None:
        """Accepts no more; open connections stay."""
        self._accepting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._accepting

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                accepted, _ = await loop.sock_accept(self._listener)
            except ConnectionAbortedError:  # by the client, in the backlog
                continue
            except OSError as error:
                self._tell_once(f"cannot accept connections: {error.strerror}; trying again")
                await asyncio.sleep(RETRY_SECONDS)
                continue
            try:
                await self._until_there_is_room()
                await loop.connect_accepted_socket(
                    lambda: self._make_connection(lost=self._lost), accepted
                )
            except OSError:  # the client has gone already
                accepted.close()
            except asyncio.CancelledError:
                accepted.close()
                raise

    async def _until_there_is_room(self) -> None:
        loop = asyncio.get_running_loop()
        while len(self._connections) >= self._limit:
            self._tell_once(
                f"{self._limit:,} connections are open, as many as the limit of open files has "
                "room for: idle ones are closed for new ones, and while all are busy new ones "
                "wait; a higher hard limit (ulimit -Hn, LimitNOFILE=) allows more"
            )
            self._lost.clear()
            idle = [connection for connection in self._connections if connection.idle]
            first = min(idle, key=lambda connection: connection.idle_since, default=None)
            if first is not None and loop.time() - first.idle_since >= IDLE_SECONDS:
                first.shutdown()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._lost.wait(), IDLE_SECONDS)

    def _tell_once(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            logger.warning("longctx: %s", text)
