"""Whatever happens to the disk, the tier serves right pages or none, counts it and says so once."""

import errno
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.disk.tier import DiskTier
from tests.offload.disk.faulty_files import FaultyFiles
from tests.offload.extents import (
    Time,
    blank,
    extent_files,
    filled,
    open_tier,
    run_of,
    served,
    store,
)

FILE_BYTES = 4160 + 4 * 160  # of four blocks
RUN = run_of("a", 0, 4)
OTHER = run_of("b", 0, 4)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "kv"


def file_of_run(folder: Path) -> Path:
    (path,) = folder.glob(f"{RUN.keys[-1].hex()}-*")
    return path


def told(caplog: pytest.LogCaptureFixture, words: str) -> int:
    """Return the warnings that contain these words."""
    assert all(record.levelname == "WARNING" for record in caplog.records)
    return sum(words in record.getMessage() for record in caplog.records)


# -- files that are not what they were ----------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(byte=st.integers(0, FILE_BYTES - 1), bit=st.integers(0, 7), restart=st.booleans())
def test_a_flipped_bit_is_never_served(byte: int, bit: int, restart: bool) -> None:
    with TemporaryDirectory() as temporary:
        folder = Path(temporary, "kv")
        tier = open_tier(folder)
        for run in (RUN, OTHER):
            store(tier, run)
        path = file_of_run(folder)
        data = bytearray(path.read_bytes())
        data[byte] ^= 1 << bit
        path.write_bytes(data)
        if restart:
            tier.close()
            tier = open_tier(folder)
        with closing(tier):
            assert not all(served(tier, RUN)) and all(served(tier, OTHER))
            stats = tier.stats()
            assert stats.corrupt_files + stats.incidents["other_versions"] == 1
            assert os.listdir(folder / "quarantine") == [path.name]
            assert not any(served(tier, RUN))
            assert store(tier, RUN) and all(served(tier, RUN))  # computed again, stored again


@settings(max_examples=30, deadline=None)
@given(
    length=st.integers(0, FILE_BYTES + 10).filter(lambda n: n != FILE_BYTES), restart=st.booleans()
)
def test_a_file_of_another_length_is_never_served(length: int, restart: bool) -> None:
    with TemporaryDirectory() as temporary:
        folder = Path(temporary, "kv")
        tier = open_tier(folder)
        store(tier, RUN)
        os.truncate(file_of_run(folder), length)
        if restart:
            tier.close()
            tier = open_tier(folder)
        with closing(tier):
            assert not any(served(tier, RUN))
            assert tier.stats().corrupt_files == 1


def test_corruption_is_explained_and_told_once(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    runs = [run_of(chain, 0, 4) for chain in "abcdefgh"]
    with closing(open_tier(folder)) as tier:
        for run in runs:
            store(tier, run)
        for path in extent_files(folder):
            os.truncate(path, FILE_BYTES - 1)
        assert not any(any(served(tier, run)) for run in runs)
        assert tier.explain(0, RUN.keys[0]) == "corrupt"
        assert tier.stats().corrupt_files == 8
    assert told(caplog, "computed again when needed") == 1


def test_another_format_version_is_put_aside(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with closing(open_tier(folder)) as tier:
        store(tier, RUN)
        store(tier, OTHER)
    path = file_of_run(folder)
    data = bytearray(path.read_bytes())
    data[8] += 1
    path.write_bytes(data)
    with closing(open_tier(folder)) as tier:
        assert not any(served(tier, RUN)) and all(served(tier, OTHER))
        assert tier.stats().incidents["other_versions"] == 1
    assert told(caplog, "format version 2") == 1


def test_foreign_files_are_left_alone(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with closing(open_tier(folder)) as tier:
        store(tier, RUN)
    (folder / "notes.txt").write_text("mine")
    (folder / "more").mkdir()
    with closing(open_tier(folder, cap_bytes=FILE_BYTES)) as tier:
        assert all(served(tier, RUN))
        store(tier, OTHER)
        tier.gc(), tier.verify()
        assert tier.stats().incidents["foreign_files"] == 1
        assert tier.stats().held_bytes == FILE_BYTES
    assert (folder / "notes.txt").read_text() == "mine"
    assert told(caplog, "left alone") == 1


def test_a_file_under_the_name_of_another_is_not_served(folder: Path) -> None:
    with closing(open_tier(folder)) as tier:
        store(tier, RUN)
        store(tier, OTHER)
        (other,) = folder.glob(f"{OTHER.keys[-1].hex()}-*")
        shutil.copy(other, file_of_run(folder))
        assert not any(served(tier, RUN)) and all(served(tier, OTHER))
        assert tier.stats().corrupt_files == 1


def test_rubbish_of_a_crash_is_removed(folder: Path) -> None:
    folder.mkdir(mode=0o700)
    (folder / "x.kv.tmp").write_bytes(b"half an extent")
    with closing(open_tier(folder)) as tier:
        assert not list(folder.glob("*.tmp"))
        (folder / "y.kv.tmp").write_bytes(b"half an extent")
        assert tier.gc().temporary == 1


def test_quarantine_is_bounded_and_counts(folder: Path) -> None:
    runs = [run_of(str(number), 0, 4) for number in range(40)]
    with closing(open_tier(folder, cap_bytes=40 * FILE_BYTES)) as tier:
        for run in runs:
            store(tier, run)
        for path in extent_files(folder):
            path.write_bytes(bytes(FILE_BYTES))
        assert not any(any(served(tier, run)) for run in runs)
        stats = tier.stats()
        assert stats.quarantine_files == len(os.listdir(folder / "quarantine")) == 32
        assert stats.held_bytes == stats.quarantine_bytes == 32 * FILE_BYTES
        for run in runs[:9]:
            assert store(tier, run)  # quarantine makes room first
        assert tier.stats().quarantine_files == 31
        assert tier.stats().evictions["cap"] == 0
    with closing(open_tier(folder)) as tier:
        assert tier.stats().quarantine_files == 31
        tier.drop(runs[39].keys)  # whose bytes may be in any of them: nobody can tell
        assert tier.stats().quarantine_files == 0


# -- files and folders that are not there -------------------------------------------------------


def test_a_removed_file_is_a_miss(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with closing(open_tier(folder)) as tier:
        for run in (RUN, OTHER):
            store(tier, run)
        for path in extent_files(folder):
            path.unlink()
        assert not any(served(tier, RUN) + served(tier, OTHER))
        assert not tier.has(0, RUN.keys[0])
        assert tier.stats().incidents["missing_files"] == 2
        assert tier.stats().held_bytes == 0
        assert store(tier, RUN) and all(served(tier, RUN))
    assert told(caplog, "removed by somebody") == 1


def test_a_file_that_vanished_is_written_again(folder: Path) -> None:
    with closing(open_tier(folder)) as tier:
        store(tier, RUN)
        file_of_run(folder).unlink()
        assert store(tier, RUN) and all(served(tier, RUN))


def test_a_removed_folder_is_made_again(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with closing(open_tier(folder)) as tier:
        store(tier, RUN)
        shutil.rmtree(folder)
        assert not any(served(tier, RUN))
        assert store(tier, OTHER) and all(served(tier, OTHER))
        assert tier.stats().incidents["lost_folders"] == 1
        assert tier.stats().extents == 1
        assert folder.stat().st_mode & 0o777 == 0o700
    assert told(caplog, "was removed while in use") == 1


def test_a_folder_that_somebody_else_took_is_left_to_them(folder: Path) -> None:
    time = Time()
    with closing(open_tier(folder, time=time)) as tier:
        store(tier, RUN)
        shutil.rmtree(folder)
        with closing(open_tier(folder)) as other:
            assert not store(tier, RUN)
            assert store(other, OTHER)
            assert extent_files(folder)
        time.passes(31)
        assert store(tier, RUN)
        assert all(served(tier, OTHER))


def test_a_removed_folder_does_not_trouble_verify_and_gc(folder: Path) -> None:
    with closing(open_tier(folder)) as tier:
        store(tier, RUN)
        shutil.rmtree(folder)
        tier.gc()
        assert tier.verify().missing == 1
        assert tier.stats().extents == 0
        tier.drop(RUN.keys)
    assert not folder.exists()


# -- disks that fail ----------------------------------------------------------------------------


def test_a_read_error_is_a_miss_while_it_lasts(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = FaultyFiles()
    with closing(open_tier(folder, files=files)) as tier:
        store(tier, RUN)
        for call in ("read", "open"):
            files.errors = {call: errno.EIO}
            assert not any(served(tier, RUN))
        files.errors = {}
        assert all(served(tier, RUN))
        assert tier.stats().incidents["read_errors"] == 2
    assert told(caplog, "cannot be read") == 1


def test_files_that_cannot_be_read_at_the_start_are_put_aside(folder: Path) -> None:
    files = FaultyFiles()
    with closing(open_tier(folder)) as tier:
        store(tier, RUN)
    files.errors = {"read": errno.EIO}
    with closing(open_tier(folder, files=files)) as tier:
        assert tier.stats().incidents["read_errors"] == 1
        assert not any(served(tier, RUN))
        files.errors = {}
        assert store(tier, RUN) and all(served(tier, RUN))


@pytest.mark.parametrize("call", ["create", "write", "sync", "rename", "sync_folder"])
@pytest.mark.parametrize(
    ("number", "kind"), [(errno.EIO, "write_errors"), (errno.ENOSPC, "full_disks")]
)
def test_a_failing_write_rests_and_is_tried_again(
    folder: Path, caplog: pytest.LogCaptureFixture, call: str, number: int, kind: str
) -> None:
    files, time = FaultyFiles(), Time()
    with closing(open_tier(folder, files=files, time=time)) as tier:
        store(tier, OTHER)
        files.errors = {call: number}
        assert not store(tier, RUN)
        assert not tier.has(0, RUN.keys[0])
        assert sorted(os.listdir(folder)) == sorted(
            ["lock", "quarantine", *(file.name for file in extent_files(folder))]
        )
        assert tier.stats().held_bytes == FILE_BYTES
        assert tier.stats().writes_off
        files.errors = {}
        assert not store(tier, RUN)  # not yet
        assert all(served(tier, OTHER))
        assert tier.stats().incidents[kind] == 1
        time.passes(31)
        assert store(tier, RUN) and all(served(tier, RUN))
        assert not tier.stats().writes_off
    assert told(caplog, "nothing is stored there for 30 s") == 1


def test_what_cannot_be_deleted_still_counts(folder: Path) -> None:
    files, time = FaultyFiles(), Time()
    with closing(open_tier(folder, cap_bytes=FILE_BYTES, files=files, time=time)) as tier:
        store(tier, RUN)
        files.errors = {"remove": errno.EROFS}
        assert not store(tier, OTHER)
        assert all(served(tier, RUN))
        assert tier.stats().held_bytes == FILE_BYTES
        files.errors = {}
        time.passes(31)
        assert store(tier, OTHER)
        assert tier.stats().held_bytes == FILE_BYTES


def test_a_slow_read_is_told(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    files, time = FaultyFiles(), Time()
    with closing(open_tier(folder, files=files, time=time)) as tier:
        store(tier, RUN)
        files.while_reading = lambda: time.passes(4)
        assert all(served(tier, RUN)) and all(served(tier, RUN))
        assert tier.stats().incidents["slow_reads"] == 2
    assert told(caplog, "took 8.0 s") == 1


def test_a_hanging_read_holds_up_nobody_else(folder: Path) -> None:
    files, go_on, reading = FaultyFiles(), threading.Event(), threading.Event()

    def hang() -> None:
        if threading.current_thread() is reader:
            reading.set()
            assert go_on.wait(30)

    with closing(open_tier(folder, files=files)) as tier:
        store(tier, RUN)
        store(tier, OTHER)
        found: list[bool] = []
        reader = threading.Thread(target=lambda: found.extend(served(tier, RUN)))
        files.while_reading = hang
        reader.start()
        assert reading.wait(30)
        assert tier.has(0, RUN.keys[0]) and all(served(tier, OTHER))
        assert store(tier, run_of("c", 0, 4))
        tier.drop(RUN.keys)  # underneath: the reader has the file open
        assert tier.stats().extents == 2
        go_on.set()
        reader.join()
        assert found == [True] * 4


# -- disks that are full ------------------------------------------------------------------------


def test_the_free_floor_is_kept(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = FaultyFiles()
    with closing(open_tier(folder, files=files, free_floor_bytes=1_000_000)) as tier:
        for chain in "abc":
            assert store(tier, run_of(chain, 0, 4))
        files.free = 1_000_000  # nothing left above the floor: one file leaves for another
        before = len(extent_files(folder))
        assert not store(tier, run_of("d", 0, 4))  # somebody took what was freed at once
        assert len(extent_files(folder)) == before - 1
        files.free = 2_000_000
        assert store(tier, run_of("d", 0, 4))
        assert tier.stats().evictions["space"] == 1
        assert tier.stats().incidents["refusals"] == 1
    assert told(caplog, "to be left free on the disk") == 1


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a real file system of 256 KiB."""
    mounted = tmp_path / "disk"
    mounted.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k,mode=700", "tmpfs", str(mounted)]
    if os.geteuid() or not shutil.which("mount") or subprocess.run(command).returncode:
        pytest.skip("mounting a file system takes root")
    yield mounted
    subprocess.run(["umount", str(mounted)], check=True)


def fill(tier: DiskTier, count: int) -> int:
    """Store `count` runs of 20 KB; return how many could be stored."""
    stored = 0
    for number in range(count):
        run = run_of(f"{number}", 0, 4)
        slots = filled(run, (5000,))
        stored += tier.write(run, slots, cost_seconds=1.0, retained=False)
        if tier.has(0, run.keys[0]):
            again = blank(4, (5000,))
            assert all(tier.read(0, run.keys, again))
            assert all((again.arrays[0] == slots.arrays[0]).reshape(-1))
    return stored


def test_a_disk_that_is_really_full_turns_writes_off(
    small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files, time = FaultyFiles(), Time()
    files.free = 1 << 30  # as if others had taken the rest just now
    with closing(open_tier(small_disk / "kv", files=files, time=time)) as tier:
        stored = fill(tier, 20)
        assert 3 <= stored <= 12
        assert tier.stats().incidents["full_disks"] == 1
        assert tier.stats().extents == stored
        assert not list((small_disk / "kv").glob("*.tmp"))
        tier.drop(run_of("0", 0, 4).keys + run_of("1", 0, 4).keys)
        time.passes(31)
        assert tier.write(
            run_of("new", 0, 4),
            filled(run_of("new", 0, 4), (5000,)),
            cost_seconds=1.0,
            retained=False,
        )
    assert told(caplog, "free some space or lower the cap") == 1
    with closing(open_tier(small_disk / "kv")) as tier:
        assert tier.verify().extents == stored - 1


def test_others_may_fill_the_disk(small_disk: Path) -> None:
    with closing(open_tier(small_disk / "kv")) as tier:
        assert fill(tier, 5) == 5
        (small_disk / "other").write_bytes(bytes(230 * 1024 - 5 * 25_000))
        assert fill(tier, 20) == 20  # by eviction
        assert 1 <= tier.stats().extents <= 6
        assert tier.stats().incidents["full_disks"] == 0


def test_a_floor_keeps_a_real_disk_from_filling_up(small_disk: Path) -> None:
    with closing(open_tier(small_disk / "kv", free_floor_bytes=100_000)) as tier:
        assert fill(tier, 20) == 20
        assert tier.stats().evictions["space"] > 10
        assert tier.stats().incidents["full_disks"] == 0
    status = os.statvfs(small_disk)
    assert status.f_bavail * status.f_frsize >= 100_000


# -- clocks that jump ---------------------------------------------------------------------------


@pytest.mark.parametrize("years", [-50, 50])
def test_a_jump_of_the_clock_makes_nothing_older(
    folder: Path, caplog: pytest.LogCaptureFixture, years: int
) -> None:
    time, jump = Time(), years * 365 * 86_400.0
    with closing(open_tier(folder, ttl_seconds=1000, time=time)) as tier:
        store(tier, RUN)
        time.passes(400)
        time.jumps(jump)
        assert all(served(tier, RUN))
        store(tier, OTHER)
        time.jumps(-jump)
        assert tier.gc().expired == 0
        assert all(served(tier, RUN) + served(tier, OTHER))
        assert tier.stats().incidents["clock_jumps"] == 2
        time.passes(900)
        assert tier.gc().expired == 0
        time.passes(200)
        assert tier.gc().expired == 2
    assert told(caplog, "the clock jumped by") == 1


def test_files_from_the_future_do_not_live_for_ever(folder: Path) -> None:
    time = Time()
    with closing(open_tier(folder, time=time)) as tier:
        store(tier, RUN)
    time.jumps(-500_000)
    with closing(open_tier(folder, ttl_seconds=1000, time=time)) as tier:
        assert all(served(tier, RUN))
        time.passes(1001)
        assert tier.gc().expired == 1
