"""What earlier versions of longctx have stored is read, and the same bytes are still written.

`format_1/` is a folder that was written by format version 1: three extents and the copy of the
index. A changed byte there means that every user's store is lost with an upgrade, so the format
may only change together with `extent_header.VERSION`.
"""

import shutil
from contextlib import closing
from pathlib import Path

import numpy as np

from offload.block_run import PageSlots
from tests.offload.extents import Time, open_tier, run_of, served, store

STORED = Path(__file__).parent / "format_1"
FIRST, SECOND, WINDOW = run_of("a", 0, 3), run_of("a", 3, 2), run_of("a", 2, 3, group=1)
COMPRESSED = run_of("compressed", 0, 1)


def bfloat16_page() -> PageSlots:
    """Return a page that becomes smaller by shuffling."""
    halves = np.linspace(1.0, 2.0, 2000, dtype="<f4").view("<u2")[1::2]
    return PageSlots((np.ascontiguousarray(halves).view(np.uint8).reshape(1, -1),), (0,))


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def test_the_same_bytes_are_written_as_ever(tmp_path: Path) -> None:
    time = Time()
    with closing(open_tier(tmp_path / "kv", time=time)) as tier:
        for run in (FIRST, WINDOW, SECOND):
            assert store(tier, run, retained=run is WINDOW)
            time.passes(10)
    written = files_of(tmp_path / "kv")
    del written["lock"]
    assert written == {
        name: content
        for name, content in files_of(STORED).items()
        if not name.startswith(COMPRESSED.keys[-1].hex())
    }


def test_what_an_earlier_version_has_stored_is_served(tmp_path: Path) -> None:
    shutil.copytree(STORED, tmp_path / "kv")
    with closing(open_tier(tmp_path / "kv", time=Time())) as tier:
        for run in (FIRST, WINDOW, SECOND):
            assert served(tier, run) == [True] * len(run.keys)
        slots = bfloat16_page()
        wanted = PageSlots((np.zeros_like(slots.arrays[0]),), (0,))
        assert tier.read(0, COMPRESSED.keys, wanted) == [True]
        assert np.array_equal(wanted.arrays[0], slots.arrays[0])
        assert tier.verify().corrupt == 0


def test_without_its_index_an_earlier_store_is_served_too(tmp_path: Path) -> None:
    shutil.copytree(STORED, tmp_path / "kv", ignore=shutil.ignore_patterns("index"))
    with closing(open_tier(tmp_path / "kv", time=Time())) as tier:
        assert all(all(served(tier, run)) for run in (FIRST, WINDOW, SECOND))
