"""How a disk tier stays within its bounds: bytes, age, and free space left to everybody else.

Room is made before a file is written, so the byte cap holds at every moment. Who writes calls
this, one at a time.
"""

from collections import OrderedDict
from dataclasses import dataclass

from offload.block_run import BlockRun
from offload.disk.filesystem import FileSystem
from offload.disk.folder import DiskFolder
from offload.disk.incidents import Incidents
from offload.disk.index import DiskIndex, Extent
from offload.eviction import Block

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
    """What one `gc` removed, in files."""

    expired: int
    evicted: int
    temporary: int


class DiskQuota:
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
        self._refused: OrderedDict[Block, None] = OrderedDict()  # last blocks of refused runs
        self.evicted_for_cap = self.evicted_for_space = self.expired = 0

    @property
    def used_bytes(self) -> int:
        return self._index.num_bytes + self._folder.quarantine_bytes

    def is_expired(self, extent: Extent, now: float) -> bool:
        ttl_seconds = self._bounds.ttl_seconds
        return ttl_seconds is not None and now - extent.used_at > ttl_seconds

    def make_room(self, num_bytes: int, run: BlockRun, *, retained: bool) -> bool:
        """Evict until a file of `num_bytes` may be written; False where it may not. OSError.

        What is retained makes room only for what is; and nothing for its own continuation, which
        would be of no use without it. What continues a refused run is refused for the same reason.
        """
        ends, follows = (run.group, run.keys[-1]), (run.group, run.parent)
        refused = follows in self._refused or not self._make(num_bytes, run, retained)
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

    def _make(self, num_bytes: int, run: BlockRun, retained: bool) -> bool:
        cap_bytes = self._bounds.cap_bytes
        if cap_bytes is not None and not self._shrink(cap_bytes - num_bytes, run, retained):
            return False
        return self._free(num_bytes, run, retained)

    def expire(self, now: float) -> int:
        with self._index.lock:
            old = [extent for extent in self._index if self.is_expired(extent, now)]
        for extent in old:
            self.delete(extent, "expired")
        self.expired += len(old)
        return len(old)

    def forget(self, extent: Extent, reason: str) -> bool:
        """Of a file that is no longer to be used; False if somebody else forgot it before."""
        with self._index.lock:
            if self._index.named(extent.name) is not extent:
                return False
            self._index.remove(extent, reason)
            return True

    def delete(self, extent: Extent, reason: str) -> None:
        """Raises OSError, and then its bytes still count."""
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
        """Evict what exceeds the bounds, retained or not; how many files."""
        before = self.evicted_for_cap + self.evicted_for_space
        if self._bounds.cap_bytes is not None:
            self._shrink(self._bounds.cap_bytes, None, True)
        self._free(0, None, False)
        return self.evicted_for_cap + self.evicted_for_space - before

    def _shrink(self, to_bytes: int, run: BlockRun | None, retained: bool) -> bool:
        """Evict until no more than `to_bytes` are in use."""
        if to_bytes < 0:
            return False
        while self.used_bytes > to_bytes:
            if self._folder.forget_quarantined():
                continue
            if not self._evict(run, retained):
                return False
            self.evicted_for_cap += 1
        return True

    def _free(self, num_bytes: int, run: BlockRun | None, retained: bool) -> bool:
        """Evict until the file system has room for `num_bytes` above the floor.

        No more is evicted than is missing: where others fill the disk, all would go in vain.
        """
        wanted = self._bounds.free_floor_bytes + num_bytes
        missing = wanted - self._files.free_bytes(self._folder.path)
        if missing <= 0:
            return True
        while missing > 0:
            freed = self._evict(run, retained)
            if not freed:
                return False
            missing -= freed
            self.evicted_for_space += 1
        return self._files.free_bytes(self._folder.path) >= wanted

    def _evict(self, run: BlockRun | None, retained: bool) -> int:
        """How many bytes the next victim had; 0 where nobody may leave for this run."""
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
