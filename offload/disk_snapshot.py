"""The index of a disk tier as one file, so that a start need not open every extent.

It saves time and decides nothing. Extents that it does not know are asked themselves, those that
are gone are passed over, and what it says of the others is checked when they are read. It is not
synced; if it is damaged or missing, all extents are asked.
"""

import struct
from collections.abc import Iterable
from dataclasses import dataclass

from offload.disk_index import Extent
from offload.extent import checksum
from offload.key import BlockKey
from offload.run import BlockRun

_HEAD = struct.Struct("<8sQ")  # magic and version, checksum of the rest
_MAGIC = b"lctxidx\1"
_EXTENT = struct.Struct("<32s32sIIQQddd?")
_KEY_BYTES = 32


@dataclass(frozen=True, slots=True)
class Remembered:
    extent: Extent
    retained: bool


def pack(extents: Iterable[Remembered]) -> bytes:
    parts: list[bytes] = []
    for remembered in extents:
        extent, run = remembered.extent, remembered.extent.run
        parts.append(
            _EXTENT.pack(
                run.namespace,
                run.parent,
                run.group,
                len(run.keys),
                run.first_block,
                extent.file_bytes,
                extent.cost_seconds,
                extent.created_at,
                extent.used_at,
                remembered.retained,
            )
        )
        parts.extend(run.keys)
    body = b"".join(parts)
    return _HEAD.pack(_MAGIC, checksum(body)) + body


def parse(data: bytes) -> list[Remembered]:
    """Empty if `data` is not what `pack` returned."""
    if len(data) < _HEAD.size:
        return []
    magic, expected = _HEAD.unpack_from(data)
    body = memoryview(data)[_HEAD.size :]
    if magic != _MAGIC or checksum(body) != expected:
        return []
    found: list[Remembered] = []
    at = _HEAD.size
    while at < len(data):
        fields = _EXTENT.unpack_from(data, at)
        namespace, parent, group, blocks, first_block, size, cost, created, used, retained = fields
        at += _EXTENT.size
        end = at + blocks * _KEY_BYTES
        keys = tuple(
            [BlockKey(data[begin : begin + _KEY_BYTES]) for begin in range(at, end, _KEY_BYTES)]
        )
        at = end
        run = BlockRun(BlockKey(namespace), group, first_block, BlockKey(parent), keys)
        extent = Extent.of(
            run, file_bytes=size, cost_seconds=cost, created_at=created, used_at=used
        )
        found.append(Remembered(extent, retained))
    return found
