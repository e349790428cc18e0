"""Accepts connections of processes that know the secret; strangers keep nobody waiting."""

import contextlib
import socket
import threading
from collections.abc import Callable

from longctx.errors import AuthenticationFailed, ConnectionLost
from longctx.ipc.channel import listen
from longctx.ipc.handshake import receive_first_message

RETRY_SECONDS = 0.2  # after a connection that could not be accepted


class Listener:
    """Accepts connections from a thread of its own, until it is closed.

    Each connection is authenticated by another thread, so strangers that say nothing delay no one.
    """

    def __init__(
        self, address: str, secret: bytes, on_message: Callable[[socket.socket, bytes], None]
    ) -> None:
        """Listen at the address, as `channel.listen` takes it. Raises OSError.

        `on_message` gets each authenticated connection, and its first message, on that connection's
        thread. The connection is its own then.
        """
        self._secret, self._on_message = secret, on_message
        self._closed = threading.Event()
        self._listener = listen(address)
        self.address = address
        if not address.startswith("unix:"):
            host, port = self._listener.getsockname()[:2]
            self.address = f"{host}:{port}"
        threading.Thread(target=self._accept, name="longctx-listener", daemon=True).start()

    def close(self) -> None:
        """Accept no more connections; those accepted already are still authenticated."""
        self._closed.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._listener.close()

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:  # closed, ended by the caller, or no descriptor left for now
                self._closed.wait(RETRY_SECONDS)
                continue
            threading.Thread(target=self._authenticate, args=(connection,), daemon=True).start()

    def _authenticate(self, connection: socket.socket) -> None:
        try:
            body = receive_first_message(connection, self._secret)
        except (AuthenticationFailed, ConnectionLost):
            connection.close()
            return
        self._on_message(connection, body)
