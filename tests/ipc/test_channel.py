"""Messages come whole and in order, and both ends notice when the other one is gone."""

import socket
import threading
from pathlib import Path

import pytest

from longctx.errors import ConnectionLost
from longctx.ipc.channel import Channel, connect, frame, listen


def test_a_frame_is_a_length_and_a_body() -> None:
    assert frame(b"ok") == b"\x02\x00\x00\x00ok"


@pytest.mark.parametrize("address", ["unix:{folder}/socket", "127.0.0.1:0"])
def test_messages_of_several_threads_come_whole(address: str, tmp_path: Path) -> None:
    listener = listen(address.format(folder=tmp_path))
    if not address.startswith("unix:"):
        address = "{}:{}".format(*listener.getsockname())
    caller = Channel(connect(address.format(folder=tmp_path), 5))
    connection, _ = listener.accept()
    receiver = Channel(connection)
    bodies = [bytes([number]) * (1000 * number) for number in range(1, 9)]
    threads = [threading.Thread(target=caller.send, args=(body,)) for body in bodies]
    for thread in threads:
        thread.start()
    received = [receiver.receive() for _ in bodies]
    for thread in threads:
        thread.join()
    assert sorted(body for body in received if body is not None) == sorted(bodies)
    for end in (caller, receiver, listener):
        end.close()


def test_closing_wakes_who_receives_and_fails_who_sends() -> None:
    ours, theirs = (Channel(end) for end in socket.socketpair())
    received: list[bytes | None] = [b"nothing yet"]
    thread = threading.Thread(target=lambda: received.append(ours.receive()))
    thread.start()
    ours.close()
    thread.join()
    assert received[-1] is None
    assert theirs.receive() is None
    with pytest.raises(ConnectionLost, match="the connection is closed"):
        theirs.send(b"anybody?")
    theirs.close()
