"""The host tier: what goes in comes out, within its bound."""

import random
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from offload.block_run import BlockRun, PageSlots
from offload.eviction import LRU, POLICIES
from offload.host import HostTier
from offload.key import BlockKey, GroupKey
from tests.offload.memory_disk import PAGE_BYTES, blank_slots, chain, filled_slots, key, pages

BLOCK_BYTES = sum(PAGE_BYTES)


def host_tier(blocks: int) -> HostTier:
    return HostTier(
        capacity_bytes=blocks * BLOCK_BYTES, page_bytes=PAGE_BYTES, policy=LRU[GroupKey]()
    )


def put(host: HostTier, run: BlockRun, *, retained: bool = False) -> int:
    return host.put(
        run.group,
        run.keys,
        filled_slots(run),
        parent=run.parent,
        cost_seconds=1.0,
        retained=retained,
    )


def held(host: HostTier, numbers: range) -> list[int]:
    return [number for number in numbers if host.has(0, key(number))]


def test_pages_come_out_as_they_went_in() -> None:
    host = host_tier(40)
    for run in (chain(1, 7), chain(8, 3), chain(1, 2, group=1)):
        assert put(host, run) == len(run.keys)
    for run in (chain(1, 10), chain(1, 2, group=1)):
        slots = blank_slots(len(run.keys))
        assert host.read(run.group, run.keys, slots) == [True] * len(run.keys)
        assert pages(slots) == pages(filled_slots(run))


def test_a_missing_key_leaves_its_page_alone() -> None:
    host = host_tier(40)
    put(host, chain(1, 1))
    slots = blank_slots(2)
    assert host.read(0, (key(1), key(2)), slots) == [True, False]
    assert not any(pages(slots)[1])
    assert host.read(1, (key(1),), blank_slots(1)) == [False]


def test_the_least_recently_used_leaf_makes_room() -> None:
    host = host_tier(6)
    put(host, chain(1, 3))
    other = BlockRun(key(0), 0, 0, key(0), (key(11), key(12), key(13)))
    put(host, other)
    host.read(0, (key(1), key(2), key(3)), blank_slots(3))
    put(host, chain(4, 1))
    assert held(host, range(1, 20)) == [1, 2, 3, 4, 11, 12]
    assert host.explain(0, key(13)) == "evicted"
    assert host.explain(0, key(12)) is None
    assert host.stats().evictions["cap"] == 1


def test_what_was_said_to_be_used_stays() -> None:
    host = host_tier(2)
    for number in (1, 11):
        put(host, BlockRun(key(0), 0, 0, key(0), (key(number),)))
    host.use([key(1), key(99)])
    put(host, BlockRun(key(0), 0, 0, key(0), (key(21),)))
    assert held(host, range(1, 30)) == [1, 21]


def test_a_chain_larger_than_the_tier_does_not_displace_its_own_beginning() -> None:
    host = host_tier(4)
    assert put(host, chain(1, 7)) == 4
    assert held(host, range(1, 8)) == [1, 2, 3, 4]
    assert put(host, chain(5, 2)) == 0


def test_retained_blocks_leave_last() -> None:
    host = host_tier(2)
    put(host, chain(1, 1), retained=True)
    for number in (11, 21):
        put(host, BlockRun(key(0), 0, 0, key(0), (key(number),)))
    assert held(host, range(1, 30)) == [1, 21]
    host.release([key(1)])
    host.retain([key(21)])
    put(host, BlockRun(key(0), 0, 0, key(0), (key(31),)))
    assert held(host, range(1, 40)) == [21, 31]


def test_dropped_keys_leave_in_every_group() -> None:
    host = host_tier(9)
    put(host, chain(1, 2))
    put(host, chain(1, 2, group=3))
    host.drop([key(2), key(77)])
    assert not host.has(0, key(2)) and not host.has(3, key(2))
    assert host.has(0, key(1)) and host.has(3, key(1))
    assert host.explain(3, key(2)) == "deleted"
    assert host.stats().held_bytes == 2 * BLOCK_BYTES


class Allocator:
    """Allocates slabs, remembers their sizes, and refuses once it gave out `most_slabs`."""

    def __init__(self, most_slabs: int | None = None) -> None:
        self.given_bytes: list[int] = []
        self._most_slabs = most_slabs

    def __call__(self, size_bytes: int) -> NDArray[np.uint8]:
        if len(self.given_bytes) == self._most_slabs:
            raise MemoryError("the system pins no more")
        self.given_bytes.append(size_bytes)
        return np.full(size_bytes, 0xA5, dtype=np.uint8)


def test_slabs_are_allocated_when_they_are_needed_and_kept() -> None:
    allocate = Allocator()
    host = HostTier(
        capacity_bytes=9 * BLOCK_BYTES,
        page_bytes=PAGE_BYTES,
        policy=LRU[GroupKey](),
        allocate=allocate,
        slab_bytes=2 * BLOCK_BYTES,
    )
    assert not allocate.given_bytes
    assert host.stats().capacity_bytes == 8 * BLOCK_BYTES  # the ninth block is no whole slab
    slabs = []
    for number in range(1, 11):
        put(host, chain(number, 1))
        slabs.append(len(allocate.given_bytes))
    assert slabs == [1, 1, 2, 2, 3, 3, 4, 4, 4, 4]
    assert set(allocate.given_bytes) == {2 * BLOCK_BYTES}
    host.clear()
    put(host, chain(1, 8))
    assert len(allocate.given_bytes) == 4


def test_a_tier_that_gets_no_more_memory_stays_at_what_it_has_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    allocate = Allocator(most_slabs=2)
    host = HostTier(
        capacity_bytes=8 * BLOCK_BYTES,
        page_bytes=PAGE_BYTES,
        policy=LRU[GroupKey](),
        allocate=allocate,
        slab_bytes=2 * BLOCK_BYTES,
    )
    assert put(host, chain(1, 7)) == 4
    assert host.stats().capacity_bytes == 4 * BLOCK_BYTES
    (line,) = (record.getMessage() for record in caplog.records)
    assert "the system pins no more" in line and "--host-pool-gib" in line
    put(host, BlockRun(key(0), 0, 0, key(0), (key(11),)))
    assert held(host, range(1, 20)) == [1, 2, 3, 11]
    slots = blank_slots(3)
    assert all(host.read(0, chain(1, 3).keys, slots))
    assert pages(slots) == pages(filled_slots(chain(1, 3)))
    assert len(caplog.records) == 1


def test_a_tier_without_any_memory_keeps_nothing() -> None:
    host = HostTier(
        capacity_bytes=8 * BLOCK_BYTES,
        page_bytes=PAGE_BYTES,
        policy=LRU[GroupKey](),
        allocate=Allocator(most_slabs=0),
    )
    assert put(host, chain(1, 3)) == 0
    assert host.read(0, chain(1, 3).keys, blank_slots(3)) == [False] * 3
    stats = host.stats()
    assert (stats.held_bytes, stats.capacity_bytes, stats.blocks) == (0, 0, 0)


@pytest.mark.parametrize("name", sorted(POLICIES))
@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    page_bytes=st.lists(st.integers(1, 300), min_size=1, max_size=3),
    capacity_blocks=st.integers(1, 12),
    slab_bytes=st.integers(1, 2_000),
    most_slabs=st.none() | st.integers(0, 4),
)
def test_a_host_tier_behaves_like_a_dictionary_that_forgets(
    name: str,
    seed: int,
    page_bytes: list[int],
    capacity_blocks: int,
    slab_bytes: int,
    most_slabs: int | None,
) -> None:
    """With any pages and slabs, what is there is right, and never more than the capacity."""
    rng = random.Random(seed)
    capacity_bytes = capacity_blocks * sum(page_bytes)
    allocate = Allocator(most_slabs)
    host = HostTier(
        capacity_bytes=capacity_bytes,
        page_bytes=page_bytes,
        policy=POLICIES[name](),
        allocate=allocate,
        slab_bytes=slab_bytes,
    )
    random_bytes = np.random.default_rng(seed)
    arrays = tuple(random_bytes.integers(0, 256, (41, n), dtype=np.uint8) for n in page_bytes)
    for _ in range(60):
        first, count = rng.randrange(1, 37), rng.randrange(1, 5)
        keys = chain(first, count).keys
        slots = PageSlots(arrays, tuple(range(first, first + count)))
        match rng.choice(("put", "put", "read", "drop")):
            case "put":
                stored = host.put(
                    0, keys, slots, parent=key(first - 1), cost_seconds=1.0, retained=False
                )
                assert [host.has(0, name) for name in keys[:stored]] == [True] * stored
            case "read":
                target = PageSlots(tuple(np.zeros_like(array) for array in arrays), slots.pages)
                expected = [host.has(0, name) for name in keys]
                assert host.read(0, keys, target) == expected
                for row, here in zip(slots.pages, expected, strict=True):
                    for array, copy in zip(arrays, target.arrays, strict=True):
                        assert np.array_equal(copy[row], array[row] if here else 0 * copy[row])
            case "drop":
                host.drop(keys)
                assert not any(host.has(0, name) for name in keys)
        stats = host.stats()
        assert stats.capacity_bytes is not None
        assert stats.held_bytes <= stats.capacity_bytes <= capacity_bytes
        assert stats.held_bytes <= sum(allocate.given_bytes) <= capacity_bytes


def test_many_threads_use_one_tier() -> None:
    host = host_tier(20)
    faults: list[BlockKey] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(150):
            run = chain(rng.randrange(1, 60), 4)
            put(host, run)
            slots = blank_slots(4)
            found = host.read(0, run.keys, slots)
            right = pages(filled_slots(run))
            faults.extend(
                name
                for name, here, page, expected in zip(
                    run.keys, found, pages(slots), right, strict=True
                )
                if here and page != expected
            )

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
