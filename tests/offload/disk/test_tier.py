"""The disk tier when nothing goes wrong: round trips, restarts, bounds, who leaves first."""

import os
import stat
import threading
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.block_run import PageSlots
from offload.disk.tier import DiskTier, FolderInUse, FolderRefused
from tests.offload.extents import (
    Time,
    blank,
    extent_files,
    filled,
    is_right,
    keys_of,
    open_tier,
    run_of,
    served,
    store,
)

FILE_BYTES = 4160 + 4 * 160  # of four blocks


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "kv"


@settings(max_examples=60, deadline=None)
@given(data=st.data(), page_bytes=st.lists(st.integers(1, 3000), min_size=1, max_size=4))
def test_pages_survive_the_trip_to_disk_and_a_restart(
    data: st.DataObject, page_bytes: list[int]
) -> None:
    sizes, count = tuple(page_bytes), data.draw(st.integers(1, 16))
    run = run_of("a", data.draw(st.integers(0, 1000)), count, group=data.draw(st.integers(0, 5)))
    wanted = data.draw(st.lists(st.sampled_from(run.keys), min_size=1, unique=True))
    with TemporaryDirectory() as folder:
        with closing(open_tier(Path(folder, "kv"))) as tier:
            assert tier.write(run, filled(run, sizes), cost_seconds=1.0, retained=False)
            before = blank(len(wanted), sizes)
            assert all(tier.read(run.group, wanted, before))
        with closing(open_tier(Path(folder, "kv"))) as tier:
            after = blank(len(wanted), sizes)
            assert all(tier.has(run.group, key) for key in run.keys)
            assert all(tier.read(run.group, wanted, after))
    for slots in (before, after):
        assert all(is_right(run.group, tuple(wanted), slots))


def test_one_read_spans_extents_and_gaps(folder: Path) -> None:
    with closing(open_tier(folder)) as tier:
        store(tier, run_of("a", 0, 4))
        store(tier, run_of("a", 8, 4))
        assert (
            served(tier, run_of("a", 0, 14)) == [True] * 4 + [False] * 4 + [True] * 4 + [False] * 2
        )
        assert not any(served(tier, run_of("a", 0, 4, group=1)))
        assert tier.stats().hits == 8
        assert tier.stats().misses == 10


def test_some_layers_can_be_read_alone(folder: Path) -> None:
    run = run_of("a", 0, 4)
    with closing(open_tier(folder)) as tier:
        store(tier, run)
        slots = PageSlots((np.zeros((4, 64), np.uint8),), (3, 1, 2, 0), first_layer=1)
        assert all(tier.read(0, run.keys, slots))
        assert all(is_right(0, run.keys, slots))


def test_compressed_pages_are_read_by_a_tier_that_does_not_compress(folder: Path) -> None:
    run = run_of("a", 0, 2)
    pages = np.tile(np.array([[7, 63], [9, 64]], np.uint8).reshape(1, -1), (2, 500))
    with closing(open_tier(folder, compress=True)) as tier:
        slots = PageSlots((pages,), (0, 1))
        assert tier.write(run, slots, cost_seconds=1.0, retained=False)
        assert tier.stats().held_bytes < 4160 + 0.8 * pages.size
    with closing(open_tier(folder)) as tier:
        again = np.zeros_like(pages)
        assert all(tier.read(0, run.keys, PageSlots((again,), (0, 1))))
        assert np.array_equal(again, pages)


def test_runs_that_fork_share_their_beginning_and_nothing_else(folder: Path) -> None:
    with closing(open_tier(folder)) as tier:
        one, other = run_of("a", 0, 4), run_of("b", 0, 4)
        fork = type(one)(one.namespace, 0, 0, one.parent, one.keys[:2] + other.keys[2:])
        for run in (one, fork):
            assert store(tier, run)
            assert all(served(tier, run))
        assert len(extent_files(folder)) == 2


def test_an_extent_is_written_once(folder: Path) -> None:
    with closing(open_tier(folder)) as tier:
        assert store(tier, run_of("a", 0, 4))
        assert store(tier, run_of("a", 0, 4), retained=True)
        assert tier.stats().extents_written == 1
        assert tier.entries()[0].meta.retained


def test_the_folder_is_closed_to_others(folder: Path) -> None:
    folder.mkdir(mode=0o755)
    with closing(open_tier(folder)) as tier:
        store(tier, run_of("a", 0, 1))
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in extent_files(folder))


def test_an_open_folder_with_other_files_is_refused(folder: Path) -> None:
    folder.mkdir(mode=0o755)
    (folder / "thesis.txt").write_text("mine")
    with pytest.raises(FolderRefused, match="chmod 700"):
        open_tier(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755


def test_a_second_writer_is_told_what_to_do(folder: Path) -> None:
    with (
        closing(open_tier(folder)),
        pytest.raises(FolderInUse, match=f"{folder} is in use .* choose another folder"),
    ):
        open_tier(folder)
    open_tier(folder).close()


def test_many_may_read_what_one_writes(folder: Path) -> None:
    run = run_of("a", 0, 4)
    with closing(open_tier(folder)) as writer:
        store(writer, run)
        before = sorted(os.listdir(folder))
        with (
            closing(open_tier(folder, read_only=True)) as reader,
            closing(open_tier(folder, read_only=True)) as another,
        ):
            assert all(served(reader, run)) and all(served(another, run))
            assert [entry.num_blocks for entry in reader.entries()] == [4]
            assert reader.verify().extents == 1
            writer.drop(run.keys)
            assert not any(served(reader, run))  # deleted underneath: a miss
        assert sorted(os.listdir(folder)) == [n for n in before if not n.endswith(".kv")]


def test_reading_only_changes_nothing(folder: Path) -> None:
    with closing(open_tier(folder)) as writer:
        store(writer, run_of("a", 0, 4))
    (file,) = extent_files(folder)
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    (folder / "x.kv.tmp").write_bytes(b"rubbish")
    before = sorted(os.listdir(folder))
    with closing(open_tier(folder, read_only=True)) as reader:
        assert served(reader, run_of("a", 0, 4)) == [True, True, True, False]
    assert sorted(os.listdir(folder)) == before


def test_there_is_nothing_to_read_where_nothing_was_stored(folder: Path) -> None:
    with pytest.raises(FolderRefused, match="nothing was ever stored"):
        open_tier(folder, read_only=True)


def test_the_cap_holds_and_the_least_recently_used_leaf_leaves(folder: Path) -> None:
    with closing(open_tier(folder, cap_bytes=4 * FILE_BYTES)) as tier:
        for chain in "ab":
            for first in (0, 4):
                store(tier, run_of(chain, first, 4))
        served(tier, run_of("a", 0, 8))
        store(tier, run_of("c", 0, 4))
        assert all(served(tier, run_of("a", 0, 8)))
        assert served(tier, run_of("b", 0, 8)) == [True] * 4 + [False] * 4
        assert tier.explain(0, keys_of("b", 5, 1)[0]) == "evicted"
        assert tier.explain(0, keys_of("b", 1, 1)[0]) is None
        assert tier.stats().evictions["cap"] == 1
        assert tier.stats().held_bytes == sum(f.stat().st_size for f in extent_files(folder))


def test_use_is_remembered_over_a_restart(folder: Path) -> None:
    time = Time()
    with closing(open_tier(folder, time=time)) as tier:
        for chain in "abc":
            time.passes(100)
            store(tier, run_of(chain, 0, 4))
        time.passes(100)
        served(tier, run_of("a", 0, 4))
    with closing(open_tier(folder, cap_bytes=FILE_BYTES, time=time)) as tier:
        assert all(served(tier, run_of("a", 0, 4)))
        assert len(extent_files(folder)) == 1


def test_what_is_retained_leaves_only_for_what_is(folder: Path) -> None:
    with closing(open_tier(folder, cap_bytes=2 * FILE_BYTES)) as tier:
        assert store(tier, run_of("a", 0, 4), retained=True)
        assert store(tier, run_of("b", 0, 4))
        assert store(tier, run_of("c", 0, 4))  # b leaves
        tier.retain(run_of("c", 0, 1).keys)
        assert not store(tier, run_of("d", 0, 4))
        assert tier.stats().incidents["refusals"] == 1
        assert store(tier, run_of("e", 0, 4), retained=True)  # a leaves
        assert tier.has(0, keys_of("c", 0, 1)[0]) and not tier.has(0, keys_of("a", 0, 1)[0])
        tier.release(run_of("c", 0, 1).keys)
        assert store(tier, run_of("d", 0, 4))  # c leaves
        assert not tier.has(0, keys_of("c", 0, 1)[0])


def test_retention_is_remembered_over_a_restart(folder: Path) -> None:
    with closing(open_tier(folder)) as tier:
        store(tier, run_of("a", 0, 4), retained=True)
        store(tier, run_of("b", 0, 4))
    with closing(open_tier(folder, cap_bytes=FILE_BYTES)) as tier:
        assert tier.has(0, keys_of("a", 0, 1)[0]) and not tier.has(0, keys_of("b", 0, 1)[0])


def test_a_chain_that_fills_the_cap_keeps_its_beginning(folder: Path) -> None:
    with closing(open_tier(folder, cap_bytes=3 * FILE_BYTES)) as tier:
        stored = [store(tier, run_of("a", first, 4), retained=True) for first in range(0, 24, 4)]
        assert stored == [True] * 3 + [False] * 3
        assert served(tier, run_of("a", 0, 24)) == [True] * 12 + [False] * 12


def test_an_extent_larger_than_the_cap_is_not_stored(folder: Path) -> None:
    with closing(open_tier(folder, cap_bytes=FILE_BYTES - 1)) as tier:
        assert not store(tier, run_of("a", 0, 4))
        assert not extent_files(folder)


def test_what_nobody_uses_expires(folder: Path) -> None:
    time = Time()
    with closing(open_tier(folder, ttl_seconds=100, time=time)) as tier:
        store(tier, run_of("a", 0, 4), retained=True)
        store(tier, run_of("b", 0, 4), retained=True)
        time.passes(80)
        assert all(served(tier, run_of("a", 0, 4)))
        time.passes(80)
        assert not any(served(tier, run_of("b", 0, 4)))
        assert tier.gc().expired == 1
        assert tier.explain(0, keys_of("b", 0, 1)[0]) == "expired"
        assert all(served(tier, run_of("a", 0, 4)))
    time.passes(200)
    with closing(open_tier(folder, ttl_seconds=100, time=time)) as tier:
        assert not any(served(tier, run_of("a", 0, 4)))
        assert not extent_files(folder)


def test_a_key_in_two_extents_is_served_while_one_is_left(folder: Path) -> None:
    with closing(open_tier(folder)) as tier:
        early, late = run_of("a", 0, 4), run_of("a", 2, 4)
        store(tier, early)
        store(tier, late)
        os.remove(next(f for f in extent_files(folder) if late.keys[-1].hex() in f.name))
        assert served(tier, late) == [False] * 4  # noticed here
        assert served(tier, late) == [True, True, False, False]


def test_dropped_blocks_are_gone_and_so_is_a_file_of_nothing_else(folder: Path) -> None:
    run = run_of("a", 0, 4)
    with closing(open_tier(folder)) as tier:
        store(tier, run)
        store(tier, run_of("a", 0, 4, group=1))
        tier.drop(run.keys[2:])
        assert served(tier, run) == [True, True, False, False]
        assert tier.explain(0, run.keys[3]) == "deleted"
        assert len(extent_files(folder)) == 2
        assert store(tier, run) and all(served(tier, run))  # the file had them still
        tier.drop(run.keys[:1])
        tier.drop(run.keys[1:])
        assert not extent_files(folder)
        assert tier.stats().held_bytes == 0


def test_threads_may_read_write_and_drop_at_once(folder: Path) -> None:
    runs = [run_of(chain, 0, 4) for chain in "abcdefgh"]
    failures: list[BaseException] = []

    def go(seed: int, tier: DiskTier) -> None:
        random = np.random.default_rng(seed)
        try:
            for _ in range(60):
                run = runs[random.integers(len(runs))]
                match random.integers(6):
                    case 0 | 1:
                        store(tier, run, retained=bool(random.integers(2)))
                    case 2 | 3:
                        served(tier, run)
                    case 4:
                        tier.drop(run.keys[: random.integers(5)])
                    case _:
                        tier.gc(), tier.verify(), tier.stats(), tier.entries()
        except BaseException as error:
            failures.append(error)

    with closing(open_tier(folder, cap_bytes=5 * FILE_BYTES)) as tier:
        threads = [threading.Thread(target=go, args=(seed, tier)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures, failures
        stats = tier.stats()
        assert stats.held_bytes == sum(f.stat().st_size for f in extent_files(folder))
        assert stats.corrupt_files == 0
        assert len(extent_files(folder)) == stats.extents == len(tier.entries())


def test_entries_tell_chain_by_chain_what_is_there(folder: Path) -> None:
    time = Time()
    with closing(open_tier(folder, time=time)) as tier:
        store(tier, run_of("a", 4, 2))
        time.passes(10)
        store(tier, run_of("a", 0, 4), retained=True)
        first, second = tier.entries()
        assert (first.meta.run.first_block, first.num_blocks, first.meta.retained) == (0, 4, True)
        assert (second.meta.run.first_block, second.num_blocks) == (4, 2)
        assert not second.meta.retained
        assert first.meta.created_at - second.meta.created_at == 10
        assert first.file_bytes == FILE_BYTES


def test_verify_reads_everything_and_repairs_the_index(folder: Path, tmp_path: Path) -> None:
    runs = [run_of(chain, 0, 4) for chain in "abcd"]
    with closing(open_tier(folder)) as tier:
        for run in runs:
            store(tier, run)
        files = {run: next(folder.glob(f"{run.keys[-1].hex()}*")) for run in runs}
        damaged = bytearray(files[runs[0]].read_bytes())
        damaged[-100] ^= 4
        files[runs[0]].write_bytes(damaged)
        files[runs[1]].unlink()
        files[runs[2]].rename(tmp_path / "aside")
        served(tier, runs[2])  # forgotten
        (tmp_path / "aside").rename(files[runs[2]])
        lines: list[str] = []
        found = tier.verify(lines.append)
        assert (found.extents, found.corrupt, found.missing) == (2, 1, 1)
        assert found.num_bytes == 2 * FILE_BYTES
        assert [line.split(": ")[0] for line in lines] == [files[runs[0]].name, files[runs[1]].name]
        assert [all(served(tier, run)) for run in runs] == [False, False, True, True]
        assert [file.name for file in (folder / "quarantine").iterdir()] == [files[runs[0]].name]
        assert tier.verify(lines.append).corrupt == 0 and len(lines) == 2
