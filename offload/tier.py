"""What `KVStore` asks of the tiers below the device.

`Tier` is what all have in common. There are two kinds, told apart by `durable`: a `MemoryTier`
(`HostTier`) copies pages and is gone with the process, a `DurableTier` (`DiskTier`) keeps whole
runs on stable storage, and its reads may take long or fail.

All calls block and may come from any thread. A tier never raises for what a machine does to it,
such as a full or failing disk: what cannot be read is a miss, and `write` returns False for what
cannot be written.
"""

from collections.abc import Iterable, Sequence
from typing import Literal, Protocol

from offload.block_run import BlockRun, Slots
from offload.descent import Stem
from offload.key import BlockKey
from offload.stats import Cleared, Dropped, TierStats
from offload.tier_names import TierName


class Tier(Protocol):
    """A place for blocks below the device. Each tier of a stack has a name of its own."""

    @property
    def name(self) -> TierName: ...

    def has(self, group: int, key: BlockKey) -> bool:
        """Return whether the tier holds the block. The engine's own thread calls this.

        So it must not wait for a copy or a disk: look it up in a dictionary.
        """
        ...

    def read(self, group: int, keys: Sequence[BlockKey], slots: Slots) -> list[bool]:
        """Copy the pages of `keys` into `slots` and return which of the keys arrived.

        The rows of the other keys may hold garbage afterwards.
        """
        ...

    def use(self, keys: Iterable[BlockKey]) -> None:
        """Count what holds these keys, in any group, as used now, as if it had been read."""
        ...

    def retain(self, keys: Iterable[BlockKey]) -> None:
        """Evict what holds these keys, in any group, only when nothing else is left."""
        ...

    def release(self, keys: Iterable[BlockKey]) -> None:
        """End what `retain` began: these keys may be evicted like any others."""
        ...

    def drop(self, keys: Iterable[BlockKey]) -> Dropped:
        """Delete these keys, in any group; return how much that was."""
        ...

    def stems(self) -> Iterable[Stem]:
        """Return what the tier holds: of each block its key, its parent and its sources."""
        ...

    def explain(self, group: int, key: BlockKey) -> str | None:
        """Return why a key left that was here; None for one that is here or never was.

        The reasons are evicted, expired, corrupt, deleted and flushed. Old ones are forgotten.
        """
        ...

    def stats(self) -> TierStats:
        """Return what the tier holds now, and what it has counted since it was opened.

        A new field of `TierStats` becomes a metric by a line in `api/engine_metrics.py`.
        """
        ...

    def close(self) -> None: ...


class MemoryTier(Tier, Protocol):
    """A tier that pages are copied into, also when they were read from below."""

    @property
    def durable(self) -> Literal[False]: ...

    def put(
        self,
        group: int,
        keys: Sequence[BlockKey],
        slots: Slots,
        *,
        parent: BlockKey | None,
        cost_seconds: float,
        retained: bool,
        sources: tuple[str, ...],
    ) -> int:
        """Copy consecutive blocks of one chain in; return how many, from the first on, are here.

        `parent` is the key before the first one, None where it is not known. `cost_seconds` is
        what all these blocks together cost whoever has to get them again. `sources` are as in a
        `BlockRun`; a block that is here already keeps its own.
        """
        ...

    def clear(self) -> Cleared:
        """Empty the tier and return what it held."""
        ...


class DurableTier(Tier, Protocol):
    """A tier that outlives the process."""

    @property
    def durable(self) -> Literal[True]: ...

    def write(self, run: BlockRun, slots: Slots, *, cost_seconds: float, retained: bool) -> bool:
        """Return True once the whole run is on stable storage."""
        ...

    @property
    def losses(self) -> int:
        """A count that grows whenever something that was durable is so no more."""
        ...

    def gc(self) -> object:
        """Remove what expired or is over the bounds. The writer calls this once a minute."""
        ...
