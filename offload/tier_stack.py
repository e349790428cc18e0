"""The tiers below the device as one: writes go to all, reads come from the first that has a block.

What is read is copied up. The lowest tier keeps what is worth keeping; the tiers above it hold
copies that make reads fast. So a block that leaves an upper tier costs one read from below, and
nothing is lost.

    [host, disk]   the host's memory is a cache of the disk: each block in it costs the time to read
                   it back, and only the disk knows what documents retain
    [host]         a block that leaves is lost: it costs the time to compute it, and what documents
                   retain leaves last
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain

from offload.bandwidth import Bandwidth
from offload.block_run import BlockRun, Slots
from offload.descent import descendants
from offload.key import BlockKey
from offload.stats import Cleared, Erased, TierStats
from offload.tier import DurableTier, MemoryTier
from offload.tier_names import TierName


class TierStack:
    """Reads, writes and looks up blocks in a list of tiers, the fastest first.

    Calls block for as long as the tiers do. `KVStore` makes most of them from the threads of its
    reader and writer; look-ups (`holder`, `in_memory`, `is_durable`) come from the engine's thread
    and return at once. Any number of threads may call at the same time.
    """

    def __init__(self, tiers: Sequence[MemoryTier | DurableTier]) -> None:
        assert tiers, "a store without any tier"
        self._tiers = tuple(tiers)
        self._lowest = self._tiers[-1]
        self._memory = [tier for tier in tiers if not tier.durable]
        self._durable = [tier for tier in tiers if tier.durable]
        assert self._tiers == (*self._memory, *self._durable), "memory is above what is durable"
        assert len({tier.name for tier in tiers}) == len(tiers), "two tiers of one name"
        self._below = {tier.name: self._tiers[i + 1 :] for i, tier in enumerate(tiers)}
        self._bandwidths = {tier.name: Bandwidth() for tier in tiers}

    @property
    def lowest(self) -> TierName:
        """The name of the tier that a block leaves last."""
        return self._lowest.name

    @property
    def memory_tiers(self) -> list[TierName]:
        """The names of the tiers that `clear` can empty."""
        return [tier.name for tier in self._memory]

    @property
    def read_bytes_per_second(self) -> float:
        """The speed of the lowest tier, as measured lately; a hard disk's until it was read."""
        return self._bandwidths[self.lowest].bytes_per_second

    def read_seconds(self, sizes: Mapping[TierName, int]) -> float | None:
        """Return how long so many bytes of each tier take to read; None if a speed is unknown."""
        seconds = 0.0
        for name, size_bytes in sizes.items():
            speed = self._bandwidths[name].known_bytes_per_second
            if speed is None:
                return None
            seconds += size_bytes / speed
        return seconds

    @property
    def losses(self) -> int:
        """A count that grows whenever something that was durable is so no more."""
        return sum(tier.losses for tier in self._durable)

    def holder(self, group: int, key: BlockKey) -> TierName | None:
        """Return the name of the tier that a read of this key would come from."""
        for tier in self._tiers:  # plain loops: the engine asks for each block of each prompt
            if tier.has(group, key):
                return tier.name
        return None

    def in_memory(self, group: int, key: BlockKey) -> bool:
        """Return whether a read of this key copies memory: then it cannot be late."""
        for tier in self._memory:  # noqa: SIM110
            if tier.has(group, key):
                return True
        return False

    def is_durable(self, group: int, key: BlockKey) -> bool:
        """Return whether the key is on stable storage."""
        for tier in self._durable:  # noqa: SIM110
            if tier.has(group, key):
                return True
        return False

    def explain(self, group: int, key: BlockKey) -> str | None:
        """Return why the lowest tier no longer has a key; see `Tier.explain`."""
        return self._lowest.explain(group, key)

    def write(
        self,
        run: BlockRun,
        slots: Slots,
        *,
        cost_seconds: float,
        retained: bool,
        in_memory: bool = False,
    ) -> bool:
        """Write a run to every tier; return whether all of it is on stable storage now.

        With `in_memory` it is written to no durable tier.
        A durable tier is given only the stretches of the run that it does not hold yet.
        """
        for tier in self._memory:
            self._put(
                tier,
                run.group,
                run.keys,
                slots,
                parent=run.parent,
                cost_seconds=cost_seconds,
                retained=retained,
                sources=run.sources,
            )
        written = [
            self._write_missing(tier, run, slots, cost_seconds=cost_seconds, retained=retained)
            for tier in (() if in_memory else self._durable)
        ]
        return any(written)

    def read(
        self,
        group: int,
        keys: Sequence[BlockKey],
        slots: Slots,
        parent: BlockKey | None,
        sources: tuple[str, ...] = (),
    ) -> list[bool]:
        """Fill `slots` and return which keys arrived; memory above has a copy of those afterwards.

        `keys` are blocks of one chain in order; `parent` is the one before them, where known, and
        `sources` are those of the prompt that needs them. A durable tier gets no copy, since a
        run's namespace and place are not known here.
        """
        had = [False] * len(keys)
        fresh: list[tuple[MemoryTier, list[bool]]] = []
        for tier in self._memory:  # what a tier has, or one above it, does not go into it
            had = [had[i] or tier.has(group, key) for i, key in enumerate(keys)]
            fresh.append((tier, [not here for here in had]))
        found = self.read_layers(group, keys, slots)
        for tier, lacked in fresh:
            rows = [i for i, here in enumerate(found) if here and lacked[i]]
            self._promote(tier, group, keys, slots, parent, rows, sources)
        return found

    def read_layers(self, group: int, keys: Sequence[BlockKey], slots: Slots) -> list[bool]:
        """Fill slots of some layers and return which keys arrived; nothing is copied up."""
        found = [False] * len(keys)
        for tier in self._tiers:
            missing = [i for i, here in enumerate(found) if not here]
            held = [i for i in missing if tier.has(group, keys[i])]
            if tier.durable:
                for begin, end in _stretches(held):
                    rows = slots.rows(begin, end)
                    with self._bandwidths[tier.name].reading() as done:
                        found[begin:end] = tier.read(group, keys[begin:end], rows)
                        done(sum(found[begin:end]) * slots.block_bytes)
            elif held:
                wanted = [keys[i] for i in missing]
                with self._bandwidths[tier.name].reading() as done:
                    here = tier.read(group, wanted, slots.pick(missing))
                    done(sum(here) * slots.block_bytes)
                for i, arrived in zip(missing, here, strict=True):
                    found[i] = arrived
        return found

    def use(self, keys: Iterable[BlockKey]) -> None:
        self._lowest.use(keys)

    def retain(self, keys: Iterable[BlockKey]) -> None:
        self._lowest.retain(keys)

    def release(self, keys: Iterable[BlockKey]) -> None:
        self._lowest.release(keys)

    def erase(
        self,
        source: str | None,
        keys: Iterable[BlockKey],
        is_owned: Callable[[BlockKey], bool],
    ) -> Erased:
        """Delete from every tier what stems from a source or follows one of these keys.

        What is owned stays; see `descendants`.
        """
        stems = chain.from_iterable(tier.stems() for tier in self._tiers)
        found = descendants(stems, source, keys, is_owned)
        dropped = {tier.name: tier.drop(found) for tier in reversed(self._tiers)}
        return Erased(
            {name: Cleared(*each[:2]) for name, each in reversed(dropped.items())},
            sum(each.left for each in dropped.values()),
        )

    def drop(self, keys: Sequence[BlockKey]) -> None:
        """Delete the keys from every tier."""
        for tier in reversed(self._tiers):  # the lowest first: see `_promote`
            tier.drop(keys)

    def clear(self, name: str) -> Cleared:
        """Empty one of `memory_tiers` and return what it held."""
        (tier,) = (tier for tier in self._memory if tier.name == name)
        return tier.clear()

    def gc(self) -> None:
        for tier in self._durable:
            tier.gc()

    def stats(self) -> dict[TierName, TierStats]:
        """Return what each tier holds and has counted, the fastest first."""
        return {tier.name: tier.stats() for tier in self._tiers}

    def close(self) -> None:
        for tier in reversed(self._tiers):
            tier.close()

    def _write_missing(
        self, tier: DurableTier, run: BlockRun, slots: Slots, *, cost_seconds: float, retained: bool
    ) -> bool:
        missing = [i for i, key in enumerate(run.keys) if not tier.has(run.group, key)]
        ok = True
        for begin, end in _stretches(missing):
            ok &= tier.write(
                run.stretch(begin, end),
                slots.rows(begin, end),
                cost_seconds=cost_seconds * (end - begin) / len(run.keys),
                retained=retained,
            )
        return ok

    def _promote(
        self,
        tier: MemoryTier,
        group: int,
        keys: Sequence[BlockKey],
        slots: Slots,
        parent: BlockKey | None,
        rows: Sequence[int],
        sources: tuple[str, ...],
    ) -> None:
        """Copy what was read from below into a memory tier."""
        below = self._below[tier.name]
        for begin, end in _stretches(rows):
            self._put(
                tier,
                group,
                keys[begin:end],
                slots.rows(begin, end),
                parent=keys[begin - 1] if begin else parent,
                cost_seconds=0.0,
                retained=False,
                sources=sources,
            )
            # A key may have been deleted since it was read. `drop` asks the lowest tier first, so
            # if it asked this one before the copy came, the tiers below lack the key by now.
            deleted = [
                key for key in keys[begin:end] if not any(each.has(group, key) for each in below)
            ]
            tier.drop(deleted)

    def _put(
        self,
        tier: MemoryTier,
        group: int,
        keys: Sequence[BlockKey],
        slots: Slots,
        *,
        parent: BlockKey | None,
        cost_seconds: float,
        retained: bool,
        sources: tuple[str, ...],
    ) -> None:
        below = self._below[tier.name]
        if below:  # whoever misses a block here reads it there
            size_bytes = len(keys) * slots.block_bytes
            cost_seconds = size_bytes / self._bandwidths[below[0].name].bytes_per_second
            retained = False
        tier.put(
            group,
            keys,
            slots,
            parent=parent,
            cost_seconds=cost_seconds,
            retained=retained,
            sources=sources,
        )


def _stretches(rows: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield [begin, end) of each run of consecutive numbers: 3 4 5 9 give (3, 6) and (9, 10)."""
    begin = 0
    for i in range(1, len(rows) + 1):
        if i == len(rows) or rows[i] != rows[i - 1] + 1:
            yield rows[begin], rows[i - 1] + 1
            begin = i
