"""`longctx cache verify`: reads every byte of a disk tier, and makes its index true again."""

import threading
from collections.abc import Callable
from dataclasses import dataclass

from offload.disk import extent_file
from offload.disk.extent_header import ExtentUnreadable
from offload.disk.filesystem import FileSystem
from offload.disk.folder import DiskFolder
from offload.disk.index import DiskIndex, Extent
from offload.disk.quota import DiskQuota
from offload.disk.shuffle import PageShuffle

Report = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """How many files one `verify` found, and `num_bytes` of the good ones.

    The `corrupt` ones are in quarantine now; the `missing` ones were in the index only.
    """

    extents: int
    num_bytes: int
    corrupt: int
    missing: int


class DiskVerifier:
    """Checks the files of a tier that is in use: it is read from and written to meanwhile."""

    def __init__(
        self,
        files: FileSystem,
        folder: DiskFolder,
        index: DiskIndex,
        quota: DiskQuota,
        shuffle: PageShuffle,
    ) -> None:
        self._files, self._folder, self._shuffle = files, folder, shuffle
        self._index, self._quota = index, quota

    def verify(self, writer: threading.Lock, now: Callable[[], float], report: Report) -> Verified:
        """Check all files. `report` is given a line for each that is not as it should be.

        `writer` keeps files from being written or deleted; it is held for moments only. `now` is
        called with the index's lock held.
        """
        whole = corrupt = num_bytes = 0
        for name in self._folder.names():
            try:
                header = extent_file.check(self._files, self._folder.file(name), self._shuffle)
            except FileNotFoundError:
                continue  # evicted meanwhile
            except (ExtentUnreadable, OSError) as error:
                corrupt += 1
                self._expel(name, error)
                report(f"{name}: {error}")
            else:
                whole += 1
                num_bytes += header.file_bytes
                with writer:
                    self._adopt(name, now)
        with writer:
            missing = self._forget_missing()
        for name in missing:
            report(f"{name}: removed by somebody")
        return Verified(extents=whole, num_bytes=num_bytes, corrupt=corrupt, missing=len(missing))

    def _expel(self, name: str, error: ExtentUnreadable | OSError) -> None:
        with self._index.lock:
            extent = self._index.named(name)
        if extent is not None:
            self._quota.forget(extent, "corrupt")
        self._folder.quarantine(name, error)

    def _adopt(self, name: str, now: Callable[[], float]) -> None:
        """Take a good file into the index if it is missing there."""
        found = None if self._index.named(name) else self._folder.read_header(name)
        if found is not None:
            header, used_at = found
            with self._index.lock:
                used_at = min(used_at, now())
                self._index.add(Extent(header.meta, header.file_bytes, used_at))

    def _forget_missing(self) -> list[str]:
        there = set(self._folder.names())
        with self._index.lock:
            missing = [extent for extent in self._index if extent.name not in there]
        return [extent.name for extent in missing if self._quota.forget(extent, "deleted")]
