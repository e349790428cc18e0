"""The secret is created once, whole and private."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from longctx.errors import LongctxError
from longctx.ring.processes.secret import make_secret, read_secret


def test_a_secret_is_made_once_and_private(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    assert make_secret(file) == make_secret(file) == read_secret(file)
    assert file.stat().st_mode & 0o777 == 0o600
    file.write_text("short")
    with pytest.raises(LongctxError, match="holds 5 characters, a secret has at least 32"):
        read_secret(file)
    with pytest.raises(LongctxError, match="cannot read"):
        read_secret(tmp_path / "nothing")


def test_a_start_that_fails_leaves_no_half_of_a_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    file = tmp_path / "secret"
    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", full)
        with pytest.raises(LongctxError, match="No space left on device"):
            make_secret(file)
    assert list(tmp_path.iterdir()) == []
    assert make_secret(file) == read_secret(file)
    assert list(tmp_path.iterdir()) == [file]


def test_heads_that_start_together_have_one_secret(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    with ThreadPoolExecutor(8) as threads:
        assert len(set(threads.map(make_secret, [file] * 8))) == 1
