"""How ranks gather while some are late, and while strangers connect, too."""

import asyncio
import contextlib
import queue
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn
from unittest import mock

import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from longctx.errors import LongctxError, PeerLost
from longctx.ipc import handshake
from longctx.ipc.channel import Channel, connect
from longctx.ipc.protocol import Heartbeat, decode_event, encode
from longctx.ring.processes import listener as listener_module
from longctx.ring.processes import rendezvous
from longctx.ring.processes.head import Head
from longctx.ring.processes.rendezvous import FollowerRendezvous, LeaderRendezvous, RankCoordinates
from tests.support.waiting import patient

SECRET = b"s" * 32


@pytest.fixture
def head(tmp_path: Path) -> Iterator[Head]:
    head = Head(f"unix:{tmp_path}/head", SECRET, ranks=2)
    yield head
    head.close()


def coordinates(rank: int) -> RankCoordinates:
    return RankCoordinates(rank=rank, ranks=2, local_rank=rank, local_ranks=2)


def leading_rank(head: Head) -> LeaderRendezvous:
    return LeaderRendezvous(head.address, SECRET, coordinates(0))


def following_rank(head: Head) -> FollowerRendezvous:
    return FollowerRendezvous(head.address, SECRET, coordinates(1))


def dribble(connection: socket.socket) -> None:
    """Send a byte now and then, until nobody listens."""
    with contextlib.suppress(OSError):
        while True:
            connection.sendall(b"x")
            time.sleep(0.02)


def test_a_call_that_cannot_be_taken_for_want_of_descriptors_is_taken_later(
    tmp_path: Path,
) -> None:
    taking = mock.Mock(wraps=listener_module.listen(f"unix:{tmp_path}/head"))
    accept, failures = taking.accept, [OSError(24, "Too many open files")]
    taking.accept = lambda: accept() if not failures else raise_one(failures)
    heard: queue.Queue[socket.socket] = queue.Queue()
    with mock.patch.object(listener_module, "listen", lambda address: taking):
        listener = listener_module.Listener(
            f"unix:{tmp_path}/head", SECRET, lambda connection, body: heard.put(connection)
        )
    connection = connect(listener.address, patient())
    handshake.authenticate(connection, SECRET)
    calling = Channel(connection)
    calling.send(encode(Heartbeat()))
    heard.get(timeout=patient()).close()
    assert not failures
    calling.close()
    listener.close()


def raise_one(failures: list[OSError]) -> NoReturn:
    raise failures.pop()


def test_the_head_hears_of_rank_0_while_it_waits_for_others(head: Head) -> None:
    async def test() -> None:
        with ThreadPoolExecutor() as threads:
            calling = asyncio.ensure_future(head.next_leader())
            await asyncio.sleep(0)
            leading = threads.submit(leading_rank, head)
            connection, _ = await calling
            at_the_head = Channel(connection)
            for _ in range(2):
                body = await asyncio.to_thread(at_the_head.receive)
                assert body is not None and isinstance(decode_event(body), Heartbeat)
            assert not leading.done()
            follower = await asyncio.to_thread(following_rank, head)
            leader = await asyncio.wrap_future(leading)
            assert list(leader.followers) == [1]
            for end in (follower.channel, leader.channel, leader.followers[1], at_the_head):
                end.close()

    asyncio.run(test())


@pytest.mark.parametrize("dribbling", [False, True], ids=["silent", "dribbling"])
def test_strangers_keep_no_rank_waiting(
    head: Head, dribbling: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handshake, "HANDSHAKE_SECONDS", patient())

    async def test() -> None:
        with ThreadPoolExecutor() as threads:
            calling = asyncio.ensure_future(head.next_leader())
            await asyncio.sleep(0)
            leading = threads.submit(leading_rank, head)
            connection, joined = await calling
            strangers = [connect(each, 5) for each in (head.address, joined.address) * 4]
            for stranger in strangers if dribbling else ():
                threading.Thread(target=dribble, args=(stranger,), daemon=True).start()
            began = time.monotonic()
            follower = await asyncio.to_thread(following_rank, head)
            leader = await asyncio.wrap_future(leading)
            assert time.monotonic() - began < handshake.HANDSHAKE_SECONDS / 2
            for end in (follower.channel, leader.channel, leader.followers[1]):
                end.close()
            for end in (connection, *strangers):
                end.close()

    asyncio.run(test())


def test_ranks_that_do_not_come_are_named(head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "GATHERING_SECONDS", 0.2)

    async def test() -> None:
        calling = asyncio.ensure_future(head.next_leader())
        await asyncio.sleep(0)
        with pytest.raises(PeerLost, match=r"ranks \[1\] did not come"):
            await asyncio.to_thread(leading_rank, head)
        (await calling)[0].close()

    asyncio.run(test())


def test_where_the_group_meets_is_open_at_one_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")  # or it would be set for all tests
    head = Head("127.0.0.1:0", SECRET, ranks=1)

    async def test() -> None:
        calling = asyncio.ensure_future(head.next_leader())
        await asyncio.sleep(0)
        alone = RankCoordinates(rank=0, ranks=1, local_rank=0, local_ranks=1)
        leader = await asyncio.to_thread(LeaderRendezvous, head.address, SECRET, alone)
        connection, _ = await calling
        store, name = leader._open_store()
        host, _, port = name.rpartition(":")
        member = TCPStore(host, int(port), is_master=False)
        member.set("word", "said")
        assert store.get("word") == b"said"
        with pytest.raises(ConnectionRefusedError):
            connect(f"127.0.0.2:{port}", 5)
        connection.close()
        leader.channel.close()

    asyncio.run(test())
    head.close()


def test_a_process_that_torchrun_did_not_start_is_no_rank() -> None:
    with pytest.raises(LongctxError, match="RANK is not set; ranks are started by torchrun"):
        RankCoordinates.of({})
