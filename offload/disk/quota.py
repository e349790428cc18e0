"""How a disk tier stays within its bounds: bytes, age, and free space left to everybody else.

Room is made before a file is written, so the cap holds at every moment:

    cap 100 MB, 92 MB in use, 10 MB to be written: quarantined files go first, then victims of the
    policy, until at most 90 MB are in use
    floor 1 GB, 1.004 GB free on the file system, 10 MB to be written: victims go until 6 MB are
    freed. If that does not help, others are filling the disk, and the write is refused
"""

from collections import OrderedDict
from dataclasses import dataclass

from offload.block_run import BlockRun
from offload.disk.filesystem import FileSystem
from offload.disk.folder import DiskFolder
from offload.disk.incidents import Incidents
from offload.disk.index import DiskIndex, Extent
from offload.key import GroupKey

_REFUSALS = 1000  # remembered


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskBounds:
    """How large and how old a disk tier may become. Without bounds nothing leaves by itself.

    `cap_bytes` bounds all extents together at any moment, damaged ones too; the copy of the index
    comes on top, 0.6 KB for each extent.
    """

    cap_bytes: int | None = None
    ttl_seconds: float | None = None  # since an extent's last use
    free_floor_bytes: int = 0  # what stays free on the file system, for everybody else


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """How many files one `gc` removed, by reason."""

    expired: int
    evicted: int
    temporary: int


class DiskQuota:
    """Evicts and deletes extents, and refuses those for which there is no room.

    Whoever writes calls it, one at a time, without the index's lock; `forget` and `is_expired` may
    come from any thread.
    """

    def __init__(
        self,
        bounds: DiskBounds,
        index: DiskIndex,
        folder: DiskFolder,
        files: FileSystem,
        incidents: Incidents,
    ) -> None:
        self._bounds = bounds
        self._index = index
        self._folder, self._files, self._incidents = folder, files, incidents
        # The last blocks of runs that were refused; the oldest are forgotten first
        self._refused: OrderedDict[GroupKey, None] = OrderedDict()
        self.evicted_for_cap = self.evicted_for_space = self.expired = 0

    @property
    def used_bytes(self) -> int:
        """The bytes that count against the cap: of extents, and of quarantined files."""
        return self._index.num_bytes + self._folder.quarantine_bytes

    def is_expired(self, extent: Extent, now: float) -> bool:
        ttl_seconds = self._bounds.ttl_seconds
        return ttl_seconds is not None and now - extent.used_at > ttl_seconds

    def make_room(self, num_bytes: int, run: BlockRun, *, retained: bool) -> bool:
        """Evict until a file of `num_bytes` may be written; return False if it may not.

        Retained extents leave only for the sake of a retained one, and none leaves for its own
        continuation, which would be of no use without it. For the same reason a run that continues
        a refused one is refused: of a document of 24 blocks in extents of 4, a cap of three extents
        keeps the first 12 blocks. Raises OSError.
        """
        ends, follows = (run.group, run.keys[-1]), (run.group, run.parent)
        refused = follows in self._refused or not self._evict_for(num_bytes, run, retained)
        self._refused.pop(ends, None)
        if refused:
            self._refused[ends] = None
            if len(self._refused) > _REFUSALS:
                self._refused.popitem(last=False)
            self._incidents.report(
                "refusals",
                f"no room for {num_bytes} bytes in {self._folder.path}: {self.used_bytes} bytes in "
                f"use, cap {self._bounds.cap_bytes} bytes, {self._bounds.free_floor_bytes} bytes "
                "to be left free on the disk; raise the cap, free some space or delete documents",
            )
        return not refused

    def _evict_for(self, num_bytes: int, run: BlockRun, retained: bool) -> bool:
        cap_bytes = self._bounds.cap_bytes
        if cap_bytes is not None and not self._shrink(
            cap_bytes - num_bytes, run, retained=retained
        ):
            return False
        return self._free(num_bytes, run, retained=retained)

    def expire(self, now: float) -> int:
        """Delete what was not used for too long; return how many files. Raises OSError."""
        with self._index.lock:
            old = [extent for extent in self._index if self.is_expired(extent, now)]
        for extent in old:
            self.delete(extent, "expired")
        self.expired += len(old)
        return len(old)

    def forget(self, extent: Extent, reason: str) -> bool:
        """Take an extent out of the index; return False if somebody else did so before.

        Its file is gone, or the caller's business.
        """
        with self._index.lock:
            if self._index.named(extent.name) is not extent:
                return False
            self._index.remove(extent, reason)
            return True

    def delete(self, extent: Extent, reason: str) -> None:
        """Remove an extent and its file. Raises OSError, and then its bytes still count."""
        with self._index.lock:
            if self._index.named(extent.name) is not extent:
                return
            extent.meta = self._index.meta_now(extent)  # in case it has to be added again
            self._index.remove(extent, reason)
        try:
            self._folder.remove(extent.name)
        except OSError:
            with self._index.lock:
                self._index.add(extent)
            raise

    def shrink(self) -> int:
        """Evict what exceeds the cap, retained or not, and the floor; return how many files."""
        before = self.evicted_for_cap + self.evicted_for_space
        if self._bounds.cap_bytes is not None:
            self._shrink(self._bounds.cap_bytes, None, retained=True)
        self._free(0, None, retained=False)
        return self.evicted_for_cap + self.evicted_for_space - before

    def _shrink(self, to_bytes: int, run: BlockRun | None, *, retained: bool) -> bool:
        """Evict until at most `to_bytes` are in use; return False if that cannot be reached.

        `run` and `retained` say for whose sake; see `_evict`.
        """
        if to_bytes < 0:
            return False
        while self.used_bytes > to_bytes:
            if self._folder.forget_quarantined():
                continue
            if not self._evict(run, retained=retained):
                return False
            self.evicted_for_cap += 1
        return True

    def _free(self, num_bytes: int, run: BlockRun | None, *, retained: bool) -> bool:
        """Evict until the file system has room for `num_bytes` above the floor; or return False.

        No more is evicted than was missing at first: where others fill the disk, all would go in
        vain.
        """
        wanted = self._bounds.free_floor_bytes + num_bytes
        missing = wanted - self._files.free_bytes(self._folder.path)
        if missing <= 0:
            return True
        while missing > 0:
            freed = self._evict(run, retained=retained)
            if not freed:
                return False
            missing -= freed
            self.evicted_for_space += 1
        return self._files.free_bytes(self._folder.path) >= wanted

    def _evict(self, run: BlockRun | None, *, retained: bool) -> int:
        """Evict the next victim and return its bytes; 0 if it may not leave for this run.

        `retained` says whether the run is: only then may a retained victim leave. Without a run, no
        victim is anybody's beginning.
        """
        with self._index.lock:
            victim = self._index.victim()
            if victim is None or (self._index.is_retained(victim) and not retained):
                return 0
            if (
                run is not None
                and victim.meta.run.group == run.group
                and run.parent in victim.meta.run.keys
            ):
                return 0
        self.delete(victim, "evicted")
        return victim.file_bytes
