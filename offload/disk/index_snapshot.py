"""The index of a disk tier kept as one file, so that a start need not open every extent.

The copy saves time and decides nothing. Extents that it does not know are asked themselves, those
that are gone are passed over, and what it says of the others is checked when they are read. It is
not synced; where it is damaged or missing, all extents are asked.
"""

import struct
from collections.abc import Callable, Iterable
from operator import attrgetter

from offload.block_run import BlockRun
from offload.disk.extent_header import ExtentMeta, checksum
from offload.disk.folder import DiskFolder
from offload.disk.index import DiskEntry, DiskIndex, Extent
from offload.key import BlockKey

_HEAD = struct.Struct("<8sQ")  # magic and version, checksum of the rest
_MAGIC = b"lctxidx\1"
_EXTENT = struct.Struct("<32s32sIIQQddd?")
_KEY_BYTES = 32
_FEW, _SHARE = 64, 16  # a crash costs asking so many extents, or that part of all, at the start


class IndexSnapshot:
    def __init__(self, index: DiskIndex, folder: DiskFolder) -> None:
        self._index, self._folder = index, folder
        self._saved_changes = 0  # of the index, up to its latest copy

    def load(self, now: Callable[[], float]) -> None:
        """Fill the index, least recently used first, from the copy and the headers of the rest."""
        self._folder.report_foreign()
        unknown = set(self._folder.names())
        found = [entry for entry in parse(self._folder.read_index()) if entry.name in unknown]
        unknown.difference_update(entry.name for entry in found)
        for name in sorted(unknown):
            described = self._folder.read_header(name)
            if described is not None:
                header, used_at = described
                found.append(
                    DiskEntry(meta=header.meta, file_bytes=header.file_bytes, used_at=used_at)
                )
        found.sort(key=attrgetter("used_at"))
        with self._index.lock:
            latest = now()
            for entry in found:
                used_at = min(entry.used_at, latest)
                self._index.add(Extent(entry.meta, entry.file_bytes, used_at))
            self._saved_changes = self._index.changes - len(unknown)

    def save(self, *, least_changes: int = 1) -> None:
        """Let the files know of their last use; copy the index if it changed. Raises OSError."""
        with self._index.lock:
            uses = self._index.take_uses()
            changes = self._index.changes
            copied: list[DiskEntry] | None = None
            if changes - self._saved_changes >= least_changes:
                copied = self._index.entries()
        for name, used_at in uses:
            self._folder.touch(name, used_at)
        if copied is not None:
            self._folder.save_index(pack(copied))
            self._saved_changes = changes

    def save_many(self) -> None:
        """As `save`, but no copy for a few changes."""
        self.save(least_changes=max(_FEW, len(self._index) // _SHARE))


def pack(entries: Iterable[DiskEntry]) -> bytes:
    parts: list[bytes] = []
    for entry in entries:
        meta, run = entry.meta, entry.meta.run
        parts.append(
            _EXTENT.pack(
                run.namespace,
                run.parent,
                run.group,
                len(run.keys),
                run.first_block,
                entry.file_bytes,
                meta.cost_seconds,
                meta.created_at,
                entry.used_at,
                meta.retained,
            )
        )
        parts.extend(run.keys)
    body = b"".join(parts)
    return _HEAD.pack(_MAGIC, checksum(body)) + body


def parse(data: bytes) -> list[DiskEntry]:
    """Empty if `data` is not what `pack` returned."""
    if len(data) < _HEAD.size:
        return []
    magic, expected = _HEAD.unpack_from(data)
    if magic != _MAGIC or checksum(memoryview(data)[_HEAD.size :]) != expected:
        return []
    found: list[DiskEntry] = []
    at = _HEAD.size
    while at < len(data):
        fields = _EXTENT.unpack_from(data, at)
        namespace, parent, group, blocks, first_block, size, cost, created, used, retained = fields
        at += _EXTENT.size
        end = at + blocks * _KEY_BYTES
        keys = [BlockKey(data[begin : begin + _KEY_BYTES]) for begin in range(at, end, _KEY_BYTES)]
        at = end
        meta = ExtentMeta(
            run=BlockRun(BlockKey(namespace), group, first_block, BlockKey(parent), tuple(keys)),
            cost_seconds=cost,
            created_at=created,
            retained=retained,
        )
        found.append(DiskEntry(meta=meta, file_bytes=size, used_at=used))
    return found
