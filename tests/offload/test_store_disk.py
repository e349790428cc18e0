"""KVStore over real files: what one process wrote, the next one loads."""

import random
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from offload.disk.tier import DiskBounds, DiskTier, DiskTierConfig
from offload.eviction import GDSF, LRU
from offload.host import HostTier
from offload.key import GroupKey
from offload.store import KVStore, Late, Loaded, Written
from tests.offload.asked_store import ended, offer, write
from tests.offload.extents import open_tier
from tests.offload.memory_disk import PAGE_BYTES, blank_slots, chain, filled_slots, key, pages

OpenStore = Callable[..., KVStore]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "kv"


@pytest.fixture
def open_store(folder: Path) -> OpenStore:
    def open_it(*, host_blocks: int = 0, cap_bytes: int | None = None) -> KVStore:
        config = DiskTierConfig(folder=folder, bounds=DiskBounds(cap_bytes=cap_bytes))
        disk = DiskTier(config, GDSF[str]())
        host = HostTier(
            capacity_bytes=max(host_blocks, 1) * sum(PAGE_BYTES),
            page_bytes=PAGE_BYTES,
            policy=LRU[GroupKey](),
        )
        return KVStore([host, disk] if host_blocks else [disk], read_deadline_seconds=30.0)

    return open_it


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.kv"))


def test_what_one_process_wrote_the_next_one_loads(open_store: OpenStore, folder: Path) -> None:
    runs = [chain(1, 16), chain(17, 16), chain(33, 5), chain(28, 10, group=1)]
    with closing(open_store()) as store:
        for run in runs:
            offer(store, run)
        assert store.flush(30)
        assert [event.ok for event in store.poll() if isinstance(event, Written)] == [True] * 4
    assert len(files(folder)) == 4
    with closing(open_store()) as store:
        wanted = chain(1, 37).keys
        global_slots, window_slots = blank_slots(37), blank_slots(10)
        ticket = store.load([(0, wanted, global_slots), (1, runs[3].keys, window_slots)])
        assert ended(store, ticket) == Loaded(ticket, ((True,) * 37, (True,) * 10))
        assert pages(global_slots) == pages(filled_slots(chain(1, 37)))
        assert pages(window_slots) == pages(filled_slots(runs[3]))
        assert store.stats().tiers["disk"].hits == 47


def test_a_flipped_bit_is_a_miss_and_the_block_can_be_written_again(
    open_store: OpenStore, folder: Path
) -> None:
    run = chain(1, 4)
    with closing(open_store()) as store:
        write(store, run)
        (file,) = files(folder)
        raw = bytearray(file.read_bytes())
        raw[-1] ^= 4
        file.write_bytes(raw)
        slots = blank_slots(4)
        event = ended(store, store.load([(0, run.keys, slots)]))
        assert isinstance(event, Loaded)
        (found,) = event.found
        assert not all(found)
        right = pages(filled_slots(run))
        for here, page, expected in zip(found, pages(slots), right, strict=True):
            assert page == expected or not here
        lost = [name for name in run.keys if not store.has(0, name)]
        assert lost
        assert store.explain(0, lost[0]) == "corrupt"
        write(store, run)
        event = ended(store, store.load([(0, run.keys, slots)]))
        assert event == Loaded(event.ticket, ((True,) * 4,))
        assert pages(slots) == right


def test_a_document_in_use_does_not_grow_old(tmp_path: Path) -> None:
    now = [1000.0]  # the time of day, with which the steady clock agrees
    disk = DiskTier(
        DiskTierConfig(folder=tmp_path, bounds=DiskBounds(ttl_seconds=100.0)),
        LRU[str](),
        clock=lambda: now[0],
        steady_clock=lambda: now[0],
    )
    with closing(KVStore([disk], read_deadline_seconds=30.0)) as store:
        store.retain("used", chain(1, 20).keys)
        for first, count in ((1, 16), (17, 4), (500, 16)):
            write(store, chain(first, count))
        now[0] += 80
        store.use("used")
        assert store.flush(30)
        now[0] += 80
        disk.gc()
        assert [store.has(0, key(number)) for number in (1, 20, 500)] == [True, True, False]
        assert store.explain(0, key(500)) == "expired"


def test_a_deleted_document_leaves_no_file(open_store: OpenStore, folder: Path) -> None:
    with closing(open_store(host_blocks=50)) as store:
        store.retain("document", chain(1, 40).keys)
        store.retain("other", chain(1, 16).keys)
        for first, count in ((1, 16), (17, 16), (33, 8)):
            write(store, chain(first, count))
        store.delete("document")
        assert store.flush(30)
        assert len(files(folder)) == 1
        store.delete("other")
        assert store.flush(30)
        assert files(folder) == []


@pytest.mark.parametrize("host_blocks", [0, 12])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_small_store_forgets_but_is_never_wrong(
    open_store: OpenStore, folder: Path, host_blocks: int, seed: int
) -> None:
    """Documents, prompts, deletions and restarts at random, in a tenth of the room they want."""
    rng = random.Random(seed)
    cap_bytes, evictions = 20_000, 0.0

    def roots(document: int) -> int:
        return 1 + 1000 * document

    store = open_store(host_blocks=host_blocks, cap_bytes=cap_bytes)
    for _ in range(120):
        document = rng.randrange(8)
        first = roots(document) + 16 * rng.randrange(3)
        run = chain(first, rng.choice((16, 16, 5)), group=rng.choice((0, 0, 1)))
        match rng.choice(("offer", "offer", "load", "load", "retain", "delete", "restart")):
            case "offer":
                offer(store, run)
            case "load":
                slots = blank_slots(len(run.keys))
                event = ended(store, store.load([(run.group, run.keys, slots)]))
                assert isinstance(event, Loaded)
                right = pages(filled_slots(run))
                for here, page, expected in zip(event.found[0], pages(slots), right, strict=True):
                    assert page == expected or not here
            case "retain":
                store.retain(f"{document}", run.keys)
            case "delete":
                (store.delete if rng.random() < 0.7 else store.release)(f"{document}")
            case "restart" if rng.random() < 0.3:
                assert store.flush(30)
                evictions += store.stats().tiers["disk"].evictions["cap"]
                store.close()
                store = open_store(host_blocks=host_blocks, cap_bytes=cap_bytes)
        assert store.stats().tiers["disk"].held_bytes <= cap_bytes
        assert not any(isinstance(event, Late) for event in store.poll())
    assert store.flush(30)
    assert (
        sum(file.stat().st_size for file in files(folder)) == store.stats().tiers["disk"].held_bytes
    )
    assert evictions + store.stats().tiers["disk"].evictions["cap"] > 0
    store.close()
    assert not list(folder.glob("*.tmp"))


def test_cost_is_shared_out_and_retention_passed_on(tmp_path: Path) -> None:
    disk = open_tier(tmp_path / "kv")
    with closing(KVStore([disk], read_deadline_seconds=30.0)) as store:
        store.retain("it", [key(18)])
        write(store, chain(1, 16))
        ticket = store.offer(
            chain(13, 8), filled_slots(chain(13, 8)), cost_seconds=8.0, retained=False
        )
        assert ended(store, ticket) == Written(ticket, True)
        first, second = disk.entries()
        assert (second.meta.run.first_block, second.num_blocks) == (16, 4)
        assert second.meta.cost_seconds == 4.0
        assert second.meta.retained and not first.meta.retained
