"""Who knows the secret is heard, who does not is turned away, and both in the time allowed."""

import contextlib
import socket
import threading
import time

import pytest

from longctx.errors import AuthenticationFailed, ConnectionLost
from longctx.ipc import handshake
from longctx.ipc.channel import HEADER, Channel
from longctx.ipc.handshake import authenticate, receive_first_message
from tests.support.waiting import patience, patient

SECRET = b"s" * 32


def dribble(connection: socket.socket, pause_seconds: float) -> None:
    """Send a byte after each pause, until nobody listens."""
    with contextlib.suppress(OSError):
        while True:
            connection.sendall(b"x")
            time.sleep(pause_seconds)


def test_a_listener_reads_the_first_message_and_leaves_the_next_one() -> None:
    ours, theirs = socket.socketpair()

    def call() -> None:
        authenticate(theirs, SECRET)
        caller = Channel(theirs)
        for body in (b"first", b"second"):
            caller.send(body)

    thread = threading.Thread(target=call)
    thread.start()
    with ours, theirs:
        assert receive_first_message(ours, SECRET) == b"first"
        assert Channel(ours).receive() == b"second"
        thread.join()


def test_another_secret_is_found_by_both_ends() -> None:
    ours, theirs = socket.socketpair()
    failures: list[str] = []

    def call() -> None:
        try:
            authenticate(theirs, b"t" * 32)
        except AuthenticationFailed as error:
            failures.append(str(error))

    thread = threading.Thread(target=call)
    thread.start()
    with ours, theirs:
        with pytest.raises(AuthenticationFailed, match="another secret"):
            receive_first_message(ours, SECRET)
        thread.join()
    assert failures == ["the other end has another secret; give both the same file"]


def test_a_proof_cannot_be_sent_back_as_ones_own() -> None:
    """Who knows nothing and repeats what it hears proves nothing."""
    ours, theirs = socket.socketpair()

    def repeat() -> None:
        while heard := theirs.recv(64):
            theirs.sendall(heard)

    thread = threading.Thread(target=repeat)
    thread.start()
    with ours, theirs:
        with pytest.raises(AuthenticationFailed, match="another secret"):
            authenticate(ours, SECRET)
        ours.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.mark.parametrize("proves", [False, True])
@pytest.mark.parametrize("dribbling", [False, True], ids=["silent", "dribbling"])
def test_a_caller_has_one_deadline(
    proves: bool, dribbling: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many bytes it sends: for its proof and its first message together."""
    allowed_seconds = 0.4 * patience()
    monkeypatch.setattr(handshake, "HANDSHAKE_SECONDS", allowed_seconds)
    ours, theirs = socket.socketpair()

    def call() -> None:
        if proves:
            authenticate(theirs, SECRET)
            theirs.sendall(HEADER.pack(1000))
        if dribbling:
            dribble(theirs, allowed_seconds / 20)

    thread = threading.Thread(target=call)
    thread.start()
    began = time.monotonic()
    with ours, theirs:
        with pytest.raises(
            ConnectionLost if proves else AuthenticationFailed,
            match="says nothing" if proves else "secret",
        ):
            receive_first_message(ours, SECRET)
        # A dribbler would need over three times as long for the 64 bytes of nonce and proof.
        assert 0.75 * allowed_seconds < time.monotonic() - began < allowed_seconds + patient(2.6)
        ours.shutdown(socket.SHUT_RDWR)
        thread.join()
