"""The memory of the host tier: equal units, in slabs that are allocated when they are first needed.

Memory that a GPU copies from is pinned, page by page, so 16 GiB at once would hold up a start. A
slab is small enough that the thread which needs it can wait. With units of 96 KiB and slabs of 64
MiB a slab has 682 units: unit 700 is number 18 of the second slab.
"""

import logging
from collections.abc import Callable, Iterable
from typing import Final

import numpy as np
from numpy.typing import NDArray

from offload.units import GIB, MIB

log = logging.getLogger("longctx.offload")

SLAB_BYTES: Final = 64 * MIB


def paged(size_bytes: int) -> NDArray[np.uint8]:
    """Return memory of which a page is taken from the system once it is written to."""
    return np.zeros(size_bytes, dtype=np.uint8)  # calloc


class Arena:
    """Gives out units by number, and takes them back. It has no lock: its user has one.

    Where a slab cannot be allocated the arena stays at what it has, for good, and logs that.
    Slabs are kept until the end, empty ones too.
    """

    def __init__(
        self,
        *,
        capacity_bytes: int,
        unit_bytes: int,
        slab_bytes: int = SLAB_BYTES,
        allocate: Callable[[int], NDArray[np.uint8]] = paged,
    ) -> None:
        """Plan slabs of whole units that take at most `capacity_bytes`; nothing is allocated yet.

        All have one size, and what is left of the capacity is not used: pinned memory is rounded up
        to a power of two, so a smaller last slab could take more than is left. `allocate` returns
        an array uint8 of so many bytes, or raises MemoryError.
        """
        wanted_bytes = min(slab_bytes, capacity_bytes)
        self.unit_bytes = unit_bytes
        self._slab_units = max(1, wanted_bytes // unit_bytes)
        most_slabs = capacity_bytes // max(wanted_bytes, self._slab_units * unit_bytes)
        self._num_units = most_slabs * self._slab_units
        self._allocate = allocate
        self._slabs: list[NDArray[np.uint8]] = []  # each [slab_units, unit_bytes]
        self._free: list[int] = []
        self._never_used = 0  # units from here on were never given out

    @property
    def capacity_bytes(self) -> int:
        """The bytes of all units: those planned, or those there are since a slab was refused."""
        return self._num_units * self.unit_bytes

    @property
    def used_bytes(self) -> int:
        return (self._never_used - len(self._free)) * self.unit_bytes

    def has_room(self, count: int) -> bool:
        """Return whether `count` units can be taken, after allocating what they need."""
        while self._room() < count:
            if not self._grow():
                return False
        return True

    def take(self, count: int) -> list[int]:
        """Give out `count` units, for which `has_room` was said; they may lie anywhere."""
        assert self._room() >= count, f"{count} units of {self._room()}"
        units = [self._free.pop() for _ in range(min(count, len(self._free)))]
        fresh = count - len(units)
        units.extend(range(self._never_used, self._never_used + fresh))
        self._never_used += fresh
        return units

    def give_back(self, units: Iterable[int]) -> None:
        self._free.extend(units)

    def unit(self, number: int) -> NDArray[np.uint8]:
        """Return a unit's bytes, in place."""
        slab, row = divmod(number, self._slab_units)
        unit: NDArray[np.uint8] = self._slabs[slab][row]
        return unit

    def _room(self) -> int:
        return len(self._slabs) * self._slab_units - self._never_used + len(self._free)

    def _grow(self) -> bool:
        """Allocate the next slab; False where there are all, or where there is no memory."""
        have_units = len(self._slabs) * self._slab_units
        if have_units == self._num_units:
            return False
        try:
            slab = self._allocate(self._slab_units * self.unit_bytes)
        except MemoryError as error:
            planned_bytes, self._num_units = self.capacity_bytes, have_units
            log.warning(
                "KV blocks in RAM stay at %.2f of %.2f GiB, since no more could be allocated (%s); "
                "a smaller --host-pool-gib leaves room to others",
                self.capacity_bytes / GIB,
                planned_bytes / GIB,
                error,
            )
            return False
        self._slabs.append(slab.reshape(self._slab_units, self.unit_bytes))
        return True
