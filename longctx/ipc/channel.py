"""Messages over a socket between two processes, and the sockets that carry them.

A frame is four bytes of length, little-endian, and a body: b"ok" is sent as 02 00 00 00 6f 6b.
"""

import contextlib
import socket
import struct
import threading
import time

from longctx.errors import ConnectionLost

HEADER = struct.Struct("<I")


def frame(body: bytes) -> bytes:
    """Return the body with its length in front."""
    return HEADER.pack(len(body)) + body


class Channel:
    """One end of a connection that carries whole messages.

    Any thread may send; one thread receives. `close` may come from any thread and ends both.
    """

    def __init__(self, connection: socket.socket) -> None:
        """Take over the connection: `close` closes it."""
        self._connection = connection
        self._sending = threading.Lock()
        self._stream = connection.makefile("rb")
        self.received_at = time.monotonic()  # when the last message came

    def send(self, body: bytes) -> None:
        """Send one message. Raises ConnectionLost where nobody is there to hear it."""
        try:
            with self._sending:
                self._connection.sendall(frame(body))
        except OSError as error:
            raise ConnectionLost(f"the connection is closed: {error}") from error

    def receive(self) -> bytes | None:
        """Wait for the next message; return None when the other end is gone."""
        try:
            header = self._stream.read(HEADER.size)
            if len(header) < HEADER.size:
                return None
            (length,) = HEADER.unpack(header)
            body = self._stream.read(length)
        except OSError:
            return None
        self.received_at = time.monotonic()
        return body if len(body) == length else None

    def close(self) -> None:
        """End the connection; a thread that waits in `receive` gets None."""
        with contextlib.suppress(OSError):  # the other end was first
            self._connection.shutdown(socket.SHUT_RDWR)  # wakes the thread in `receive`
        self._connection.close()


def listen(address: str) -> socket.socket:
    """Listen at `unix:PATH` or `HOST:PORT`; port 0 means any that is free. Raises OSError."""
    if address.startswith("unix:"):
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(address.removeprefix("unix:"))
        listener.listen()
        return listener
    host, port = _host_and_port(address)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family)


def connect(address: str, timeout_seconds: float) -> socket.socket:
    """Connect to an address as `listen` takes it. Raises OSError.

    The timeout is for connecting alone; the connection that is returned has none.
    """
    if address.startswith("unix:"):
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(timeout_seconds)
        try:
            connection.connect(address.removeprefix("unix:"))
        except OSError:
            connection.close()
            raise
    else:
        connection = socket.create_connection(_host_and_port(address), timeout_seconds)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.settimeout(None)
    return connection


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)
