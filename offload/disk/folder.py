"""The folder of a disk tier: its lock, its files by name, and its quarantine.

lock                  held by the one process that writes
index                 a copy of the index, see `index_snapshot.py`
KEY-GROUP-FIRST.kv    extents: key of the last block, layer group, index of the first block
*.tmp                 files being written; rubbish after a crash
quarantine/           extents that could not be read, kept for whoever wants to know why
compute-types/        the types that models compute in whose blocks are here; the engine writes it
"""

import contextlib
import os
import re
import stat
import threading
from collections import OrderedDict
from collections.abc import Iterable, Set
from pathlib import Path

from offload.disk import extent_file
from offload.disk.extent_header import ExtentHeader, ExtentUnreadable, OtherVersion
from offload.disk.filesystem import FileSystem
from offload.disk.incidents import Incidents
from offload.key import BlockKey

LOCK = "lock"
QUARANTINE = "quarantine"
COMPUTE_TYPES = "compute-types"
INDEX = "index"
TEMPORARY = ".tmp"
_EXTENT = re.compile(r"[0-9a-f]{64}-[0-9]+-[0-9]+\.kv")
_QUARANTINE_FILES = 32
_QUARANTINE_BYTES = 256 << 20


class FolderRefused(Exception):
    """The folder cannot serve as a disk tier; the message says why and what to do."""


class FolderInUse(FolderRefused):
    """Another process writes there."""


class DiskFolder:
    """Gives names to finished files, removes them, and puts bad ones aside.

    `publish`, `remove`, `sync`, `save_index` and `remove_temporary` are called one at a time: the
    tier holds its writer's lock. `quarantine` and the reading calls may come from any thread at any
    time, and a file may vanish in between.
    """

    def __init__(
        self, path: Path, files: FileSystem, incidents: Incidents, *, read_only: bool
    ) -> None:
        """Enter the folder. Raises FolderRefused, OSError."""
        self.path = path
        self.read_only = read_only
        self._files = files
        self._incidents = incidents
        self._lock: int | None = None  # descriptor
        self._removals = False  # whether any file was removed since the folder was synced
        self._quarantine_lock = threading.Lock()
        self._quarantine: OrderedDict[str, int] = OrderedDict()  # bytes by name, oldest first
        self.enter()

    @property
    def quarantine_bytes(self) -> int:
        return sum(tuple(self._quarantine.values()))

    @property
    def quarantine_files(self) -> int:
        return len(self._quarantine)

    def enter(self) -> None:
        """Make the folder and lock it; again if it was removed meanwhile.

        Raises FolderInUse where another process holds the lock, FolderRefused, OSError.
        """
        self.leave()
        if self.read_only:
            if not self.path.is_dir():
                raise FolderRefused(f"{self.path} is no folder; nothing was ever stored there")
            return
        self._files.make_folder(self.path)
        self._close_to_others()
        try:
            self._lock = self._files.lock(self.path / LOCK)
        except BlockingIOError:
            raise FolderInUse(
                f"{self.path} is in use by another longctx process, and only one may write there; "
                "stop that process or choose another folder"
            ) from None
        self._files.make_folder(self.path / QUARANTINE)
        quarantined = self._files.names(self.path / QUARANTINE)
        found = [(name, self._files.status(self.path / QUARANTINE / name)) for name in quarantined]
        found.sort(key=lambda file: file[1].st_mtime)
        with self._quarantine_lock:
            self._quarantine = OrderedDict((name, status.st_size) for name, status in found)

    def leave(self) -> None:
        """Give up the lock."""
        if self._lock is not None:
            self._files.close(self._lock)
            self._lock = None

    def is_ours(self) -> bool:
        """Return False if the folder was removed or replaced since it was entered."""
        if self._lock is None:
            return False
        try:
            named = self._files.status(self.path / LOCK)
        except FileNotFoundError:
            return False
        own = self._files.status(self._lock)
        return (named.st_dev, named.st_ino) == (own.st_dev, own.st_ino)

    def file(self, name: str) -> Path:
        return self.path / name

    def names(self) -> list[str]:
        """Return the names of all files that are called like extents, sorted."""
        try:
            found = self._files.names(self.path)
        except FileNotFoundError:
            return []  # removed underneath
        return sorted(name for name in found if _EXTENT.fullmatch(name))

    def report_foreign(self) -> None:
        """Report files that longctx has not put here."""
        foreign = sorted(name for name in self._files.names(self.path) if _is_foreign(name))
        if foreign:
            self._incidents.report(
                "foreign_files",
                f"{self.path} holds {len(foreign)} files that are not of longctx, "
                f"{foreign[0]!r} among them; they are left alone and not counted",
            )

    def read_index(self) -> bytes:
        """Return what `save_index` wrote last; empty if there is none, or it cannot be read."""
        try:
            descriptor = self._files.open(self.file(INDEX))
            try:
                buffer = bytearray(self._files.status(descriptor).st_size)
                self._files.read(descriptor, [memoryview(buffer)], 0)
                return bytes(buffer)
            finally:
                self._files.close(descriptor)
        except OSError:
            return b""

    def save_index(self, data: bytes) -> None:
        """Write the copy of the index, without a sync: it may be lost. Raises OSError."""
        temporary = self.file(INDEX + TEMPORARY)
        descriptor = self._files.create(temporary)
        try:
            self._files.write(descriptor, [memoryview(data)], 0)
        finally:
            self._files.close(descriptor)
        self._files.rename(temporary, self.file(INDEX))

    def read_header(self, name: str) -> tuple[ExtentHeader, float] | None:
        """Return a file's header and the time of its last use, in seconds since 1970.

        Returns None where there is no such file, or an unreadable one, which goes to quarantine.
        """
        try:
            descriptor = self._files.open(self.file(name))
            try:
                header = extent_file.read_header(self._files, descriptor)
                used_at = self._files.status(descriptor).st_mtime
            finally:
                self._files.close(descriptor)
            if header.meta.file_name != name:
                raise ExtentUnreadable(f"holds what belongs into {header.meta.file_name}")
        except FileNotFoundError:
            return None
        except (ExtentUnreadable, OSError) as error:
            self.quarantine(name, error)
            return None
        return header, used_at

    def touch(self, name: str, seconds: float) -> None:
        """Note in the file when it was last used. Raises OSError, but not for a missing file."""
        with contextlib.suppress(FileNotFoundError):
            self._files.touch(self.file(name), seconds)

    def publish(self, temporary: Path, name: str) -> None:
        """Give a finished file its name, durably. Raises OSError, and then no file has it.

        What has left before is gone for good by then: if the power failed and it came back beside
        the new file, something else would have to leave.
        """
        self.sync_removals()
        self._files.rename(temporary, self.file(name))
        try:
            self.sync()
        except OSError:
            self.discard(self.file(name))
            raise

    def remove(self, name: str) -> None:
        """Remove a file. Raises OSError, but not for a missing file."""
        with contextlib.suppress(FileNotFoundError):
            self._files.remove(self.file(name))
            self._removals = True

    def sync(self) -> None:
        """Make what was named and removed durable. Raises OSError."""
        self._files.sync_folder(self.path)
        self._removals = False

    def sync_removals(self) -> None:
        """See to it that what was removed does not come back. Raises OSError."""
        if self._removals:
            self.sync()

    def discard(self, path: Path) -> None:
        """Remove, if it can be done, what the next start would remove anyway."""
        with contextlib.suppress(OSError):
            self._files.remove(path)

    def remove_temporary(self) -> int:
        """Remove what crashes have left, and return how many files. Nothing is being written."""
        found = [name for name in self._files.names(self.path) if name.endswith(TEMPORARY)]
        for name in found:
            self.discard(self.file(name))
        return len(found)

    def quarantine(self, name: str, error: ExtentUnreadable | OSError) -> None:
        """Take an extent out of use, and report why. The oldest leave a full quarantine."""
        self._incidents.report(
            _kind(error),
            f"{self.file(name)} is not used: {error}; "
            + ("" if self.read_only else f"moved to {QUARANTINE}/, ")
            + "its text is computed again when needed",
        )
        if self.read_only:
            return
        target = self.path / QUARANTINE / name
        self._removals = True
        with self._quarantine_lock:
            try:
                num_bytes = self._files.status(self.file(name)).st_size
                self._files.rename(self.file(name), target)
            except OSError:
                self.discard(self.file(name))
                return
            self._quarantine.pop(name, None)
            self._quarantine[name] = num_bytes
        while (
            self.quarantine_bytes > _QUARANTINE_BYTES or self.quarantine_files > _QUARANTINE_FILES
        ):
            self.forget_quarantined()

    def forget_quarantined(self) -> bool:
        """Remove what is in quarantine for longest; return False if nothing is."""
        with self._quarantine_lock:
            if not self._quarantine:
                return False
            name, _ = self._quarantine.popitem(last=False)
            self.discard(self.path / QUARANTINE / name)
            return True

    def forget_quarantined_of(self, keys: Iterable[BlockKey]) -> None:
        """Remove the quarantined files that hold one of these blocks, or may. Raises OSError.

        Otherwise a deleted document would go on lying in a file that nobody looks at. One whose
        header cannot be read any more may hold anything.
        """
        gone = set(keys)
        with self._quarantine_lock:
            found = [name for name in self._quarantine if self._may_hold(name, gone)]
            for name in found:
                self.discard(self.path / QUARANTINE / name)
                del self._quarantine[name]
        if found:
            self._files.sync_folder(self.path / QUARANTINE)

    def _may_hold(self, name: str, keys: Set[BlockKey]) -> bool:
        """Return whether a quarantined file cannot be shown to hold none of these blocks."""
        try:
            descriptor = self._files.open(self.path / QUARANTINE / name)
            try:
                header = extent_file.read_header(self._files, descriptor)
            finally:
                self._files.close(descriptor)
        except (ExtentUnreadable, OSError):
            return bool(keys)
        return not keys.isdisjoint(header.meta.run.keys)

    def _close_to_others(self) -> None:
        """Close the folder to other users, who could read from KV blocks what documents say.

        Raises FolderRefused where others may have put something into it.
        """
        mode = self.path.stat().st_mode
        if not mode & (stat.S_IRWXG | stat.S_IRWXO):
            return
        if any(_is_foreign(name) for name in self._files.names(self.path)):
            raise FolderRefused(
                f"{self.path} is open to other users (mode {stat.S_IMODE(mode):o}) and holds "
                "other files; choose an empty folder, or close it with chmod 700"
            )
        os.chmod(self.path, stat.S_IRWXU)


def _is_foreign(name: str) -> bool:
    own = name in (LOCK, QUARANTINE, INDEX, COMPUTE_TYPES) or name.endswith(TEMPORARY)
    return not own and not _EXTENT.fullmatch(name)


def _kind(error: ExtentUnreadable | OSError) -> str:
    if isinstance(error, OSError):
        return "read_errors"
    return "other_versions" if isinstance(error, OtherVersion) else "corrupt_files"
