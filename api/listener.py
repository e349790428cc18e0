"""The server's listening socket, bound before anything that takes time; how many may connect."""

import contextlib
import resource
import socket

from api.config import ServerConfig
from longctx.errors import LongctxError

BACKLOG = 2048
# Some hard limits are a billion, and code that loops over all descriptors takes minutes then.
MOST_DESCRIPTORS = 1 << 16
# For databases, logs, other processes, and files that are opened for a moment.
RESERVED_DESCRIPTORS = 128


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


def raise_descriptor_limit() -> None:
    """Raises the soft limit of open files to the hard one: shells set it low, for old programs.

    Processes that are started later inherit it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _at_most(hard)
    if _at_most(soft) < wanted:
        with contextlib.suppress(OSError, ValueError):  # it stays as it is; `most_connections` asks
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def most_connections() -> int:
    """Returns for how many connections there are descriptors: each may have a file open as well."""
    descriptors = _at_most(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    reserved = min(RESERVED_DESCRIPTORS, descriptors // 2)
    return max(1, (descriptors - reserved) // 2)


def _at_most(limit: int) -> int:
    return MOST_DESCRIPTORS if limit == resource.RLIM_INFINITY else min(limit, MOST_DESCRIPTORS)
