"""Who may join the ranks, how they find each other, and whose silence is noticed."""

import asyncio
import errno
import os
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from longctx.errors import AuthenticationFailed, LongctxError
from longctx.ipc.channel import Channel, connect
from longctx.ipc.handshake import authenticate
from longctx.ipc.protocol import Heartbeat, LeaderAddress, RankJoined, decode_command, encode
from longctx.ring.processes import heartbeat
from longctx.ring.processes.head import Head
from longctx.ring.processes.heartbeat import HeartbeatMonitor, send_heartbeats
from longctx.ring.processes.rendezvous import RankCoordinates
from longctx.ring.processes.secret import make_secret, read_secret
from tests.support.waiting import patience, patient, wait_for

SECRET = b"s" * 32


@pytest.fixture
def head(tmp_path: Path) -> Iterator[Head]:
    head = Head(f"unix:{tmp_path}/head", SECRET, ranks=3)
    yield head
    head.close()


def call(head: Head, joined: RankJoined, secret: bytes = SECRET) -> Channel:
    connection = connect(head.address, 5)
    try:
        authenticate(connection, secret)
    except AuthenticationFailed:
        connection.close()
        raise
    channel = Channel(connection)
    channel.send(encode(joined))
    return channel


def test_ranks_learn_from_the_head_where_rank_0_is(head: Head) -> None:
    def ask(rank: int) -> object:
        channel = call(head, RankJoined(rank, 3, 1000 + rank))
        body = channel.receive()
        channel.close()
        assert body is not None
        return decode_command(body)

    async def test() -> None:
        with ThreadPoolExecutor() as threads:
            early = threads.submit(ask, 1)  # it waits for rank 0
            leading = asyncio.ensure_future(head.next_leader())
            await asyncio.sleep(0.1)
            leader = await asyncio.to_thread(call, head, RankJoined(0, 3, 1000, "unix:/there"))
            connection, joined = await leading
            assert joined.pid == 1000
            late = threads.submit(ask, 2)
            for asked in (early, late):
                assert await asyncio.wrap_future(asked) == LeaderAddress("unix:/there")
            leader.close()
            connection.close()

    asyncio.run(test())


def test_another_number_of_ranks_is_refused(head: Head) -> None:
    channel = call(head, RankJoined(1, 4, 1))
    body = channel.receive()
    channel.close()
    assert body is not None
    refused = decode_command(body)
    assert isinstance(refused, LeaderAddress) and refused.fault is not None
    assert refused.fault.message == "torchrun started 4 ranks, the head has --ranks 3"


def test_who_does_not_know_the_secret_is_not_heard(head: Head) -> None:
    with pytest.raises(AuthenticationFailed, match="secret"):
        call(head, RankJoined(0, 3, 1), secret=b"t" * 32)


def test_a_secret_is_made_once_and_private(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    assert make_secret(file) == make_secret(file) == read_secret(file)
    assert file.stat().st_mode & 0o777 == 0o600
    file.write_text("short")
    with pytest.raises(LongctxError, match="holds 5 characters, a secret has at least 32"):
        read_secret(file)
    with pytest.raises(LongctxError, match="cannot read"):
        read_secret(tmp_path / "nothing")


def test_a_start_that_fails_leaves_no_half_of_a_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    file = tmp_path / "secret"
    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", full)
        with pytest.raises(LongctxError, match="No space left on device"):
            make_secret(file)
    assert list(tmp_path.iterdir()) == []
    assert make_secret(file) == read_secret(file)
    assert list(tmp_path.iterdir()) == [file]


def test_heads_that_start_together_have_one_secret(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    with ThreadPoolExecutor(8) as threads:
        assert len(set(threads.map(make_secret, [file] * 8))) == 1


def test_a_process_that_torchrun_did_not_start_is_no_rank() -> None:
    with pytest.raises(LongctxError, match="RANK is not set; ranks are started by torchrun"):
        RankCoordinates.of({})


def test_who_says_nothing_is_lost_and_who_beats_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "HEARTBEAT_SECONDS", 0.05)
    lost: list[tuple[float, str]] = []
    silence_seconds = 0.5 * patience()
    silent, silent_end = socket.socketpair()
    beating, beating_end = socket.socketpair()
    receiver = Channel(beating)
    listening = threading.Thread(target=lambda: list(iter(receiver.receive, None)), daemon=True)
    listening.start()
    began = time.monotonic()
    monitor = HeartbeatMonitor(
        {"rank 1": Channel(silent), "rank 2": receiver},
        lambda reason: lost.append((time.monotonic() - began, reason)),
    )
    monitor.silence_seconds = silence_seconds
    send_heartbeats([Channel(beating_end)], encode(Heartbeat()))
    wait_for(lambda: lost)
    seconds, reason = lost[0]
    assert 0.8 * silence_seconds < seconds < silence_seconds + patient(4.5)
    assert reason.startswith("rank 1 has sent nothing for")
    assert not any("rank 2" in reason for _, reason in lost)
    for end in (silent, silent_end, beating, beating_end):
        end.close()
