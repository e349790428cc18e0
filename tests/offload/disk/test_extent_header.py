"""The file format: what was packed is parsed, and nothing else is."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.disk.extent_header import (
    VERSION,
    ExtentHeader,
    ExtentMeta,
    ExtentUnreadable,
    OtherVersion,
    file_name,
    page_table,
    parse,
)
from tests.offload.extents import run_of


def header_of(*, blocks: int = 3, layers: int = 2, first: int = 5) -> ExtentHeader:
    table = page_table(layers, blocks)
    random = np.random.default_rng([blocks, layers])
    table["stored_bytes"] = random.integers(0, 1 << 20, table.shape)
    table["encoding"] = random.integers(0, 2, table.shape)
    table["checksum"] = random.integers(0, 1 << 63, table.shape)
    meta = ExtentMeta(
        run=run_of("a", first, blocks, group=3), cost_seconds=1.5, created_at=1.75e9, retained=True
    )
    return ExtentHeader(meta, tuple(range(64, 64 + layers)), table)


@given(blocks=st.integers(1, 40), layers=st.integers(1, 80), first=st.integers(0, 2**40))
def test_a_header_survives_packing(blocks: int, layers: int, first: int) -> None:
    header = header_of(blocks=blocks, layers=layers, first=first)
    packed = header.pack()
    assert len(packed) == header.header_bytes
    again = parse(packed, file_bytes=header.file_bytes)
    assert again.meta == header.meta
    assert again.page_bytes == header.page_bytes
    assert np.array_equal(again.pages, header.pages)
    assert again.pack() == packed


def test_pages_lie_layer_by_layer_without_gaps() -> None:
    header = header_of(blocks=2, layers=2)
    header.pages["stored_bytes"] = [[10, 20], [30, 40]]
    begin = header.header_bytes
    assert header.offsets().tolist() == [[begin, begin + 10], [begin + 30, begin + 60]]
    assert header.file_bytes == begin + 100


@given(bit=st.integers(0, 8 * 4160 - 1))
def test_a_flipped_bit_is_noticed_wherever_it_is(bit: int) -> None:
    header = header_of()
    packed = bytearray(header.pack())
    assert len(packed) == 4160
    packed[bit // 8] ^= 1 << bit % 8
    with pytest.raises(ExtentUnreadable):
        parse(bytes(packed), file_bytes=header.file_bytes)


@given(length=st.integers(0, 4159))
def test_a_header_cut_short_is_noticed(length: int) -> None:
    header = header_of()
    with pytest.raises(ExtentUnreadable):
        parse(header.pack()[:length], file_bytes=header.file_bytes)


@given(st.binary(max_size=5000))
def test_any_other_file_is_refused(data: bytes) -> None:
    with pytest.raises(ExtentUnreadable):
        parse(data, file_bytes=len(data))


def test_a_file_of_another_length_is_refused() -> None:
    header = header_of()
    with pytest.raises(ExtentUnreadable, match="instead of"):
        parse(header.pack(), file_bytes=header.file_bytes - 1)


def test_another_version_is_told_apart() -> None:
    packed = bytearray(header_of().pack())
    packed[8:12] = (VERSION + 1).to_bytes(4, "little")
    with pytest.raises(OtherVersion, match=f"version {VERSION + 1}"):
        parse(bytes(packed), file_bytes=len(packed))


def test_runs_with_equal_names_are_equal() -> None:
    runs = [run_of("a", first, count) for first in range(4) for count in range(1, 4)]
    assert len({file_name(run) for run in runs}) == len(runs)
    assert file_name(run_of("a", 1, 2)) == file_name(run_of("a", 1, 2))
