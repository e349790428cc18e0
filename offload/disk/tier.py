"""The tier that outlives the process: extent files in one folder, bounded, checked, evicted whole.

DiskTier         this file: reads and writes, and what happens when the machine fails
DiskIndex        which blocks are in which file; `IndexSnapshot` keeps a copy for the next start
DiskQuota        who leaves when the bounds are reached
DiskFolder       names, the lock, the quarantine
ExtentIO         the bytes of one file
"""

import contextlib
import errno
import threading
import time
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Final, Literal

from offload.block_run import BlockRun, Slots
from offload.descent import Stem
from offload.disk import extent_file
from offload.disk.clocks import Clocks, seconds_since_boot
from offload.disk.extent_file import LayoutDiffers
from offload.disk.extent_header import ExtentMeta, ExtentUnreadable, file_name
from offload.disk.extent_io import ExtentIO, LocalExtents
from offload.disk.filesystem import FileSystem
from offload.disk.folder import TEMPORARY, DiskFolder, FolderInUse, FolderRefused
from offload.disk.incidents import Incidents
from offload.disk.index import DiskEntry, DiskIndex, Extent
from offload.disk.index_snapshot import IndexSnapshot
from offload.disk.quota import Collected, DiskBounds, DiskQuota
from offload.disk.shuffle import PageShuffle
from offload.disk.verify import DiskVerifier, Verified
from offload.eviction import EvictionPolicy
from offload.key import BlockKey
from offload.stats import Dropped, TierStats
from offload.tier_names import TierName

__all__ = [
    "Collected",
    "DiskBounds",
    "DiskEntry",
    "DiskTier",
    "DiskTierConfig",
    "FolderInUse",
    "FolderRefused",
    "Verified",
]

_REST_SECONDS = 30.0  # after a write that failed, during which nothing is written
_SLOW_READ_SECONDS = 5.0  # for one extent

_INCIDENTS = (
    "corrupt_files",  # one for each file, however many of its pages
    "other_versions",
    "foreign_files",
    "missing_files",
    "layouts_differ",
    "read_errors",
    "slow_reads",
    "write_errors",
    "full_disks",
    "refusals",  # for want of room within the bounds
    "lost_folders",
    "clock_jumps",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskTierConfig:
    """Where a disk tier keeps its files, and how.

    A `read_only` tier needs no lock and changes nothing. `compress` is for pages of 16-bit floats:
    a quarter smaller, and several times slower to read.
    """

    folder: Path
    bounds: DiskBounds = field(default_factory=DiskBounds)
    read_only: bool = False
    compress: bool = False


class DiskTier:
    """A `DurableTier`: writes runs to extent files and reads them back in any later process.

    A write is durable when it returns True: the file was synced under a temporary name, renamed,
    and its folder synced. A read checks each page, and what is not exactly what was written is a
    miss. Whatever the machine does, the worst that follows is that text is computed again: `write`,
    `read` and `drop` raise nothing for it, but count and log it (`Incidents`).

    Any thread may call anything. Reads run at the same time; writes, deletions and `gc` happen one
    at a time. One lock guards the index, and files are read and written outside it. So a file may
    be evicted while somebody reads it: whoever has it open reads on, and whoever comes too late has
    a miss.

    One process may write to a folder, and any number may read it at the same time (`read_only`);
    these must not call `write`, `drop` or `gc`. After `close` another process may write there.
    """

    name: Final[TierName] = "disk"
    durable: Final[Literal[True]] = True

    def __init__(
        self,
        config: DiskTierConfig,
        policy: EvictionPolicy[str],
        *,
        clock: Callable[[], float] = time.time,
        steady_clock: Callable[[], float] = seconds_since_boot,
        files: FileSystem | None = None,
        extents: ExtentIO | None = None,
    ) -> None:
        """Open the folder, which is made if need be. Raises FolderRefused, OSError.

        `clock` may jump, `steady_clock` never does. `files` is the operating system, and `extents`
        moves the pages' bytes; by default the real one, and pages of this process.
        """
        self.read_only = read_only = config.read_only
        self._bounds = config.bounds
        self._files = files or FileSystem()
        self._shuffle = PageShuffle()
        self._extents = extents or LocalExtents(
            self._files, self._shuffle, compress=config.compress
        )
        self._writer = threading.Lock()  # one write at a time, since room is made for one file
        # These are counted under the lock of the index.
        self._hits = self._misses = self._extents_written = 0
        self._read_bytes = self._write_bytes = 0
        self._read_seconds = self._write_seconds = 0.0
        self._incidents = Incidents(_INCIDENTS, steady_clock)
        self._clocks = Clocks(clock, steady_clock)
        self._no_writes_until: float | None = None  # by the steady clock
        self._index = DiskIndex(policy)
        self._folder = DiskFolder(config.folder, self._files, self._incidents, read_only=read_only)
        self._snapshot = IndexSnapshot(self._index, self._folder)
        self._quota = DiskQuota(
            self._bounds, self._index, self._folder, self._files, self._incidents
        )
        try:
            self._snapshot.load(self._now)
            if not read_only:
                self.gc()
        except BaseException:
            self._folder.leave()
            raise

    # -- reading --------------------------------------------------------------------------------

    def has(self, group: int, key: BlockKey) -> bool:
        return self._index.holder((group, key)) is not None

    def read(self, group: int, keys: Sequence[BlockKey], slots: Slots) -> list[bool]:
        """Fill `slots` and return which keys arrived; the rows of others may hold garbage."""
        assert len(keys) == len(slots.pages), (len(keys), len(slots.pages))
        begin = time.perf_counter()
        found = [False] * len(keys)
        for extent, wanted in self._plan(group, keys):
            rows = slots.pick(wanted)
            here = self._read_extent(extent, [keys[i] for i in wanted], rows)
            for i, whole in zip(wanted, here, strict=True):
                found[i] = whole
        hits = sum(found)
        with self._index.lock:
            self._hits += hits
            self._misses += len(found) - hits
            self._read_bytes += hits * slots.block_bytes
            self._read_seconds += time.perf_counter() - begin
        return found

    def _plan(self, group: int, keys: Sequence[BlockKey]) -> list[tuple[Extent, list[int]]]:
        """Return the extents to read from, with the indices of the keys to read from each."""
        plan: dict[str, tuple[Extent, list[int]]] = {}
        with self._index.lock:
            now = self._now()
            for i, key in enumerate(keys):
                extent = self._index.holder((group, key))
                if extent is not None and not self._quota.is_expired(extent, now):
                    plan.setdefault(extent.name, (extent, []))[1].append(i)
            for extent, _ in plan.values():
                self._index.use(extent, now)
        return list(plan.values())

    def _read_extent(self, extent: Extent, keys: Sequence[BlockKey], slots: Slots) -> list[bool]:
        """Read from one file; what fails is reported, and a file that is no good is put aside."""
        begin = self._clocks.steady()
        found = [False] * len(keys)
        try:
            run = extent.meta.run
            blocks = [run.keys.index(key) for key in keys]
            found = self._extents.read(self._folder.file(extent.name), run, blocks, slots)
            if not all(found):
                raise ExtentUnreadable("checksum of a page does not match")
        except ExtentUnreadable as error:
            if self._quota.forget(extent, "corrupt"):
                self._folder.quarantine(extent.name, error)
        except FileNotFoundError:
            if self._quota.forget(extent, "deleted"):
                self._incidents.report(
                    "missing_files", f"{self._folder.file(extent.name)} was removed by somebody"
                )
        except LayoutDiffers as error:
            self._incidents.report("layouts_differ", f"{extent.name} does not fit: {error}")
        except OSError as error:
            self._incidents.report("read_errors", f"{extent.name} cannot be read: {error}")
        seconds = self._clocks.steady() - begin
        if seconds > _SLOW_READ_SECONDS:
            self._incidents.report(
                "slow_reads",
                f"reading {extent.name} of {extent.file_bytes} bytes took {seconds:.1f} s",
            )
        return found

    # -- writing --------------------------------------------------------------------------------

    def write(self, run: BlockRun, slots: Slots, *, cost_seconds: float, retained: bool) -> bool:
        """Return True once the whole run is durable; False where it cannot be, now or ever."""
        assert not self.read_only
        with self._writer:
            if self._rests():
                return False
            try:
                return self._write(run, slots, cost_seconds=cost_seconds, retained=retained)
            except (OSError, FolderRefused) as error:
                self._writing_failed(error)
                return False

    def _write(self, run: BlockRun, slots: Slots, *, cost_seconds: float, retained: bool) -> bool:
        begin = time.perf_counter()
        if not self._folder.is_ours():
            self._enter_again()
        if self._is_here(run, retained=retained):
            return True
        with self._index.lock:
            now = self._now()
        meta = ExtentMeta(run=run, cost_seconds=cost_seconds, created_at=now, retained=retained)
        packed = self._extents.pack(meta, slots)
        if not self._quota.make_room(packed.header.file_bytes, run, retained=retained):
            return False
        name = meta.file_name
        temporary = self._folder.file(name + TEMPORARY)
        try:
            packed.write(temporary)
            self._folder.publish(temporary, name)
        except BaseException:
            self._folder.discard(temporary)
            raise
        with self._index.lock:
            self._index.add(Extent(meta, packed.header.file_bytes, used_at=now))
            self._extents_written += 1
            self._write_bytes += packed.header.file_bytes
            self._write_seconds += time.perf_counter() - begin
        return True

    def _is_here(self, run: BlockRun, *, retained: bool) -> bool:
        """Return whether this very run has a file, which is used and retained like a new one."""
        with self._index.lock:
            extent = self._index.named(file_name(run))
        if extent is None:
            return False
        try:
            whole = self._files.status(self._folder.file(extent.name)).st_size == extent.file_bytes
        except FileNotFoundError:
            whole = False
        if not whole:
            self._quota.forget(extent, "deleted")
            return False
        with self._index.lock:
            if self._index.named(extent.name) is not extent:
                return False
            self._index.use(extent, self._now())
            if retained:
                self._index.retain(run.keys)
        return True

    def _rests(self) -> bool:
        """Return whether a write failed a moment ago, so that none is tried now."""
        until = self._no_writes_until
        return until is not None and self._clocks.steady() < until

    def _writing_failed(self, error: Exception) -> None:
        """Report the error, and write nothing for a while."""
        self._no_writes_until = self._clocks.steady() + _REST_SECONDS
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        self._incidents.report(
            "full_disks" if full else "write_errors",
            f"cannot write to {self._folder.path}: {error}; nothing is stored there for "
            f"{_REST_SECONDS:.0f} s" + ("; free some space or lower the cap" if full else ""),
        )

    def _enter_again(self) -> None:
        """Make the folder again, which was removed: what it held is gone. Raises OSError."""
        self._incidents.report(
            "lost_folders",
            f"{self._folder.path} was removed while in use; it is made again, empty",
        )
        with self._index.lock:
            for extent in list(self._index):
                self._index.remove(extent, "deleted")
        self._folder.enter()
        self._snapshot.load(self._now)

    # -- keeping --------------------------------------------------------------------------------

    def use(self, keys: Iterable[BlockKey]) -> None:
        with self._index.lock:
            now = self._now()
            for extent in self._index.holding(keys):
                self._index.use(extent, now)

    def retain(self, keys: Iterable[BlockKey]) -> None:
        """Evict what holds one of these keys only for the sake of what is retained too."""
        with self._index.lock:
            self._index.retain(keys)

    def release(self, keys: Iterable[BlockKey]) -> None:
        with self._index.lock:
            self._index.release(keys)

    def drop(self, keys: Iterable[BlockKey]) -> Dropped:
        """Delete these keys, in any group, durably: no byte of them is left in any file.

        Of an extent of 16 blocks whose last 4 are deleted, the first 12 are written to a file of
        their own. Where that cannot be done, they are lost as well, and are computed again.
        """
        assert not self.read_only
        gone = set(keys)
        before_bytes, blocks, left = self._quota.used_bytes, 0, 0
        with self._writer:
            with self._index.lock:
                extents = list(self._index.holding(gone))
            for extent in extents:
                deleted = sum(key in gone for key in extent.meta.run.keys)
                try:
                    self._cut(extent, gone)
                    blocks += deleted
                except OSError as error:
                    left += deleted
                    self._deleting_failed(error)
            try:
                self._folder.forget_quarantined_of(gone)
                self._folder.sync_removals()
            except OSError as error:
                left += 1
                self._deleting_failed(error)
        return Dropped(blocks, max(0, before_bytes - self._quota.used_bytes), left)

    def _cut(self, extent: Extent, gone: Container[BlockKey]) -> None:
        """Delete an extent, but write what it has of other keys anew. Raises OSError if it stays.

        The new files get their names when the old one is gone: the cap holds at every moment.
        """
        with self._index.lock:
            meta = self._index.meta_now(extent)
        keys = meta.run.keys
        cuts = [-1, *(i for i, key in enumerate(keys) if key in gone), len(keys)]
        new: list[tuple[Path, ExtentMeta, int]] = []
        for begin, end in ((before + 1, cut) for before, cut in pairwise(cuts)):
            if begin < end:
                with contextlib.suppress(ExtentUnreadable, OSError):
                    new.append(self._excerpt(extent.name, meta, begin, end))
        try:
            self._quota.delete(extent, "deleted")
        except OSError:
            for temporary, _, _ in new:
                self._folder.discard(temporary)
            raise
        for temporary, part, file_bytes in new:
            with contextlib.suppress(OSError):
                self._folder.publish(temporary, part.file_name)
                with self._index.lock:
                    self._index.add(Extent(part, file_bytes, extent.used_at))

    def _excerpt(
        self, name: str, meta: ExtentMeta, begin: int, end: int
    ) -> tuple[Path, ExtentMeta, int]:
        """Write blocks of a file to a temporary one. Raises ExtentUnreadable, OSError."""
        share = (end - begin) / len(meta.run.keys)
        part = replace(
            meta, run=meta.run.stretch(begin, end), cost_seconds=meta.cost_seconds * share
        )
        temporary = self._folder.file(part.file_name + TEMPORARY)
        with self._index.lock:
            if self._index.named(part.file_name) is not None:
                raise ExtentUnreadable("has a file of its own already")
        try:
            extent = extent_file.excerpt(self._files, self._folder.file(name), part, begin, end)
            extent_file.write(self._files, temporary, extent)
        except BaseException:
            self._folder.discard(temporary)
            raise
        return temporary, part, extent.header.file_bytes

    def _deleting_failed(self, error: OSError) -> None:
        self._incidents.report("write_errors", f"cannot delete from {self._folder.path}: {error}")

    def stems(self) -> list[Stem]:
        with self._index.lock:
            return [Stem.of(extent.meta.run) for extent in self._index]

    def gc(self) -> Collected:
        """Remove what is too old or over the bounds, and what crashes have left; count files."""
        assert not self.read_only
        expired = evicted = temporary = 0
        with self._writer:
            try:
                temporary = self._folder.remove_temporary()
                with self._index.lock:
                    now = self._now()
                expired = self._quota.expire(now)
                evicted = self._quota.shrink()
                self._snapshot.save_many()
            except OSError as error:
                self._incidents.report(
                    "write_errors", f"cannot clean up {self._folder.path}: {error}"
                )
        return Collected(expired=expired, evicted=evicted, temporary=temporary)

    def close(self) -> None:
        """Save the copy of the index and give up the lock: now another process may write."""
        with self._writer:
            if not self.read_only:
                with contextlib.suppress(OSError):
                    self._snapshot.save()
            self._folder.leave()

    # -- looking --------------------------------------------------------------------------------

    @property
    def losses(self) -> int:
        """A count of extents that left, for whatever reason."""
        return self._index.removed

    def explain(self, group: int, key: BlockKey) -> str | None:
        """Return why a block left: evicted, expired, corrupt or deleted; None if not known."""
        with self._index.lock:
            return self._index.explain((group, key))

    def entries(self) -> list[DiskEntry]:
        """Return all extents, chain by chain, each chain from its beginning."""
        with self._index.lock:
            found = self._index.entries()
        return sorted(found, key=_by_chain)

    def verify(self, report: Callable[[str], None] = lambda line: None) -> Verified:
        """Read and check every byte; quarantine bad files, and make the index true again.

        `report` is given a line for each file that is not as it should be.
        """
        return DiskVerifier(
            self._files, self._folder, self._index, self._quota, self._shuffle
        ).verify(self._writer, self._now, report)

    def stats(self) -> TierStats:
        incidents = self._incidents.counts()
        corrupt_files = incidents.pop("corrupt_files")
        with self._index.lock:
            return TierStats(
                held_bytes=self._quota.used_bytes,
                capacity_bytes=self._bounds.cap_bytes,
                blocks=self._index.num_blocks,
                hits=self._hits,
                misses=self._misses,
                evictions={
                    "cap": self._quota.evicted_for_cap,
                    "space": self._quota.evicted_for_space,
                    "ttl": self._quota.expired,
                },
                read_bytes=self._read_bytes,
                read_seconds=self._read_seconds,
                write_bytes=self._write_bytes,
                write_seconds=self._write_seconds,
                extents=len(self._index),
                extents_written=self._extents_written,
                corrupt_files=corrupt_files,
                quarantine_files=self._folder.quarantine_files,
                quarantine_bytes=self._folder.quarantine_bytes,
                writes_off=self._rests(),
                incidents=incidents,
            )

    # -- the index ------------------------------------------------------------------------------

    def _now(self) -> float:
        """Return the time of day, and move the index with its jumps. The caller holds its lock."""
        now, jump = self._clocks.now()
        if jump:
            self._index.shift(jump)
            self._incidents.report("clock_jumps", f"the clock jumped by {jump:.0f} s")
        return now


def _by_chain(entry: DiskEntry) -> tuple[BlockKey, int, int]:
    run = entry.meta.run
    return run.namespace, run.group, run.first_block
