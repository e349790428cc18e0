"""Host memory over disk as one: what is written goes to both, what is read comes from the first.

Calls block; `KVStore` makes them from its threads. Either tier may be absent. The lower one keeps
what is worth keeping: leaving host memory with a disk below costs one read, and nothing is lost.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Literal

from offload.bandwidth import Bandwidth
from offload.block_run import BlockRun, PageSlots, Slots
from offload.host import HostTier
from offload.key import BlockKey
from offload.tier import DurableTier


class Tiers:
    def __init__(self, *, disk: DurableTier | None, host: HostTier | None) -> None:
        lowest = disk or host
        assert lowest is not None, "a store without any tier"
        self._disk, self._host, self._lowest = disk, host, lowest
        self.bandwidth = Bandwidth()

    def in_host(self, group: int, key: BlockKey) -> bool:
        return self._host is not None and self._host.has(group, key)

    def on_disk(self, group: int, key: BlockKey) -> bool:
        return self._disk is not None and self._disk.has(group, key)

    @property
    def lowest(self) -> Literal["host", "disk"]:
        return "host" if self._disk is None else "disk"

    @property
    def has_host(self) -> bool:
        return self._host is not None

    @property
    def losses(self) -> int:
        return 0 if self._disk is None else self._disk.losses

    def explain(self, group: int, key: BlockKey) -> str | None:
        return self._lowest.explain(group, key)

    def write(self, run: BlockRun, slots: Slots, *, cost_seconds: float, retained: bool) -> bool:
        """Whether all of the run is on disk now; what was there already is not written again."""
        if self._host is not None:
            self._put(run.group, run.keys, slots, run.parent, cost_seconds, retained)
        if self._disk is None:
            return False
        missing = [i for i, key in enumerate(run.keys) if not self._disk.has(run.group, key)]
        ok = True
        for begin, end in _stretches(missing):
            piece = replace(
                run,
                first_block=run.first_block + begin,
                parent=run.keys[begin - 1] if begin else run.parent,
                keys=run.keys[begin:end],
            )
            ok &= self._disk.write(
                piece,
                slots.rows(begin, end),
                cost_seconds=cost_seconds * (end - begin) / len(run.keys),
                retained=retained,
            )
        return ok

    def read(
        self, group: int, keys: Sequence[BlockKey], slots: Slots, parent: BlockKey | None
    ) -> list[bool]:
        """Fill the slots; which keys arrived. What comes from disk is in host memory afterwards.

        `keys` are blocks of one chain in order; `parent` is one before them, where known.
        """
        in_host = [self.in_host(group, key) for key in keys]
        found = self.read_layers(group, keys, slots)
        fresh = [i for i, here in enumerate(found) if here and not in_host[i]]
        self._promote(group, keys, slots, parent, fresh)
        return found

    def read_layers(self, group: int, keys: Sequence[BlockKey], slots: Slots) -> list[bool]:
        """As `read`, for slots of some layers only; nothing goes to host memory by it."""
        found = [False] * len(keys)
        if any(self.in_host(group, key) for key in keys):
            assert self._host is not None and isinstance(slots, PageSlots), slots
            found = self._host.read(group, keys, slots)
        missing = [i for i, here in enumerate(found) if not here and self.on_disk(group, keys[i])]
        for begin, end in _stretches(missing):
            found[begin:end] = self._read_disk(group, keys[begin:end], slots.rows(begin, end))
        return found

    def use(self, keys: Iterable[BlockKey]) -> None:
        self._lowest.use(keys)

    def retain(self, keys: Iterable[BlockKey]) -> None:
        self._lowest.retain(keys)

    def release(self, keys: Iterable[BlockKey]) -> None:
        self._lowest.release(keys)

    def drop(self, keys: Sequence[BlockKey]) -> None:
        for tier in (self._disk, self._host):  # in this order: see `_promote`
            if tier is not None:
                tier.drop(keys)

    def clear_host(self) -> tuple[int, int]:
        """Empty the host memory; how many blocks and bytes that were."""
        return (0, 0) if self._host is None else self._host.clear()

    def gc(self) -> None:
        if self._disk is not None:
            self._disk.gc()

    def stats(self) -> dict[str, float]:
        """Each tier's figures, with its name before theirs."""
        tiers = (("disk", self._disk), ("host", self._host))
        return {
            f"{prefix}_{name}": value
            for prefix, tier in tiers
            if tier is not None
            for name, value in tier.stats().items()
        }

    def close(self) -> None:
        for tier in (self._disk, self._host):
            if tier is not None:
                tier.close()

    def _read_disk(self, group: int, keys: Sequence[BlockKey], slots: Slots) -> list[bool]:
        assert self._disk is not None
        with self.bandwidth.reading() as done:
            found = self._disk.read(group, keys, slots)
            done(sum(found) * slots.block_bytes)
        return found

    def _promote(
        self,
        group: int,
        keys: Sequence[BlockKey],
        slots: Slots,
        parent: BlockKey | None,
        rows: Sequence[int],
    ) -> None:
        """Copy what was read from disk to host memory."""
        if self._host is None:
            return
        for begin, end in _stretches(rows):
            before = keys[begin - 1] if begin else parent
            self._put(group, keys[begin:end], slots.rows(begin, end), before, 0.0, False)
            # Deleted since it was read? Then `drop` may have asked the host before this copy
            self._host.drop([key for key in keys[begin:end] if not self.on_disk(group, key)])

    def _put(
        self,
        group: int,
        keys: Sequence[BlockKey],
        slots: Slots,
        parent: BlockKey | None,
        cost_seconds: float,
        retained: bool,
    ) -> None:
        assert self._host is not None and isinstance(slots, PageSlots), slots
        if self._disk is not None:
            cost_seconds = len(keys) * slots.block_bytes / self.bandwidth.bytes_per_second
            retained = False
        self._host.put(
            group, keys, slots, parent=parent, cost_seconds=cost_seconds, retained=retained
        )


def _stretches(rows: Sequence[int]) -> Iterator[tuple[int, int]]:
    """[begin, end) of each run of consecutive numbers."""
    begin = 0
    for i in range(1, len(rows) + 1):
        if i == len(rows) or rows[i] != rows[i - 1] + 1:
            yield rows[begin], rows[i - 1] + 1
            begin = i
