"""What `KVStore` asks of the tiers below the device. Their calls block and are thread-safe.

`Tier` is what all have in common; `HostTier` (host.py) adds `put`, `DiskTier` (disk.py) `write`.
A tier never raises for what a machine does to it (a full or failing disk): what cannot be read is
a miss, what cannot be written is told to the caller.
"""

from collections.abc import Iterable, Sequence
from typing import Protocol

from offload.block_run import BlockRun, Slots
from offload.key import BlockKey


class Tier(Protocol):
    def has(self, group: int, key: BlockKey) -> bool:
        """A dictionary lookup: the engine calls this on its own thread."""
        ...

    def read(self, group: int, keys: Sequence[BlockKey], slots: Slots) -> list[bool]:
        """Copy pages into `slots`; which of the keys arrived. Other rows may hold garbage."""
        ...

    def use(self, keys: Iterable[BlockKey]) -> None:
        """As if these keys had been read: what holds them, in any group, was used now."""
        ...

    def retain(self, keys: Iterable[BlockKey]) -> None:
        """Evict what holds these keys, in any group, only when nothing else is left."""
        ...

    def release(self, keys: Iterable[BlockKey]) -> None:
        """The end of `retain`."""
        ...

    def drop(self, keys: Iterable[BlockKey]) -> None:
        """Hold these keys no longer, in any group."""
        ...

    def explain(self, group: int, key: BlockKey) -> str | None:
        """Why a key that was here left: evicted, expired, corrupt, deleted; None if unknown."""
        ...

    def stats(self) -> dict[str, float]:
        """Figures by name, without the name of the tier; counters end in `_total`."""
        ...

    def close(self) -> None: ...


class DurableTier(Tier, Protocol):
    def write(self, run: BlockRun, slots: Slots, *, cost_seconds: float, retained: bool) -> bool:
        """True once the whole run is on stable storage."""
        ...

    @property
    def losses(self) -> int:
        """Grows whenever something that was durable is so no more."""
        ...

    def gc(self) -> object:
        """Remove what expired or is over the bounds; called now and then."""
        ...
