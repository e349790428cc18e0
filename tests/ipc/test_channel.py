"""Messages over a socket: what a sender learns of the other end."""

import socket

import pytest

from longctx.errors import ConnectionLost, PeerLost
from longctx.ipc.channel import Channel


def test_a_closed_connection_is_no_lost_rank() -> None:
    """With a single process there is no rank, and a closed socket is an error all the same."""
    ours, theirs = socket.socketpair()
    theirs.close()
    channel = Channel(ours)
    with pytest.raises(ConnectionLost, match="the connection is closed"):
        channel.send(b"x")
    channel.close()
    assert not issubclass(ConnectionLost, PeerLost)
