"""The format of an extent file: which blocks it holds, where each page lies, and its checksums.

    magic, version, header_bytes | namespace, parent, group, first_block, cost, created, retained
    | keys | bytes of a page in each layer | per page: stored bytes, encoding, checksum
    | bytes of sources, sources, with a zero between two; nothing where there are none
    | zeros | checksum of all this                                        = header_bytes
    | pages of layer 0, one per key | pages of layer 1 | ...

The file describes itself: the index is only a copy of what headers say. A file never changes. It is
named by the key of its last block, which depends on all blocks before it, so files of equal names
are equal.

Pages begin 64 bytes after a multiple of 4,096, on purpose: what a header of 3 blocks and 2 layers
says takes 344 bytes, and the header has 64 + 4,096 = 4,160. Processors of the Zen 3 family copy
from page cache to memory at an eighth of their speed where the target lies 8 to 31 bytes after the
source, modulo 4,096, and that is where large allocations begin (16 bytes into a page).
"""

import math
import struct
from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray

from offload.block_run import BlockRun
from offload.key import BlockKey

MAGIC = b"longctx\0"
VERSION = 1
SUFFIX = ".kv"

RAW = 0  # a page as it is in memory
SHUFFLED = 1  # the low bytes of all values, then the high ones by zstd: offload/disk/shuffle.py

PREFIX = struct.Struct("<8sII")  # magic, version, header_bytes: the same in every version
_FIXED = struct.Struct("<32s32sIIIIQddQ")
_SOURCES = struct.Struct("<I")
_CHECKSUM = struct.Struct("<Q")
_PAGE = np.dtype([("stored_bytes", "<u4"), ("encoding", "<u4"), ("checksum", "<u8")])
_KEY_BYTES = 32
_ALIGNMENT = 4096
_SKEW = 64
_MAX_HEADER_BYTES = 64 << 20


class ExtentUnreadable(Exception):
    """The file is no extent, or no longer one; the message says what is wrong with it."""


class OtherVersion(ExtentUnreadable):
    """Written by another version of longctx."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtentMeta:
    """What is known of an extent before its pages are: every record of an extent holds one.

    `cost_seconds` is what computing the blocks again takes; `created_at` is in seconds since 1970.
    `retained` says whether some document retains the blocks: in a header when they were written,
    elsewhere when the record was made.
    """

    run: BlockRun
    cost_seconds: float
    created_at: float
    retained: bool

    @property
    def file_name(self) -> str:
        """The name of the extent's file."""
        return file_name(self.run)


@dataclass(frozen=True, slots=True)
class ExtentHeader:
    """All that a file says before its pages.

    `pages` [layers, blocks] has (stored_bytes, encoding, checksum) for each page.
    """

    meta: ExtentMeta
    page_bytes: tuple[int, ...]  # of each layer, decoded
    pages: NDArray[np.void]

    @property
    def header_bytes(self) -> int:
        """The size of the header, padding included: where the first page begins."""
        blocks, layers = len(self.meta.run.keys), len(self.page_bytes)
        tables = blocks * _KEY_BYTES + layers * 8 + layers * blocks * _PAGE.itemsize
        tables += len(pack_sources(self.meta.run))
        used = PREFIX.size + _FIXED.size + tables + _CHECKSUM.size
        return math.ceil((used - _SKEW) / _ALIGNMENT) * _ALIGNMENT + _SKEW

    @property
    def file_bytes(self) -> int:
        return self.header_bytes + int(self.pages["stored_bytes"].sum(dtype=np.int64))

    def offsets(self) -> NDArray[np.int64]:
        """Return where each page begins in the file, [layers, blocks]."""
        stored = self.pages["stored_bytes"].astype(np.int64)
        ends = np.cumsum(stored.reshape(-1)).reshape(stored.shape)
        return self.header_bytes + ends - stored

    def pack(self) -> bytes:
        """Return the header as it stands in the file."""
        run = self.meta.run
        parts = (
            PREFIX.pack(MAGIC, VERSION, self.header_bytes),
            _FIXED.pack(
                run.namespace,
                run.parent,
                run.group,
                len(run.keys),
                len(self.page_bytes),
                int(self.meta.retained),
                run.first_block,
                self.meta.cost_seconds,
                self.meta.created_at,
                int(self.pages["stored_bytes"].sum(dtype=np.int64)),
            ),
            *run.keys,
            np.asarray(self.page_bytes, dtype="<u8").tobytes(),
            self.pages.tobytes(),
            pack_sources(run),
        )
        body = b"".join(parts).ljust(self.header_bytes - _CHECKSUM.size, b"\0")
        return body + _CHECKSUM.pack(checksum(body))


def file_name(run: BlockRun) -> str:
    """Return the name of the file that holds this run, and that no other run has."""
    return f"{run.keys[-1].hex()}-{run.group}-{run.first_block}{SUFFIX}"


def pack_sources(run: BlockRun) -> bytes:
    """Return the ids of a run's sources as they stand in files."""
    packed = "\0".join(run.sources).encode()
    return _SOURCES.pack(len(packed)) + packed if packed else b""


def parse_sources(packed: bytes) -> tuple[str, ...]:
    """Return the ids that `pack_sources` packed, before other bytes or zeros."""
    if len(packed) < _SOURCES.size:
        return ()
    end = _SOURCES.size + _SOURCES.unpack_from(packed)[0]
    return tuple(packed[_SOURCES.size : end].decode().split("\0")) if end > _SOURCES.size else ()


def sources_bytes(data: bytes, at: int) -> int:
    """Return how many bytes of `data` from there on `pack_sources` has packed; not for none."""
    return int(_SOURCES.size + _SOURCES.unpack_from(data, at)[0])


def checksum(data: bytes | memoryview) -> int:
    return xxhash.xxh3_64_intdigest(data)


def page_table(layers: int, blocks: int) -> NDArray[np.void]:
    return np.zeros((layers, blocks), dtype=_PAGE)


def header_bytes_of(prefix: bytes) -> int:
    """Return the size of a header from its first `PREFIX.size` bytes. Raises ExtentUnreadable."""
    if len(prefix) < PREFIX.size:
        raise ExtentUnreadable("shorter than any header")
    magic, version, header_bytes = PREFIX.unpack_from(prefix)
    if magic != MAGIC:
        raise ExtentUnreadable("not an extent file of longctx")
    if version != VERSION:
        raise OtherVersion(f"format version {version}; this longctx reads version {VERSION}")
    if not PREFIX.size + _FIXED.size + _CHECKSUM.size <= header_bytes <= _MAX_HEADER_BYTES:
        raise ExtentUnreadable(f"impossible header of {header_bytes} bytes")
    return int(header_bytes)


def parse(header: bytes, *, file_bytes: int) -> ExtentHeader:
    """Return the header that `pack` made, of a file of this size. Raises ExtentUnreadable."""
    expected = header_bytes_of(header)
    if len(header) != expected:
        raise ExtentUnreadable(f"header cut off after {len(header)} of {expected} bytes")
    body, found = header[: -_CHECKSUM.size], header[-_CHECKSUM.size :]
    if _CHECKSUM.pack(checksum(body)) != found:
        raise ExtentUnreadable("checksum of the header does not match")
    fields = _FIXED.unpack_from(body, PREFIX.size)
    namespace, parent, group, blocks, layers, retained, first_block, cost, created, stored = fields
    if expected + stored != file_bytes:
        raise ExtentUnreadable(f"file of {file_bytes} bytes instead of {expected + stored}")
    at = PREFIX.size + _FIXED.size
    keys = tuple(
        BlockKey(body[begin : begin + _KEY_BYTES])
        for begin in range(at, at + blocks * _KEY_BYTES, _KEY_BYTES)
    )
    at += blocks * _KEY_BYTES
    page_bytes = np.frombuffer(body, dtype="<u8", count=layers, offset=at)
    at += layers * 8
    pages = np.frombuffer(body, dtype=_PAGE, count=layers * blocks, offset=at)
    at += layers * blocks * _PAGE.itemsize
    sources = parse_sources(body[at:])
    meta = ExtentMeta(
        run=BlockRun(BlockKey(namespace), group, first_block, BlockKey(parent), keys, sources),
        cost_seconds=cost,
        created_at=created,
        retained=bool(retained),
    )
    return ExtentHeader(meta, tuple(page_bytes.tolist()), pages.reshape(layers, blocks))
