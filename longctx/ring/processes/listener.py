"""Where other processes call: who knows the secret is heard, and nobody keeps anybody waiting."""

import contextlib
import socket
import threading
from collections.abc import Callable

from longctx.errors import AuthenticationFailed, ConnectionLost
from longctx.ipc.channel import listen
from longctx.ipc.handshake import receive_first_message


class Listener:
    """Each caller has a thread of its own, so that strangers who say nothing hold up no other."""

    def __init__(
        self, address: str, secret: bytes, heard: Callable[[socket.socket, bytes], None]
    ) -> None:
        """`heard` gets each connection with its first message, from any thread. Raises OSError."""
        self._secret, self._heard = secret, heard
        self._listener = listen(address)
        self.address = address
        if not address.startswith("unix:"):
            host, port = self._listener.getsockname()[:2]
            self.address = f"{host}:{port}"
        threading.Thread(target=self._listen, name="longctx-listener", daemon=True).start()

    def close(self) -> None:
        """Take no more calls; who has called already is still heard."""
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
            body = receive_first_message(connection, self._secret)
        except (AuthenticationFailed, ConnectionLost):
            connection.close()
            return
        self._heard(connection, body)
