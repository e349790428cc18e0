"""The tiers below the device as the engine sees them: it asks, goes on, and is told later.

    offer -> ... -> Written           the writer copies to host memory, then to disk
    load -> ... [Late ...] -> Loaded  readers fill pages from host memory, then from disk

Calls return at once, but for `wait`, `flush` and `close`. `poll` gives what happened since the
last call; pages that were passed in belong to the store until then. All calls come from one
thread, the engine's; `stats` and the two figures beside it may come from any.
"""

import time
from collections.abc import Callable, Iterable, Sequence

from offload.block_run import BlockRun, Slots
from offload.events import Event, Late, Loaded, Mailbox, Written
from offload.key import BlockKey
from offload.owners import Owners
from offload.reader import Part, Reader
from offload.tier import Cleared, DurableTier, MemoryTier
from offload.tier_names import TierName
from offload.tier_stack import TierStack
from offload.writer import Offer, Writer

__all__ = ["Event", "KVStore", "Late", "Loaded", "Part", "Written"]

USED_SECONDS = 60.0


class KVStore:
    def __init__(
        self,
        tiers: Sequence[MemoryTier | DurableTier],
        *,
        threads: int = 2,
        read_deadline_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`tiers`: the fastest first, at least one. `threads` read; one more writes."""
        self._stack = TierStack(tiers)
        self._mailbox = Mailbox()
        self._writer = Writer(self._stack, self._mailbox)
        self._reader = Reader(
            self._stack,
            self._mailbox,
            threads=threads,
            deadline_seconds=read_deadline_seconds,
            clock=clock,
        )
        self._owners = Owners()
        self._used: dict[str, float] = {}  # owners, and when their keys were last said to be used
        self._clock = clock
        self._dropping: set[BlockKey] = set()  # deleted, though the writer has not come to it
        self._ticket = 0
        self._closed = False

    def offer(self, run: BlockRun, slots: Slots, *, cost_seconds: float, retained: bool) -> int:
        """Write a run through to the tiers; the ticket that its `Written` will carry.

        `cost_seconds`: what computing these blocks again would take. `retained`: to be kept even
        while no owner has named its keys yet.
        """
        assert len(run.keys) == len(slots.pages), (len(run.keys), len(slots.pages))
        self._ticket += 1
        if all(self.durable(run.group, key) for key in run.keys):
            self._mailbox.tell(Written(self._ticket, True))
            return self._ticket

        def is_retained() -> bool:
            return retained or any(key in self._owners for key in run.keys)

        self._writer.add(Offer(self._ticket, run, slots, cost_seconds, is_retained))
        return self._ticket

    def read(self, group: int, keys: Sequence[BlockKey], slots: Slots) -> list[bool]:
        """Fill slots now, on the caller's thread: the one call that waits for a tier.

        The slots may be of some layers only. Which of the keys arrived.
        """
        return self._stack.read_layers(group, keys, slots)

    def load(self, parts: Sequence[Part]) -> int:
        """Fill pages from the tiers; the ticket that its `Loaded` will carry."""
        self._ticket += 1
        self._reader.add(self._ticket, parts)
        return self._ticket

    def poll(self) -> list[Event]:
        """What happened since the last call, in order. Call it at each step."""
        self._reader.find_late()
        return self._mailbox.take() if self._mailbox else []

    def wait(self, timeout_seconds: float) -> None:
        """Return when `poll` has something to give, or after the timeout."""
        end = time.monotonic() + timeout_seconds
        while not self._closed:
            version = self._mailbox.version
            self._reader.find_late()
            rest = end - time.monotonic()
            if self._mailbox or rest <= 0:
                return
            self._mailbox.wait(version, min(rest, self._reader.until_late()))

    def has(self, group: int, key: BlockKey) -> bool:
        """Whether a load is likely to find the key."""
        if key in self._dropping:
            return False
        if self._stack.in_memory(group, key):
            return True
        return self._stack.is_durable(group, key) and not self._reader.avoids((group, key))

    def durable(self, group: int, key: BlockKey) -> bool:
        """Whether the key is on disk and will stay there, whatever happens to this process."""
        return self._stack.is_durable(group, key) and key not in self._dropping

    def explain(self, group: int, key: BlockKey) -> str | None:
        """Why a key is not found: evicted, expired, corrupt, deleted or slow.

        None if it is found, if it was never here, or if nobody remembers.
        """
        if self.has(group, key):
            return None
        if key in self._dropping:
            return "deleted"
        if self._reader.avoids((group, key)):
            return "slow"
        return self._stack.explain(group, key)

    def tier_of(self, group: int, key: BlockKey) -> TierName | None:
        """Return the name of the tier that a load would take the key from."""
        return self._stack.holder(group, key) if self.has(group, key) else None

    @property
    def lowest(self) -> TierName:
        """The name of the tier that a block leaves last."""
        return self._stack.lowest

    @property
    def memory_tiers(self) -> list[TierName]:
        """The names of the tiers that `clear` can empty."""
        return self._stack.memory_tiers

    def clear(self, name: str) -> Cleared:
        """Empty one of `memory_tiers`, not what is below it, and return what it held."""
        return self._stack.clear(name)

    def retain(self, owner: str, keys: Iterable[BlockKey]) -> None:
        """Keep these keys, and those that the owner named before, until its `release`."""
        first = self._owners.retain(owner, keys)
        if first:
            self._writer.add(lambda: self._stack.retain(first))

    def use(self, owner: str) -> None:
        """What the owner retains is in use, though the device spares the tiers being read.

        For their policies and ages; once a minute is enough, so more calls cost nothing.
        """
        now = self._clock()
        if now - self._used.get(owner, -USED_SECONDS) >= USED_SECONDS:
            keys = self._owners.keys(owner)
            if keys:
                self._used[owner] = now
                self._writer.add(lambda: self._stack.use(keys))

    def release(self, owner: str) -> None:
        """End what the owner retains: keys that nobody else retains may be evicted from now on."""
        free = self._let_go(owner)
        if free:
            self._writer.add(lambda: self._stack.release(self._unowned(free)))

    def delete(self, owner: str) -> None:
        """Release what the owner retains, and delete the keys that nobody else retains.

        They are not found from now on. The writer deletes them after what was offered before.
        """
        free = self._let_go(owner)
        if free:
            self._dropping.update(free)
            self._writer.add(lambda: self._drop(free))

    @property
    def queued_bytes(self) -> int:
        """Offered and not yet written: the engine slows down when this grows."""
        return self._writer.queued_bytes

    @property
    def read_bytes_per_second(self) -> float:
        """Of the disk, as measured lately; that of a hard disk until something was read."""
        return self._stack.read_bytes_per_second

    @property
    def losses(self) -> int:
        """Grows whenever something that was durable is so no more."""
        return self._stack.losses

    def stats(self) -> dict[str, float]:
        """Figures by name, with the name of their tier before it; counters end in `_total`."""
        return self._stack.stats() | {
            "store_queue_bytes": self.queued_bytes,
            "store_loads": len(self._reader),
            "store_loads_late_total": self._reader.late,
            "store_failures_total": self._reader.failures + self._writer.failures,
            "store_read_bytes_per_second": self.read_bytes_per_second,
        }

    def flush(self, deadline_seconds: float) -> bool:
        """Wait until all that was offered or released so far is done; False if time ran out."""
        return self._writer.flush(deadline_seconds)

    def close(self, deadline_seconds: float = 10.0) -> None:
        """End the threads, then the tiers; what is still queued is not written (`flush` first).

        A thread that hangs in a disk that does not answer is left behind after the deadline.
        """
        self._closed = True
        self._writer.close()
        self._reader.close()
        end = time.monotonic() + deadline_seconds
        self._writer.join(deadline_seconds)
        self._reader.join(max(end - time.monotonic(), 0.0))
        self._stack.close()

    def _let_go(self, owner: str) -> list[BlockKey]:
        """Forget the owner; return those of its keys that nobody retains any more."""
        self._used.pop(owner, None)
        return self._owners.release(owner)

    def _drop(self, keys: Sequence[BlockKey]) -> None:
        """Delete keys, on the writer's thread."""
        self._stack.drop(self._unowned(keys))
        self._dropping.difference_update(keys)

    def _unowned(self, keys: Sequence[BlockKey]) -> list[BlockKey]:
        """Return the keys without those that somebody retained since they were released."""
        return [key for key in keys if key not in self._owners]
