"""A file system that fails, fills up and slows down when told to."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from offload.disk.filesystem import FileSystem


class FaultyFiles(FileSystem):
    def __init__(self) -> None:
        self.errors: dict[str, int] = {}  # errno by the name of the call
        self.free: int | None = None  # bytes
        self.while_reading: Callable[[], None] = lambda: None

    def create(self, path: Path) -> int:
        self._fail("create")
        return super().create(path)

    def open(self, path: Path) -> int:
        self._fail("open")
        return super().open(path)

    def read(self, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        self.while_reading()
        self._fail("read")
        return super().read(descriptor, buffers, offset)

    def write(self, descriptor: int, buffers: Sequence[memoryview], offset: int) -> None:
        if "write" in self.errors:  # as a disk that fills up: some of it is written
            super().write(descriptor, buffers[:1], offset)
            self._fail("write")
        super().write(descriptor, buffers, offset)

    def sync(self, descriptor: int) -> None:
        self._fail("sync")
        super().sync(descriptor)

    def sync_folder(self, folder: Path) -> None:
        self._fail("sync_folder")
        super().sync_folder(folder)

    def rename(self, path: Path, to: Path) -> None:
        self._fail("rename")
        super().rename(path, to)

    def remove(self, path: Path) -> None:
        self._fail("remove")
        super().remove(path)

    def free_bytes(self, folder: Path) -> int:
        return super().free_bytes(folder) if self.free is None else self.free

    def _fail(self, call: str) -> None:
        if call in self.errors:
            raise OSError(self.errors[call], os.strerror(self.errors[call]))
