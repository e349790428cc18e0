"""Mutual authentication of two processes that know the same secret, where strangers could connect.

Each end sends a nonce, then a proof: the HMAC of its role and both nonces under the secret. The
secret itself is never sent, a recorded proof fits no other nonces, and the role keeps an end from
sending the other one's proof back to it.
"""

import hashlib
import hmac
import secrets
import socket
import time

from longctx.errors import AuthenticationFailed, ConnectionLost
from longctx.ipc.channel import HEADER

HANDSHAKE_SECONDS = 10.0
NONCE_BYTES = 32

CALLER, LISTENER = b"caller", b"listener"
_OTHER_ROLE = {CALLER: LISTENER, LISTENER: CALLER}


def authenticate(connection: socket.socket, secret: bytes) -> None:
    """Prove to a listener that this caller knows the secret, and check that it does, too.

    Raises AuthenticationFailed where the listener has another secret or takes longer than
    `HANDSHAKE_SECONDS`. The caller then closes the connection.
    """
    _exchange_proofs(connection, secret, CALLER, time.monotonic() + HANDSHAKE_SECONDS)


def receive_first_message(connection: socket.socket, secret: bytes) -> bytes:
    """Authenticate a caller; return its first message without reading a byte beyond it.

    Proof and message must both arrive within `HANDSHAKE_SECONDS`.
    Raises AuthenticationFailed, and ConnectionLost where the proof is right and no message comes.
    """
    deadline = time.monotonic() + HANDSHAKE_SECONDS
    _exchange_proofs(connection, secret, LISTENER, deadline)
    try:
        (length,) = HEADER.unpack(_read(connection, HEADER.size, deadline))
        body = _read(connection, length, deadline)
    except OSError as error:
        raise ConnectionLost(f"the other end says nothing: {error}") from error
    connection.settimeout(None)
    return body


def _exchange_proofs(
    connection: socket.socket, secret: bytes, role: bytes, deadline: float
) -> None:
    own_nonce = secrets.token_bytes(NONCE_BYTES)
    try:
        connection.settimeout(_seconds_until(deadline))
        connection.sendall(own_nonce)
        other_nonce = _read(connection, NONCE_BYTES, deadline)
        connection.sendall(_proof(secret, role, own_nonce, other_nonce))
        received = _read(connection, hashlib.sha256().digest_size, deadline)
    except OSError as error:
        raise AuthenticationFailed(
            f"the other end did not show that it knows the secret: {error}"
        ) from error
    expected = _proof(secret, _OTHER_ROLE[role], other_nonce, own_nonce)
    if not hmac.compare_digest(received, expected):
        raise AuthenticationFailed("the other end has another secret; give both the same file")
    connection.settimeout(None)


def _proof(secret: bytes, role: bytes, own_nonce: bytes, other_nonce: bytes) -> bytes:
    return hmac.digest(secret, role + own_nonce + other_nonce, "sha256")


def _read(connection: socket.socket, length: int, deadline: float) -> bytes:
    body = b""
    while len(body) < length:
        # A time-out is for one call alone: set it anew, or whoever dribbles bytes could go on.
        connection.settimeout(_seconds_until(deadline))
        received = connection.recv(length - len(body))
        if not received:
            raise ConnectionResetError("closed")
        body += received
    return body


def _seconds_until(deadline: float) -> float:
    """Return the seconds that are left. Raises TimeoutError where there are none."""
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError("timed out")
    return seconds
