"""A copy of the index of a disk tier in one file, so that a start need not open every extent.

The copy saves time and decides nothing. Extents that it does not know are opened, those that are
gone are passed over, and what it says of the others is checked when they are read. It is not
synced; where it is damaged or missing, all extents are opened.
"""

import struct
from collections.abc import Callable, Iterable
from operator import attrgetter

from offload.block_run import BlockRun
from offload.disk.extent_header import (
    ExtentMeta,
    checksum,
    pack_sources,
    parse_sources,
    sources_bytes,
)
from offload.disk.folder import DiskFolder
from offload.disk.index import DiskEntry, DiskIndex, Extent
from offload.key import BlockKey

_HEAD = struct.Struct("<8sQ")  # magic and version, checksum of the rest
_PLAIN, _MAGIC = b"lctxidx\1", b"lctxidx\2"  # without sources, which earlier versions read; with
_EXTENT = struct.Struct("<32s32sIIQQdddB")
_RETAINED, _SOURCES = 1, 2  # flags; the second says that sources follow the keys
_KEY_BYTES = 32
# A crash may leave so many extents out of the copy, or this part of all: the next start opens them
_FEW, _SHARE = 64, 16


class IndexSnapshot:
    """Fills the index at a start, and saves copies of it. The tier's writer calls it."""

    def __init__(self, index: DiskIndex, folder: DiskFolder) -> None:
        self._index, self._folder = index, folder
        self._saved_changes = 0  # `DiskIndex.changes` at the latest copy

    def load(self, now: Callable[[], float]) -> None:
        """Fill the index, least recently used first, from the copy and the headers of the rest.

        `now` is called with the index's lock held; no extent counts as used later than that.
        """
        self._folder.report_foreign()
        unknown = set(self._folder.names())
        copied = {entry.name: entry for entry in parse(self._folder.read_index())}
        found = [entry for name, entry in copied.items() if name in unknown]
        unknown -= copied.keys()
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
        """Note in the files when they were used; copy the index if it changed. Raises OSError.

        It is copied after `least_changes`, which are extents that came or left.
        """
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
        """Save, but copy the index only after many changes. Raises OSError."""
        self.save(least_changes=max(_FEW, len(self._index) // _SHARE))


def pack(entries: Iterable[DiskEntry]) -> bytes:
    """Return the copy's bytes."""
    parts: list[bytes] = []
    magic = _PLAIN
    for entry in entries:
        meta, run = entry.meta, entry.meta.run
        sources = pack_sources(run)
        magic = _MAGIC if sources else magic
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
                meta.retained * _RETAINED + bool(sources) * _SOURCES,
            )
        )
        parts.extend(run.keys)
        parts.append(sources)
    body = b"".join(parts)
    return _HEAD.pack(magic, checksum(body)) + body


def parse(data: bytes) -> list[DiskEntry]:
    """Return the entries of a copy; none if `data` is not what `pack` returned."""
    if len(data) < _HEAD.size:
        return []
    magic, expected = _HEAD.unpack_from(data)
    if magic not in (_PLAIN, _MAGIC) or checksum(memoryview(data)[_HEAD.size :]) != expected:
        return []
    found: list[DiskEntry] = []
    at = _HEAD.size
    while at < len(data):
        fields = _EXTENT.unpack_from(data, at)
        namespace, parent, group, blocks, first_block, size, cost, created, used, flags = fields
        at += _EXTENT.size
        end = at + blocks * _KEY_BYTES
        keys = [BlockKey(data[begin : begin + _KEY_BYTES]) for begin in range(at, end, _KEY_BYTES)]
        at = end
        sources: tuple[str, ...] = ()
        if flags & _SOURCES:
            at += sources_bytes(data, at)
            sources = parse_sources(data[end:at])
        root, before = BlockKey(namespace), BlockKey(parent)
        meta = ExtentMeta(
            run=BlockRun(root, group, first_block, before, tuple(keys), sources),
            cost_seconds=cost,
            created_at=created,
            retained=bool(flags & _RETAINED),
        )
        found.append(DiskEntry(meta=meta, file_bytes=size, used_at=used))
    return found
