"""The copy of the index saves time and decides nothing."""

import os
import shutil
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.disk.filesystem import FileSystem
from offload.disk.index_snapshot import parse
from tests.offload.extents import extent_files, open_tier, run_of, served, store

RUNS = [run_of(chain, 0, 4) for chain in "abcdef"]


class CountedOpens(FileSystem):
    def __init__(self) -> None:
        self.extents_opened = 0

    def open(self, path: Path) -> int:
        self.extents_opened += path.suffix == ".kv"
        return super().open(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Store all runs, and return the folder that has them."""
    with closing(open_tier(tmp_path / "kv")) as tier:
        for run in RUNS:
            store(tier, run, retained=run is RUNS[0])
    return tmp_path / "kv"


def test_a_restart_opens_no_extent(folder: Path) -> None:
    files = CountedOpens()
    with closing(open_tier(folder)) as tier:
        before = tier.entries()
    with closing(open_tier(folder, files=files)) as tier:
        assert files.extents_opened == 0
        assert tier.entries() == before
        assert [entry.meta.retained for entry in before].count(True) == 1
        assert all(all(served(tier, run)) for run in RUNS)


def test_a_copy_that_is_behind_costs_time_only(folder: Path) -> None:
    shutil.copy(folder / "index", folder.parent / "behind")
    with closing(open_tier(folder)) as tier:
        store(tier, run_of("new", 0, 4))
        tier.drop(RUNS[1].keys)
    shutil.copy(folder.parent / "behind", folder / "index")
    files = CountedOpens()
    with closing(open_tier(folder, files=files)) as tier:
        assert files.extents_opened == 1
        assert all(served(tier, run_of("new", 0, 4)))
        assert [all(served(tier, run)) for run in RUNS] == [True, False, True, True, True, True]
        assert tier.stats().held_bytes == sum(file.stat().st_size for file in extent_files(folder))


def test_without_a_copy_all_extents_are_asked(folder: Path) -> None:
    (folder / "index").unlink()
    files = CountedOpens()
    with closing(open_tier(folder, files=files)) as tier:
        assert files.extents_opened == len(RUNS)
        assert all(all(served(tier, run)) for run in RUNS)
    assert (folder / "index").exists()


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_a_damaged_copy_is_not_believed(data: st.DataObject) -> None:
    with TemporaryDirectory() as temporary:
        folder = Path(temporary, "kv")
        with closing(open_tier(folder)) as tier:
            store(tier, RUNS[0])
        copy = bytearray((folder / "index").read_bytes())
        copy[data.draw(st.integers(0, len(copy) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        (folder / "index").write_bytes(copy[: data.draw(st.integers(0, len(copy)))])
        files = CountedOpens()
        with closing(open_tier(folder, files=files)) as tier:
            assert files.extents_opened == 1
            assert all(served(tier, RUNS[0]))


@given(st.binary(max_size=300))
def test_any_other_bytes_are_no_copy(data: bytes) -> None:
    assert parse(data) == []


def test_gc_copies_now_and_then(folder: Path) -> None:
    os.remove(folder / "index")
    with closing(open_tier(folder)) as tier:
        for number in range(70):
            store(tier, run_of(f"{number}", 0, 1))
        assert not (folder / "index").exists()
        tier.gc()
        assert len(parse((folder / "index").read_bytes())) == 70 + len(RUNS)
