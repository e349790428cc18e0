"""Pages go into a file and come back into their slots."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from offload.block_run import PageSlots
from offload.disk import extent_file
from offload.disk.extent_file import LayoutDiffers
from offload.disk.extent_header import RAW, SHUFFLED
from offload.disk.filesystem import FileSystem
from offload.disk.shuffle import PageShuffle
from tests.offload.extents import blank, filled, is_right, meta_of, run_of


def write(path: Path, page_bytes: tuple[int, ...], blocks: int, *, group: int = 0) -> None:
    run = run_of("a", 0, blocks, group=group)
    packed = extent_file.pack(meta_of(run), filled(run, page_bytes), shuffle=None)
    extent_file.write(FileSystem(), path, packed)


def read(path: Path, blocks: Sequence[int], slots: PageSlots, files: FileSystem) -> list[bool]:
    descriptor = files.open(path)
    try:
        header = extent_file.read_header(files, descriptor)
        return extent_file.read_pages(files, descriptor, header, blocks, slots, PageShuffle())
    finally:
        files.close(descriptor)


@given(data=st.data(), page_bytes=st.lists(st.integers(1, 700), min_size=1, max_size=5))
def test_any_blocks_of_any_layers_come_back(data: st.DataObject, page_bytes: list[int]) -> None:
    blocks = data.draw(st.integers(1, 20))
    wanted = data.draw(st.lists(st.integers(0, blocks - 1), min_size=1, unique=True))
    begin = data.draw(st.integers(0, len(page_bytes) - 1))
    end = data.draw(st.integers(begin + 1, len(page_bytes)))
    group = data.draw(st.integers(0, 3))
    keys = tuple(run_of("a", 0, blocks).keys[block] for block in wanted)
    rows = blank(len(wanted), tuple(page_bytes[begin:end]))
    slots = PageSlots(rows.arrays, rows.pages, first_layer=begin)
    with TemporaryDirectory() as folder:
        path = Path(folder, "extent")
        write(path, tuple(page_bytes), blocks, group=group)
        assert read(path, wanted, slots, FileSystem()) == [True] * len(wanted)
    assert is_right(group, keys, slots) == [True] * len(wanted)
    others = np.delete(slots.arrays[0], slots.pages, axis=0)
    assert not others.any(), "a row that was not asked for"


class CountedReads(FileSystem):
    def __init__(self) -> None:
        self.sizes: list[int] = []

    def read(self, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        self.sizes.append(sum(map(len, buffers)))
        return super().read(descriptor, buffers, offset)


def test_an_extent_is_read_in_large_requests(tmp_path: Path) -> None:
    page_bytes = (33 << 10,) * 8
    write(tmp_path / "extent", page_bytes, 16)
    files, slots = CountedReads(), blank(16, page_bytes)
    assert all(read(tmp_path / "extent", range(16), slots, files))
    _, *pages = files.sizes
    assert sum(pages) == 16 * sum(page_bytes)
    assert all(size >= 1 << 20 for size in pages[:-1]) and len(pages) <= 4


@pytest.mark.parametrize("page_bytes", [(100,), (100, 30, 30), (100, 31)])
def test_slots_of_other_sizes_are_refused(tmp_path: Path, page_bytes: tuple[int, ...]) -> None:
    write(tmp_path / "extent", (100, 30), 2)
    slots = blank(2, page_bytes)
    if page_bytes == (100,):
        assert all(read(tmp_path / "extent", range(2), slots, FileSystem()))  # its first layer
    else:
        with pytest.raises(LayoutDiffers):
            read(tmp_path / "extent", range(2), slots, FileSystem())


def bfloat16_pages(rows: int, values: int) -> NDArray[np.uint8]:
    """Return pages of normal values, with a scale of its own for each of 64 channels."""
    random = np.random.default_rng(0)
    scales = np.exp(random.normal(size=64) * 0.7)
    numbers = (random.normal(size=(rows, values // 64, 64)) * scales).astype("<f4")
    halves = numbers.view("<u2").reshape(rows, -1, 2)[:, :, 1]  # the upper half of a float32
    return np.ascontiguousarray(halves).view(np.uint8)


@pytest.mark.parametrize(
    ("pages", "encoding"),
    [
        (bfloat16_pages(4, 8192), SHUFFLED),
        (np.random.default_rng(0).integers(0, 256, (4, 16384), dtype=np.uint8), RAW),
    ],
    ids=["bfloat16", "noise"],
)
def test_pages_are_compressed_where_it_pays(
    tmp_path: Path, pages: NDArray[np.uint8], encoding: int
) -> None:
    slots = PageSlots((pages,), (0, 1, 2, 3))
    packed = extent_file.pack(meta_of(run_of("a", 0, 4)), slots, shuffle=PageShuffle())
    assert set(packed.header.pages["encoding"].reshape(-1).tolist()) == {encoding}
    if encoding == SHUFFLED:
        assert packed.header.file_bytes < 0.8 * pages.size
    extent_file.write(FileSystem(), tmp_path / "extent", packed)
    again = np.zeros_like(pages)
    slots = PageSlots((again,), (3, 2, 1, 0))
    assert all(read(tmp_path / "extent", range(4), slots, FileSystem()))
    assert np.array_equal(again, pages[::-1])


@given(st.binary(min_size=2, max_size=4000).filter(lambda data: len(data) % 2 == 0))
def test_shuffling_loses_nothing(data: bytes) -> None:
    page, again = np.frombuffer(data, dtype=np.uint8), np.zeros(len(data), np.uint8)
    shuffle = PageShuffle()
    assert shuffle.decode(memoryview(shuffle.encode(page)), again)
    assert np.array_equal(again, page)


@given(st.binary(max_size=200))
def test_what_was_not_shuffled_is_not_decoded(data: bytes) -> None:
    stored = memoryview(PageShuffle().encode(np.zeros(300, np.uint8)))
    assert not PageShuffle().decode(memoryview(data), np.zeros(300, np.uint8))
    assert not PageShuffle().decode(stored, np.zeros(298, np.uint8))
