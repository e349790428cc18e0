"""KVStore over a disk that obeys: what is told, when, and what the engine never waits for."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import cast

import pytest

from offload.block_run import BlockRun
from offload.eviction import LRU
from offload.host import HostTier
from offload.key import GroupKey
from offload.store import Event, KVStore, Late, Loaded, Written
from offload.tier_names import TierName
from tests.offload.asked_store import ended, offer, write
from tests.offload.memory_disk import (
    PAGE_BYTES,
    MemoryDisk,
    blank_slots,
    chain,
    filled_slots,
    key,
    pages,
)

DEADLINE_SECONDS = 5.0


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def disk() -> Iterator[MemoryDisk]:
    disk = MemoryDisk()
    yield disk
    disk.go_on_reading.set()
    disk.go_on_writing.set()


@pytest.fixture
def clock() -> Clock:
    return Clock()


def host_tier(blocks: int) -> HostTier:
    return HostTier(
        capacity_bytes=blocks * sum(PAGE_BYTES), page_bytes=PAGE_BYTES, policy=LRU[GroupKey]()
    )


@pytest.fixture
def store(disk: MemoryDisk, clock: Clock) -> Iterator[KVStore]:
    store = KVStore([disk], read_deadline_seconds=DEADLINE_SECONDS, clock=clock)
    with closing(store):
        yield store
        disk.go_on_reading.set()
        disk.go_on_writing.set()


@pytest.fixture
def host() -> HostTier:
    return host_tier(100)


@pytest.fixture
def hosted(host: HostTier, disk: MemoryDisk, clock: Clock) -> Iterator[KVStore]:
    store = KVStore([host, disk], read_deadline_seconds=DEADLINE_SECONDS, clock=clock)
    with closing(store):
        yield store


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.001)


def test_what_was_offered_can_be_loaded(store: KVStore) -> None:
    run = chain(1, 5)
    ticket = offer(store, run)
    assert ended(store, ticket) == Written(ticket, True)
    assert all(store.has(0, name) and store.durable(0, name) for name in run.keys)
    slots = blank_slots(5)
    ticket = store.load([(0, run.keys, slots)])
    assert ended(store, ticket) == Loaded(ticket, ((True,) * 5,))
    assert pages(slots) == pages(filled_slots(run))


def test_a_load_has_several_groups_and_tells_what_is_missing(store: KVStore) -> None:
    write(store, chain(1, 4, group=0))
    write(store, chain(3, 2, group=1))
    wanted = chain(1, 6).keys
    first, second = blank_slots(6), blank_slots(2)
    ticket = store.load([(0, wanted, first), (1, wanted[2:4], second)])
    event = ended(store, ticket)
    assert event == Loaded(ticket, ((True,) * 4 + (False,) * 2, (True,) * 2))
    assert pages(first)[:4] == pages(filled_slots(chain(1, 4)))
    assert pages(second) == pages(filled_slots(chain(3, 2, group=1)))


def test_a_load_of_nothing_ends_at_once(store: KVStore) -> None:
    ticket = store.load([])
    assert store.poll() == [Loaded(ticket, ())]


def test_loads_are_read_by_extents_and_in_parallel(store: KVStore, disk: MemoryDisk) -> None:
    run = chain(1, 40)
    write(store, run)
    disk.go_on_reading.clear()
    slots = blank_slots(40)
    ticket = store.load([(0, run.keys, slots)])
    until(lambda: len(disk.reads) == 2)  # both readers are at it
    disk.go_on_reading.set()
    assert ended(store, ticket) == Loaded(ticket, ((True,) * 40,))
    assert sorted(map(len, disk.reads)) == [8, 16, 16]
    assert pages(slots) == pages(filled_slots(run))


def test_the_engine_does_not_wait_for_the_writer(store: KVStore, disk: MemoryDisk) -> None:
    disk.go_on_writing.clear()
    run = chain(1, 4)
    slots = filled_slots(run)
    ticket = offer(store, run, slots)
    assert store.queued_bytes == 4 * sum(PAGE_BYTES)
    assert store.poll() == []
    assert not store.flush(0.01)
    disk.go_on_writing.set()
    assert store.flush(10)
    assert store.poll() == [Written(ticket, True)]
    assert store.queued_bytes == 0


def test_only_what_is_not_there_yet_is_written(store: KVStore, disk: MemoryDisk) -> None:
    write(store, chain(3, 2))
    write(store, chain(1, 6))
    pieces = [(run.first_block, run.parent, run.keys) for run in disk.runs[1:]]
    assert pieces == [
        (0, key(0), (key(1), key(2))),
        (4, key(4), (key(5), key(6))),
    ]
    ticket = offer(store, chain(1, 6))
    assert store.poll() == [Written(ticket, True)]  # nothing to do: told at once


def test_a_full_disk_is_told_and_forgiven(store: KVStore, disk: MemoryDisk) -> None:
    disk.full = True
    ticket = offer(store, chain(1, 2))
    assert ended(store, ticket) == Written(ticket, False)
    assert not store.has(0, key(1))
    disk.full = False
    write(store, chain(1, 2))


def test_a_bug_below_ends_no_thread(
    store: KVStore, disk: MemoryDisk, caplog: pytest.LogCaptureFixture
) -> None:
    write(store, chain(1, 2))
    disk.bug = RuntimeError("what nobody thought of")
    for _ in range(3):
        ticket = offer(store, chain(5, 2))
        assert ended(store, ticket) == Written(ticket, False)
        ticket = store.load([(0, (key(1),), blank_slots(1))])
        assert ended(store, ticket) == Loaded(ticket, ((False,),))
    disk.bug = None
    write(store, chain(5, 2))
    assert store.stats().failures == 6
    assert "what nobody thought of" in caplog.text


def test_a_slow_read_is_late_and_its_keys_are_avoided_for_a_while(
    store: KVStore, disk: MemoryDisk, clock: Clock
) -> None:
    run = chain(1, 40)
    write(store, run)
    disk.go_on_reading.clear()
    ticket = store.load([(0, run.keys, blank_slots(40))])
    until(lambda: len(disk.reads) == 2)
    clock.now += DEADLINE_SECONDS
    assert store.poll() == []
    clock.now += 0.1
    assert store.poll() == [Late(ticket)]
    assert store.poll() == []  # told once
    assert not any(store.has(0, name) for name in run.keys)
    assert store.durable(0, key(1))
    assert store.explain(0, key(1)) == "slow"
    disk.go_on_reading.set()
    found = (True,) * 32 + (False,) * 8  # what was not begun is not read any more
    assert ended(store, ticket) == Loaded(ticket, (found,))
    assert len(disk.reads) == 2
    clock.now += 61
    assert all(store.has(0, name) for name in run.keys)
    assert store.stats().loads_late == 1


def test_time_in_the_queue_does_not_count(disk: MemoryDisk, clock: Clock) -> None:
    run, events = chain(1, 3), list[Event]()

    def slowly() -> None:
        clock.now += DEADLINE_SECONDS - 0.1
        events.extend(store.poll())

    with closing(
        KVStore([disk], threads=1, read_deadline_seconds=DEADLINE_SECONDS, clock=clock)
    ) as store:
        write(store, run)
        disk.while_reading = slowly
        tickets = [store.load([(0, (name,), blank_slots(1))]) for name in run.keys]
        until(lambda: events.extend(store.poll()) or len(events) == 3)
    assert events == [Loaded(ticket, ((True,),)) for ticket in tickets]


def test_loads_that_no_reader_is_left_for_are_late_too(
    store: KVStore, disk: MemoryDisk, clock: Clock
) -> None:
    run = chain(1, 48)
    write(store, run)
    disk.go_on_reading.clear()
    first = store.load([(0, run.keys[:32], blank_slots(32))])
    until(lambda: len(disk.reads) == 2)
    second = store.load([(0, run.keys[32:], blank_slots(16))])
    clock.now += DEADLINE_SECONDS + 1
    assert store.poll() == [Late(first), Late(second), Loaded(second, ((False,) * 16,))]


def test_wait_returns_when_a_load_becomes_late(disk: MemoryDisk) -> None:
    with closing(KVStore([disk], read_deadline_seconds=0.05)) as store:
        write(store, chain(1, 2))
        disk.go_on_reading.clear()
        ticket = store.load([(0, (key(1),), blank_slots(1))])
        begin = time.monotonic()
        store.wait(10)
        assert time.monotonic() - begin < 5
        assert store.poll() == [Late(ticket)]
        disk.go_on_reading.set()


def test_wait_ends_with_its_timeout_and_with_an_event(store: KVStore, disk: MemoryDisk) -> None:
    begin = time.monotonic()
    store.wait(0.02)
    assert 0.02 <= time.monotonic() - begin < 5
    disk.go_on_writing.clear()
    offer(store, chain(1, 1))
    threading.Timer(0.02, disk.go_on_writing.set).start()
    store.wait(10)
    assert store.poll()


def test_a_key_that_cannot_be_read_is_avoided(
    store: KVStore, disk: MemoryDisk, clock: Clock
) -> None:
    write(store, chain(1, 3))
    disk.unreadable = {key(2)}
    ticket = store.load([(0, chain(1, 3).keys, blank_slots(3))])
    assert ended(store, ticket) == Loaded(ticket, ((True, False, True),))
    assert [store.has(0, name) for name in chain(1, 3).keys] == [True, False, True]
    clock.now += 61
    assert store.has(0, key(2))


def test_what_was_read_from_disk_comes_from_host_memory_next_time(
    disk: MemoryDisk, clock: Clock
) -> None:
    run = chain(1, 20)
    with closing(KVStore([disk], read_deadline_seconds=1.0)) as store:
        write(store, run)
    with closing(KVStore([host_tier(100), disk], read_deadline_seconds=1.0)) as store:
        for _ in range(2):
            slots = blank_slots(20)
            ticket = store.load([(0, run.keys, slots)])
            assert ended(store, ticket) == Loaded(ticket, ((True,) * 20,))
            assert pages(slots) == pages(filled_slots(run))
        assert sum(map(len, disk.reads)) == 20
        assert store.stats().tiers["host"].hits == 20


def test_what_is_offered_is_in_host_memory_even_if_the_disk_is_full(
    hosted: KVStore, disk: MemoryDisk
) -> None:
    disk.full = True
    run = chain(1, 3)
    ticket = offer(hosted, run)
    assert ended(hosted, ticket) == Written(ticket, False)
    assert hosted.has(0, key(1)) and not hosted.durable(0, key(1))
    slots = blank_slots(3)
    ticket = hosted.load([(0, run.keys, slots)])
    assert ended(hosted, ticket) == Loaded(ticket, ((True,) * 3,))
    assert pages(slots) == pages(filled_slots(run))


def test_a_load_takes_from_both_tiers(hosted: KVStore, host: HostTier, disk: MemoryDisk) -> None:
    run = chain(1, 12)
    write(hosted, run)
    host.drop([key(4), key(5), key(9)])
    slots = blank_slots(12)
    ticket = hosted.load([(0, run.keys, slots)])
    assert ended(hosted, ticket) == Loaded(ticket, ((True,) * 12,))
    assert pages(slots) == pages(filled_slots(run))
    assert disk.reads == [(key(4), key(5)), (key(9),)]


def test_a_third_tier_needs_no_more_than_its_place_in_the_list(
    host: HostTier, disk: MemoryDisk, clock: Clock
) -> None:
    far, run = MemoryDisk(cast(TierName, "far")), chain(1, 6)
    with closing(KVStore([disk, far], read_deadline_seconds=9.0)) as store:
        write(store, run)
    assert disk.blocks == far.blocks
    disk.drop([key(1), key(2)])
    tiers = [host, disk, far]
    with closing(KVStore(tiers, read_deadline_seconds=9.0, clock=clock)) as store:
        assert [store.tier_of(0, name) for name in run.keys] == ["far"] * 2 + ["disk"] * 4
        slots = blank_slots(6)
        ticket = store.load([(0, run.keys, slots)])
        assert ended(store, ticket) == Loaded(ticket, ((True,) * 6,))
        assert pages(slots) == pages(filled_slots(run))
        assert (disk.reads, far.reads) == ([run.keys[2:]], [run.keys[:2]])
        assert all(host.has(0, name) for name in run.keys)
        store.retain("it", run.keys)
        assert store.flush(10)
        assert far.retained == set(run.keys) and not disk.retained  # the lowest keeps it
        store.delete("it")
        assert store.flush(10)
        assert not disk.blocks and not far.blocks and not host.has(0, key(1))


def test_what_no_document_retains_any_more_is_dropped_from_every_tier(
    hosted: KVStore, disk: MemoryDisk
) -> None:
    write(hosted, chain(1, 6))
    write(hosted, BlockRun(key(0), 0, 5, key(55), (key(56),)))  # of another chain
    hosted.retain("first", [key(number) for number in (1, 2, 3, 4)])
    hosted.retain("second", [key(number) for number in (1, 2, 5)])
    hosted.delete("first")
    # Keys 3 and 4 were retained by the first alone
    assert [number for number in range(1, 7) if hosted.has(0, key(number))] == [1, 2, 5, 6]
    assert hosted.flush(10)
    assert not disk.has(0, key(3)) and not hosted.has(0, key(3))
    assert disk.has(0, key(1))
    # Key 6 follows 5, which is owned, and goes with it: without its beginning it is of no use
    assert disk.has(0, key(6))
    hosted.delete("second")
    assert hosted.flush(10)
    assert {number for _, number in disk.blocks} == {key(56)}


def test_a_deleted_key_is_gone_at_once_and_can_come_back(hosted: KVStore, disk: MemoryDisk) -> None:
    run = chain(1, 2)
    hosted.retain("it", run.keys)
    write(hosted, run)
    disk.go_on_writing.clear()
    offer(hosted, chain(9, 1))  # holds up the writer
    hosted.delete("it")
    assert not hosted.has(0, key(1)) and not hosted.durable(0, key(1))
    assert hosted.explain(0, key(1)) == "deleted"
    again = offer(hosted, run, filled_slots(run, seed=1))
    disk.go_on_writing.set()
    assert ended(hosted, again) == Written(again, True)
    slots = blank_slots(2)
    assert ended(hosted, hosted.load([(0, run.keys, slots)]))
    assert pages(slots) == pages(filled_slots(run, seed=1))


def test_who_retains_a_key_again_before_it_is_deleted_keeps_it(
    store: KVStore, disk: MemoryDisk
) -> None:
    store.retain("old", chain(1, 2).keys)
    write(store, chain(1, 2))
    disk.go_on_writing.clear()
    offer(store, chain(9, 1))
    store.delete("old")
    store.retain("new", [key(1)])
    disk.go_on_writing.set()
    assert store.flush(10)
    assert store.durable(0, key(1)) and not store.durable(0, key(2))


def test_a_key_deleted_while_it_is_read_does_not_stay_in_host_memory(
    hosted: KVStore, host: HostTier, disk: MemoryDisk
) -> None:
    hosted.retain("it", [key(1)])
    write(hosted, chain(1, 1))
    host.drop([key(1)])
    disk.go_on_reading.clear()
    ticket = hosted.load([(0, (key(1),), blank_slots(1))])
    until(lambda: disk.reads)
    hosted.delete("it")
    assert hosted.flush(10)
    disk.go_on_reading.set()
    ended(hosted, ticket)
    assert not hosted.has(0, key(1))


def test_the_tiers_know_what_is_retained(store: KVStore, disk: MemoryDisk) -> None:
    write(store, chain(1, 3))
    store.retain("it", [key(1), key(2)])
    store.retain("it", [key(2), key(3)])
    store.retain("other", [key(3)])
    assert store.flush(10)
    assert disk.retained == {key(1), key(2), key(3)}
    store.release("it")
    assert store.flush(10)
    assert disk.retained == {key(3)}
    assert all(store.durable(0, key(number)) for number in (1, 2, 3))
    store.retain("next", [key(7)])
    write(store, chain(7, 1))
    assert key(7) in disk.retained


def test_a_document_that_the_device_answers_counts_as_used_below(
    store: KVStore, disk: MemoryDisk, clock: Clock
) -> None:
    store.retain("it", [key(1), key(2)])
    for seconds in (0, 1, 58, 1, 1):
        clock.now += seconds
        store.use("it")
    assert store.flush(10)
    assert disk.used == [{key(1), key(2)}] * 2


def test_retaining_a_million_tokens_takes_milliseconds(store: KVStore) -> None:
    keys = [key(number) for number in range(16_000)]
    begin = time.process_time()
    store.retain("it", keys)
    store.delete("it")
    assert time.process_time() - begin < 0.5  # 10 ms where nothing else runs


def test_bandwidth_is_measured(store: KVStore) -> None:
    assert store.read_bytes_per_second == 100e6
    run = chain(1, 16)
    write(store, run)
    ended(store, store.load([(0, run.keys, blank_slots(16))]))
    assert store.read_bytes_per_second != 100e6


def test_stats_are_those_of_the_store_and_of_each_tier(hosted: KVStore) -> None:
    write(hosted, chain(1, 2))
    stats = hosted.stats()
    assert stats.tiers["disk"].extents == 1
    assert stats.tiers["host"].blocks == 2
    assert stats.queued_bytes == 0


def test_explain_knows_the_tier_below(store: KVStore) -> None:
    write(store, chain(1, 1))
    assert store.explain(0, key(1)) is None
    assert store.explain(0, key(2)) == "expired"


def test_close_ends_the_threads(disk: MemoryDisk) -> None:
    before = set(threading.enumerate())
    store = KVStore([disk], threads=3, read_deadline_seconds=1.0)
    threads = set(threading.enumerate()) - before
    assert sorted(thread.name for thread in threads) == [
        "longctx-read-0",
        "longctx-read-1",
        "longctx-read-2",
        "longctx-write",
    ]
    store.close()
    assert not any(thread.is_alive() for thread in threads)
    assert disk.closed


def test_close_does_not_wait_for_a_disk_that_hangs(disk: MemoryDisk) -> None:
    store = KVStore([disk], read_deadline_seconds=1.0)
    write(store, chain(1, 1))
    disk.go_on_reading.clear()
    store.load([(0, (key(1),), blank_slots(1))])
    until(lambda: disk.reads)
    begin = time.monotonic()
    store.close(deadline_seconds=0.1)
    assert time.monotonic() - begin < 5
