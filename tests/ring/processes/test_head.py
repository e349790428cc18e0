"""Ranks learn from the head where rank 0 is, if they know the secret and their number is right."""

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from longctx.errors import AuthenticationFailed
from longctx.ipc.channel import Channel, connect
from longctx.ipc.handshake import authenticate
from longctx.ipc.protocol import LeaderAddress, RankJoined, decode_command, encode
from longctx.ring.processes.head import Head

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
