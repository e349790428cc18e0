"""What the disk tier asks of the operating system. Tests put a faulty one in its place.

Every call may raise OSError. Only `sync`, `sync_folder` and `make_folder` make anything durable:
until then a loss of power may undo each write, rename and removal on its own.
"""

import fcntl
import os
from collections.abc import Callable, Sequence
from pathlib import Path

_FILE_MODE = 0o600
_FOLDER_MODE = 0o700
_BUFFERS_PER_CALL = 1024  # IOV_MAX of Linux


class FileSystem:
    """The operating system's own. Any thread may call."""

    def make_folder(self, folder: Path) -> None:
        """Make the folder and those above it. They are durable when this returns."""
        if not folder.is_dir():
            self.make_folder(folder.parent)
            folder.mkdir(mode=_FOLDER_MODE, exist_ok=True)
            self.sync_folder(folder.parent)

    def names(self, folder: Path) -> list[str]:
        return os.listdir(folder)

    def open(self, path: Path) -> int:
        """Return a descriptor to read from."""
        return os.open(path, os.O_RDONLY)

    def create(self, path: Path) -> int:
        """Return a descriptor to write to, of a new file. Raises FileExistsError."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _FILE_MODE)

    def close(self, descriptor: int) -> None:
        os.close(descriptor)

    def read(self, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        """Fill `buffers` in order and return how many bytes came: fewer only at the file's end."""
        return _transfer(os.preadv, descriptor, buffers, offset)

    def write(self, descriptor: int, buffers: Sequence[memoryview], offset: int) -> None:
        """Write all buffers, one after another, from `offset` on."""
        written = _transfer(os.pwritev, descriptor, buffers, offset)
        assert written == sum(map(len, buffers)), written

    def status(self, of: int | Path) -> os.stat_result:
        """Return size, times and identity of a descriptor's or path's file."""
        return os.stat(of)

    def touch(self, path: Path, seconds: float) -> None:
        """Set the time of the last use, in seconds since 1970."""
        os.utime(path, (seconds, seconds))

    def sync(self, descriptor: int) -> None:
        os.fsync(descriptor)

    def sync_folder(self, folder: Path) -> None:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, path: Path, to: Path) -> None:
        os.rename(path, to)

    def remove(self, path: Path) -> None:
        os.unlink(path)

    def free_bytes(self, folder: Path) -> int:
        """Return how much an unprivileged process may still write there."""
        found = os.statvfs(folder)
        return found.f_bavail * found.f_frsize

    def lock(self, path: Path) -> int:
        """Return a descriptor that holds the file's lock until it is closed or its process ends.

        Raises BlockingIOError where somebody else holds it.
        """
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, _FILE_MODE)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            raise
        return descriptor


def _transfer(
    call: Callable[[int, Sequence[memoryview], int], int],
    descriptor: int,
    buffers: Sequence[memoryview],
    offset: int,
) -> int:
    """Repeat `call` until all is transferred or it transfers nothing; return the bytes moved."""
    done = 0
    waiting = list(reversed(buffers))
    while waiting:
        batch = waiting[: -_BUFFERS_PER_CALL - 1 : -1]
        moved = call(descriptor, batch, offset + done)
        if moved == 0:
            break
        done += moved
        while waiting and moved >= len(waiting[-1]):
            moved -= len(waiting.pop())
        if moved:
            waiting[-1] = waiting[-1][moved:]
    return done
