"""Transfers are complete, whatever a single system call moves."""

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from offload.disk.filesystem import FileSystem


@pytest.mark.parametrize("step", [1, 7, 64])
def test_short_transfers_are_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    preadv, pwritev = os.preadv, os.pwritev

    def short_read(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        return preadv(descriptor, [buffers[0][:step]], offset)

    def short_write(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        return pwritev(descriptor, [buffers[0][:step]], offset)

    monkeypatch.setattr(os, "preadv", short_read)
    monkeypatch.setattr(os, "pwritev", short_write)
    files, path = FileSystem(), tmp_path / "file"
    parts = [bytes(range(10)), bytes(range(100)), bytes(range(50, 51))]
    descriptor = files.create(path)
    files.write(descriptor, [memoryview(part) for part in parts], 0)
    files.close(descriptor)
    assert path.read_bytes() == b"".join(parts)
    again = [bytearray(len(part)) for part in parts] + [bytearray(20)]
    descriptor = files.open(path)
    assert files.read(descriptor, [memoryview(part) for part in again], 0) == 111
    files.close(descriptor)
    assert b"".join(again) == b"".join(parts) + bytes(20)


def test_more_buffers_than_a_call_takes(tmp_path: Path) -> None:
    files = FileSystem()
    parts = [bytes((i % 251, i % 13)) for i in range(5000)]
    descriptor = files.create(tmp_path / "file")
    files.write(descriptor, [memoryview(part) for part in parts], 0)
    files.close(descriptor)
    assert (tmp_path / "file").read_bytes() == b"".join(parts)


def test_a_lock_ends_with_its_descriptor(tmp_path: Path) -> None:
    files = FileSystem()
    first = files.lock(tmp_path / "lock")
    with pytest.raises(BlockingIOError):
        files.lock(tmp_path / "lock")
    files.close(first)
    files.close(files.lock(tmp_path / "lock"))
