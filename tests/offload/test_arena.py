"""Units come out of slabs, wherever these end, and never from more than the capacity."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from offload.arena import SLAB_BYTES, Arena
from offload.units import GIB


@given(
    seed=st.integers(0, 2**32 - 1),
    capacity_bytes=st.integers(0, 5_000),
    unit_bytes=st.integers(1, 300),
    slab_bytes=st.integers(1, 6_000),
)
def test_no_two_units_share_a_byte_and_slabs_have_one_size(
    seed: int, capacity_bytes: int, unit_bytes: int, slab_bytes: int
) -> None:
    rng = random.Random(seed)
    slabs: list[int] = []

    def allocate(size_bytes: int) -> NDArray[np.uint8]:
        slabs.append(size_bytes)
        return np.zeros(size_bytes, dtype=np.uint8)

    arena = Arena(
        capacity_bytes=capacity_bytes,
        unit_bytes=unit_bytes,
        slab_bytes=slab_bytes,
        allocate=allocate,
    )
    planned_bytes = arena.capacity_bytes
    marks: dict[int, int] = {}  # what was written into each unit that is out
    for mark in range(40):
        count = rng.randrange(1, 4)
        if arena.has_room(count):
            for number in arena.take(count):
                assert number not in marks
                arena.unit(number)[:] = mark
                marks[number] = mark
        elif marks:
            number = rng.choice(sorted(marks))
            arena.give_back([number])
            del marks[number]
        assert all((arena.unit(number) == mark).all() for number, mark in marks.items())
        assert arena.used_bytes == len(marks) * unit_bytes
    assert sum(slabs) <= planned_bytes <= capacity_bytes
    assert len(set(slabs)) <= 1
    assert not slabs or slabs[0] <= max(slab_bytes, unit_bytes)


def test_less_than_a_slab_is_left_over() -> None:
    arena = Arena(capacity_bytes=1_000, unit_bytes=10, slab_bytes=300)
    assert arena.capacity_bytes == 900


def test_a_capacity_below_a_slab_is_one_slab() -> None:
    arena = Arena(capacity_bytes=1_005, unit_bytes=10, slab_bytes=3_000)
    assert arena.capacity_bytes == 1_000
    assert arena.has_room(100) and not arena.has_room(101)


def test_slabs_rounded_up_to_powers_of_two_stay_within_the_capacity() -> None:
    """As torch rounds pinned memory; the unit is a page of int8, 8 heads of 128."""
    capacity_bytes, unit_bytes = 3 * GIB, 133_120
    arena = Arena(capacity_bytes=capacity_bytes, unit_bytes=unit_bytes)
    slab = SLAB_BYTES // unit_bytes * unit_bytes
    assert arena.capacity_bytes // slab * SLAB_BYTES == capacity_bytes
    assert arena.capacity_bytes > 0.999 * capacity_bytes


def test_units_that_were_not_asked_for_cannot_be_taken() -> None:
    arena = Arena(capacity_bytes=100, unit_bytes=10)
    with pytest.raises(AssertionError):
        arena.take(1)
