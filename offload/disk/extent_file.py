"""Writes and reads one extent file: in large requests, straight from and into the slots."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from offload.block_run import PageSlots
from offload.disk.extent_header import (
    PREFIX,
    RAW,
    SHUFFLED,
    ExtentHeader,
    ExtentMeta,
    ExtentUnreadable,
    checksum,
    header_bytes_of,
    page_table,
    parse,
)
from offload.disk.filesystem import FileSystem
from offload.disk.shuffle import PageShuffle

_REQUEST_BYTES = 4 << 20  # large for a disk, and small enough to be checked while in cache
_FIRST_READ_BYTES = 16 << 10  # holds most headers
_MIN_SAVING = 0.15  # shuffled pages take longer to read: they must be this much smaller


class LayoutDiffers(Exception):
    """The file's pages are of other sizes than the slots that should take them."""


@dataclass(frozen=True, slots=True)
class PackedExtent:
    """What an extent file will hold. `buffers` are its pages, in the order of the file."""

    header: ExtentHeader
    buffers: list[memoryview]


def pack(meta: ExtentMeta, slots: PageSlots, *, shuffle: PageShuffle | None) -> PackedExtent:
    """Describe an extent of these pages; they are not copied, but for those that are compressed.

    With `shuffle`, pages are compressed if the first one becomes at least 15% smaller by it.
    """
    num_blocks = len(meta.run.keys)
    assert num_blocks == len(slots.pages), (num_blocks, len(slots.pages))
    if shuffle is not None:
        first = slots.arrays[0][slots.pages[0]]
        even = all(array.shape[1] % 2 == 0 for array in slots.arrays)
        if not even or len(shuffle.encode(first)) > (1 - _MIN_SAVING) * len(first):
            shuffle = None
    table = page_table(len(slots.arrays), num_blocks)
    buffers: list[memoryview] = []
    for layer, array in enumerate(slots.arrays):
        rows = _Rows(array)
        for block, page in enumerate(slots.pages):
            buffer, encoding = rows.view(page), RAW
            if shuffle is not None:
                packed = shuffle.encode(array[page])
                if len(packed) < len(buffer):
                    buffer, encoding = memoryview(packed), SHUFFLED
            buffers.append(buffer)
            table[layer, block] = (len(buffer), encoding, checksum(buffer))
    page_bytes = tuple(array.shape[1] for array in slots.arrays)
    return PackedExtent(ExtentHeader(meta, page_bytes, table), buffers)


def write(files: FileSystem, path: Path, extent: PackedExtent) -> None:
    """Write a new file, whose bytes are on the disk when this returns. Raises OSError."""
    descriptor = files.create(path)
    try:
        files.write(descriptor, [memoryview(extent.header.pack()), *extent.buffers], 0)
        files.touch(path, extent.header.meta.created_at)
        files.sync(descriptor)
    finally:
        files.close(descriptor)


def excerpt(files: FileSystem, path: Path, meta: ExtentMeta, begin: int, end: int) -> PackedExtent:
    """Return the blocks from index `begin` to before `end` of a file, as an extent of their own.

    `meta` describes the new one. The pages stay as they are stored, checksums included. Raises
    ExtentUnreadable, OSError.
    """
    descriptor = files.open(path)
    try:
        header = read_header(files, descriptor)
        if header.meta.run.keys[begin:end] != meta.run.keys:
            raise ExtentUnreadable("holds other blocks than it did")
        table = np.ascontiguousarray(header.pages[:, begin:end])
        buffers: list[memoryview] = []
        for layer, offset in enumerate(header.offsets()[:, begin].tolist()):
            buffers.append(memoryview(bytearray(int(table["stored_bytes"][layer].sum()))))
            if files.read(descriptor, buffers[-1:], offset) < len(buffers[-1]):
                raise ExtentUnreadable("shorter than its header says")
    finally:
        files.close(descriptor)
    return PackedExtent(ExtentHeader(meta, header.page_bytes, table), buffers)


def read_header(files: FileSystem, descriptor: int) -> ExtentHeader:
    """Return the header of an open file. Raises ExtentUnreadable, OSError."""
    buffer = memoryview(bytearray(_FIRST_READ_BYTES))
    there = files.read(descriptor, [buffer], 0)
    header_bytes = header_bytes_of(bytes(buffer[: min(there, PREFIX.size)]))
    if header_bytes > there == len(buffer):
        buffer = memoryview(bytearray(header_bytes))
        there = files.read(descriptor, [buffer], 0)
    file_bytes = files.status(descriptor).st_size
    return parse(bytes(buffer[: min(there, header_bytes)]), file_bytes=file_bytes)


def read_pages(
    files: FileSystem,
    descriptor: int,
    header: ExtentHeader,
    blocks: Sequence[int],
    slots: PageSlots,
    shuffle: PageShuffle,
) -> list[bool]:
    """Fill slot i with block `blocks[i]` of the extent; return which of them are whole.

    A block is whole if the checksums of all its pages match; the slots of others hold garbage.
    Raises LayoutDiffers, ExtentUnreadable, OSError, and then all slots may hold garbage.
    """
    wanted = tuple(array.shape[1] for array in slots.arrays)
    layers = slice(slots.first_layer, slots.first_layer + len(wanted))
    if wanted != header.page_bytes[layers]:
        raise LayoutDiffers(f"pages of {header.page_bytes} bytes, slots of {wanted}")
    whole = [True] * len(blocks)
    for request in _requests(_stretches(header, blocks, slots)):
        buffers = [page for stretch in request for page in stretch.stored]
        there = files.read(descriptor, buffers, request[0].offset)
        for stretch in request:
            if there < stretch.num_bytes:
                raise ExtentUnreadable("shorter than its header says")
            there -= stretch.num_bytes
            expected = stretch.checksums
            for i, page in enumerate(stretch.stored):
                if checksum(page) != expected[i]:
                    whole[stretch.indices[i]] = False
            if stretch.shuffled:
                _decode(stretch, slots, shuffle, whole)
    return whole


def check(files: FileSystem, path: Path, shuffle: PageShuffle) -> ExtentHeader:
    """Read every byte of a file and return its header. Raises ExtentUnreadable, OSError."""
    descriptor = files.open(path)
    try:
        header = read_header(files, descriptor)
        blocks = range(len(header.meta.run.keys))
        scratch = tuple(np.empty((len(blocks), size), np.uint8) for size in header.page_bytes)
        slots = PageSlots(scratch, tuple(blocks))
        whole = read_pages(files, descriptor, header, blocks, slots, shuffle)
    finally:
        files.close(descriptor)
    if not all(whole):
        raise ExtentUnreadable(f"checksums of {whole.count(False)} blocks do not match")
    if header.meta.file_name != path.name:
        raise ExtentUnreadable(f"holds what belongs into {header.meta.file_name}")
    return header


@dataclass(slots=True)
class _Stretch:
    """Blocks of one layer that follow each other in the file."""

    layer: int
    indices: list[int]  # in `blocks`
    offset: int
    num_bytes: int
    stored: list[memoryview]  # where the bytes are read to: a raw page's are its slot
    checksums: list[int]
    shuffled: list[int]  # which of these pages are encoded so


def _stretches(header: ExtentHeader, blocks: Sequence[int], slots: PageSlots) -> Iterator[_Stretch]:
    """Yield what is to be read, in the order of the file.

    Blocks 3, 4 and 7 of two layers are four stretches: (3, 4) and (7,) of the first layer, then the
    same of the second.
    """
    order = sorted(range(len(blocks)), key=blocks.__getitem__)
    breaks = [i for i in range(1, len(order)) if blocks[order[i]] != blocks[order[i - 1]] + 1]
    parts = [order[i:j] for i, j in pairwise([0, *breaks, len(order)])]
    offsets = header.offsets()
    for layer, array in enumerate(slots.arrays, slots.first_layer):
        rows = _Rows(array)
        for indices in parts:
            first = blocks[indices[0]]
            table = header.pages[layer, first : first + len(indices)]
            sizes = table["stored_bytes"].tolist()
            encodings = table["encoding"].tolist()
            shuffled = [i for i, encoding in enumerate(encodings) if encoding != RAW]
            stored = [rows.view(slots.pages[index]) for index in indices]
            for i in shuffled:
                stored[i] = memoryview(bytearray(sizes[i]))
            if list(map(len, stored)) != sizes:
                raise ExtentUnreadable("a page of another size than its layer's")
            yield _Stretch(
                layer=layer,
                indices=indices,
                offset=int(offsets[layer, first]),
                num_bytes=sum(sizes),
                stored=stored,
                checksums=table["checksum"].tolist(),
                shuffled=shuffled,
            )


def _requests(stretches: Iterable[_Stretch]) -> Iterator[list[_Stretch]]:
    """Join stretches that follow each other in the file, up to about `_REQUEST_BYTES` at a time."""
    request: list[_Stretch] = []
    num_bytes = end = 0
    for stretch in stretches:
        if request and (stretch.offset != end or num_bytes >= _REQUEST_BYTES):
            yield request
            request, num_bytes = [], 0
        request.append(stretch)
        num_bytes += stretch.num_bytes
        end = stretch.offset + stretch.num_bytes
    if request:
        yield request


def _decode(stretch: _Stretch, slots: PageSlots, shuffle: PageShuffle, whole: list[bool]) -> None:
    """Put the shuffled pages of a stretch into their slots; clear `whole` where one cannot be."""
    array = slots.arrays[stretch.layer - slots.first_layer]
    for i in stretch.shuffled:
        index = stretch.indices[i]
        page = array[slots.pages[index]]
        whole[index] = whole[index] and shuffle.decode(stretch.stored[i], page)


class _Rows:
    """Gives the rows of a contiguous array as buffers, without copies."""

    def __init__(self, array: NDArray[np.uint8]) -> None:
        assert array.dtype == np.uint8 and array.ndim == 2, (array.dtype, array.shape)
        self._bytes = array.data.cast("B")  # refuses what is not contiguous
        self._row_bytes = array.shape[1]

    def view(self, row: int) -> memoryview:
        return self._bytes[row * self._row_bytes : (row + 1) * self._row_bytes]
