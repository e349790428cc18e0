"""`longctx cache` on a folder of real extents, with and without a server that holds it."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from longctx.cli import main
from offload.block_run import BlockRun
from offload.disk.folder import INDEX
from offload.disk.tier import DiskTier, DiskTierConfig
from offload.eviction import LRU
from tests.offload.memory_disk import chain, filled_slots, key


@contextmanager
def tier(folder: Path) -> Iterator[DiskTier]:
    held = DiskTier(DiskTierConfig(folder=folder), LRU[str]())
    yield held
    held.close()


@pytest.fixture
def store_dir(tmp_path: Path) -> Path:
    """A chain of two extents with a window checkpoint, and one extent of another namespace."""
    other = BlockRun(key(99), 0, 0, key(99), (key(100), key(101)))
    runs = (chain(1, 16), chain(17, 16), chain(24, 9, group=1), other)
    with tier(tmp_path / "kv") as disk:
        for run in runs:
            assert disk.write(run, filled_slots(run), cost_seconds=2.5, retained=False)
    return tmp_path


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")


def cache(store_dir: Path, *argv: str) -> None:
    main(["cache", *argv, "--store-dir", str(store_dir)])


def stored(store_dir: Path) -> int:
    return len(list((store_dir / "kv").glob("*.kv")))


def test_ls_shows_namespaces(store_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache(store_dir, "ls")
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split("│")[1:-1] for line in lines if line.startswith("│")]
    assert [[cell.strip() for cell in row[:4]] for row in rows] == [
        ["0" * 12, "0", "2", "2,048"],
        ["0" * 12, "1", "1", "576"],
        [key(99).hex()[:12], "0", "1", "128"],
    ]
    assert "4 extents" in lines[-1]


def test_ls_shows_extents(store_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache(store_dir, "ls", "--extents")
    output = capsys.readouterr().out
    assert output.count("2.5 s") == 4
    assert "1,472" in output  # the checkpoint's first token


def test_ls_and_verify_work_while_a_server_runs(
    store_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with tier(store_dir / "kv"):
        cache(store_dir, "ls")
        cache(store_dir, "verify")
        assert "4 extents are whole" in capsys.readouterr().out
        with pytest.raises(SystemExit, match="in use by another longctx process"):
            cache(store_dir, "rm", "--all")
        with pytest.raises(SystemExit, match="in use by another longctx process"):
            cache(store_dir, "gc")
    assert stored(store_dir) == 4


def test_verify_puts_bad_files_aside(store_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = sorted((store_dir / "kv").glob("*.kv"))[0]
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    with tier(store_dir / "kv"), pytest.raises(SystemExit, match="1 extents are not what was"):
        cache(store_dir, "verify")
    assert stored(store_dir) == 4  # a server's files are the server's
    with pytest.raises(SystemExit, match="1 extents are not what was written, 1 files are in"):
        cache(store_dir, "verify")
    assert stored(store_dir) == 3
    output = capsys.readouterr().out
    assert file.name in output and "3 extents are whole" in output
    cache(store_dir, "verify")


def test_rm_deletes_a_namespace(store_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache(store_dir, "rm", key(0).hex()[:60] + "0000")
    assert stored(store_dir) == 1
    assert "deleted 3 extents" in capsys.readouterr().out


def test_rm_deletes_an_extent_and_what_follows_it(store_dir: Path) -> None:
    with tier(store_dir / "kv") as disk:
        (name,) = (e.name for e in disk.entries() if e.meta.run.first_block == 16)
    cache(store_dir, "rm", name)
    with tier(store_dir / "kv") as disk:
        held = {
            (group, number)
            for group in (0, 1)
            for number in (1, 16, 17, 24, 32, 100)
            if disk.has(group, key(number))
        }
    assert held == {(0, 1), (0, 16), (0, 100)}


def test_rm_refuses_what_it_may_have_misunderstood(store_dir: Path) -> None:
    for argv, message in (
        ((), "needs the names"),
        (("--all", "0000"), "needs the names"),
        (("00",), "too short"),
        (("feed",), "nothing is called feed"),
    ):
        with pytest.raises(SystemExit, match=message):
            cache(store_dir, "rm", *argv)
    assert stored(store_dir) == 4
    cache(store_dir, "rm", "--all")
    assert stored(store_dir) == 0
    cache(store_dir, "rm", "--all")


def test_gc_enforces_age_and_cap(store_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = sorted((store_dir / "kv").glob("*.kv"))
    (store_dir / "kv" / "left.kv.tmp").write_bytes(b"half a file")
    cache(store_dir, "gc", "--disk-free-gib", "0")
    assert stored(store_dir) == 4
    assert not (store_dir / "kv" / "left.kv.tmp").exists()
    long_ago = time.time() - 3 * 86_400
    os.utime(files[-1], (long_ago, long_ago))
    (store_dir / "kv" / INDEX).unlink()  # which knows when each was used
    cache(store_dir, "gc", "--disk-free-gib", "0", "--disk-ttl-days", "2")
    assert stored(store_dir) == 3
    assert "deleted 1 extents for their age" in capsys.readouterr().out
    cap_gib = max(file.stat().st_size for file in files[:-1]) / (1 << 30)
    cache(store_dir, "gc", "--disk-free-gib", "0", "--disk-cap-gib", str(cap_gib))
    assert "over the cap" in capsys.readouterr().out
    assert stored(store_dir) == 1


def test_a_folder_that_is_not_there_is_said_to_be_so(tmp_path: Path) -> None:
    for action in ("ls", "verify", "gc"):
        with pytest.raises(SystemExit, match="nothing was stored there; see --store-dir"):
            cache(tmp_path / "nowhere", action)
    assert not (tmp_path / "nowhere").exists()


def test_the_folder_may_be_given_itself(
    store_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["cache", "ls", "--kv-dir", str(store_dir / "kv")])
    assert "4 extents" in capsys.readouterr().out
