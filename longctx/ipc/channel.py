"""Messages over a socket between two processes: four bytes of length, little-endian, and a body.

Several threads may send. Where strangers could connect, both ends first `prove` that they know the
same secret, which does not travel.
"""

import contextlib
import hashlib
import hmac
import secrets
import socket
import threading
import time

from longctx.errors import AuthenticationFailed, ConnectionLost
from longctx.ipc.protocol import HEADER

PROVING_SECONDS = 10.0
NONCE_BYTES = 32


class Channel:
    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._sending = threading.Lock()
        self._stream = connection.makefile("rb")
        self.received_at = time.monotonic()  # when the last message came

    def send(self, body: bytes) -> None:
        """Raises ConnectionLost where nobody is there to hear it."""
        try:
            with self._sending:
                self._connection.sendall(HEADER.pack(len(body)) + body)
        except OSError as error:
            raise ConnectionLost(f"the connection is closed: {error}") from error

    def receive(self) -> bytes | None:
        """The next message; None when the other end is gone."""
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
        with contextlib.suppress(OSError):  # the other end was first
            self._connection.shutdown(socket.SHUT_RDWR)  # wakes who waits in `receive`
        self._connection.close()


def listen(address: str) -> socket.socket:
    """At `unix:PATH` or `HOST:PORT`, port 0 for any. Raises OSError."""
    if address.startswith("unix:"):
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(address.removeprefix("unix:"))
        listener.listen()
        return listener
    host, port = _host_and_port(address)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family)


def connect(address: str, timeout_seconds: float) -> socket.socket:
    """Raises OSError."""
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


def prove(connection: socket.socket, secret: bytes, *, caller: bool) -> None:
    """Show that this end knows the secret, and see that the other one does.

    `caller`: this end has connected, the other one was listening.
    Raises AuthenticationFailed.
    """
    _prove(connection, secret, caller, time.monotonic() + PROVING_SECONDS)


def first_word(connection: socket.socket, secret: bytes) -> bytes:
    """The first message of a caller who shows that it knows the secret, and not a byte more.

    Proof and message have to be there after `PROVING_SECONDS`.
    Raises AuthenticationFailed, ConnectionLost.
    """
    deadline = time.monotonic() + PROVING_SECONDS
    _prove(connection, secret, False, deadline)
    try:
        (length,) = HEADER.unpack(_read(connection, HEADER.size, deadline))
        body = _read(connection, length, deadline)
    except OSError as error:
        raise ConnectionLost(f"the other end says nothing: {error}") from error
    connection.settimeout(None)
    return body


def _prove(connection: socket.socket, secret: bytes, caller: bool, deadline: float) -> None:
    own = secrets.token_bytes(NONCE_BYTES)
    try:
        connection.settimeout(_left(deadline))
        connection.sendall(own)
        other = _read(connection, NONCE_BYTES, deadline)
        connection.sendall(_proof(secret, caller, own, other))
        theirs = _read(connection, hashlib.sha256().digest_size, deadline)
    except OSError as error:
        raise AuthenticationFailed(
            f"the other end did not show that it knows the secret: {error}"
        ) from error
    if not hmac.compare_digest(theirs, _proof(secret, not caller, other, own)):
        raise AuthenticationFailed("the other end has another secret; give both the same file")
    connection.settimeout(None)


def _proof(secret: bytes, caller: bool, own: bytes, other: bytes) -> bytes:
    role = b"caller" if caller else b"listener"  # or a proof could be sent back as one's own
    return hmac.digest(secret, role + own + other, "sha256")


def _read(connection: socket.socket, length: int, deadline: float) -> bytes:
    found = b""
    while len(found) < length:
        connection.settimeout(_left(deadline))  # of one call: who dribbles gets no more in all
        part = connection.recv(length - len(found))
        if not part:
            raise ConnectionResetError("closed")
        found += part
    return found


def _left(deadline: float) -> float:
    """Seconds; raises TimeoutError where there are none."""
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError("timed out")
    return seconds


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)
