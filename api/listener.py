"""The server's listening socket, bound before anything that takes time."""

import socket

from api.config import ServerConfig
from longctx.errors import LongctxError

BACKLOG = 2048


def listen(config: ServerConfig) -> socket.socket:
    """Opens the listening socket, where clients wait while the model loads. Raises LongctxError."""
    try:
        family, _, _, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        # Named, or asyncio would not switch Nagle's algorithm off: 40 ms on every answer.
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(BACKLOG)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise LongctxError(
            f"cannot listen on {config.host}:{config.port}: {error.strerror}; choose another "
            "--port, 0 for a free one"
        ) from error
    return listener
