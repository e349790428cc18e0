"""The tiers below the device as the engine sees them: it asks, goes on, and is told later.

    offer -> ... -> Written           the writer copies to host memory, then to disk
    load -> ... [Late ...] -> Loaded  readers fill pages from host memory, then from disk
    delete -> ... -> Gone             the writer deletes from disk, then from host memory

`KVStore` is the one door. Behind it, a `Reader` and a `Writer` make calls to a `TierStack` on
threads of their own, and put what happened into a `Mailbox`.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from offload.block_run import BlockRun, Slots
from offload.events import Event, Gone, Late, Loaded, Mailbox, Written
from offload.key import BlockKey
from offload.owners import Owners
from offload.reader import Part, Reader
from offload.stats import Cleared, Erased, StoreStats
from offload.tier import DurableTier, MemoryTier
from offload.tier_names import TierName
from offload.tier_stack import TierStack
from offload.writer import Offer, Writer

__all__ = ["Event", "Gone", "KVStore", "Late", "Loaded", "Part", "Written"]

USED_SECONDS = 60.0  # between two times that the tiers are told of an owner's use


class KVStore:
    """Writes blocks to the tiers below the device, and loads them from there, without waiting.

    All calls come from one thread, the engine's, but for `stats`, `queued_bytes`,
    `read_bytes_per_second` and `losses`, which any thread may ask for. Calls return at once, but
    for `read`, `wait`, `flush` and `close`.

    An `offer`, a `load` or a `delete` returns a ticket; a later `poll` gives the event with that
    ticket. The pages that were passed in belong to the store until then: they must not be changed,
    nor, for a load, be read. `poll` at each step of the engine; `wait` where there is nothing else
    to do.

    What is kept is up to owners: documents and stored prompts `retain` keys under their ids, before
    or after the keys are written, and `release` or `delete` them.
    """

    def __init__(
        self,
        tiers: Sequence[MemoryTier | DurableTier],
        *,
        threads: int = 2,
        read_deadline_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start `threads` that read, and one that writes. `tiers` are at least one, fastest first.

        A load may take `read_deadline_seconds`, and longer if it is large (`Reader`).
        """
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

    def offer(
        self,
        run: BlockRun,
        slots: Slots,
        *,
        cost_seconds: float,
        retained: bool,
        in_memory: bool = False,
    ) -> int:
        """Write a run through to all tiers; return the ticket that its `Written` will carry.

        `cost_seconds` is what computing these blocks again would take. With `retained` they are
        kept even while no owner has named their keys yet. With `in_memory` no tier gets them that
        outlives the process.
        """
        assert len(run.keys) == len(slots.pages), (len(run.keys), len(slots.pages))
        self._ticket += 1
        if all(self.durable(run.group, key) for key in run.keys):
            self._mailbox.tell(Written(self._ticket, True))
            return self._ticket

        def is_retained() -> bool:
            return retained or any(key in self._owners for key in run.keys)

        self._writer.add(Offer(self._ticket, run, slots, cost_seconds, is_retained, in_memory))
        return self._ticket

    def read(self, group: int, keys: Sequence[BlockKey], slots: Slots) -> list[bool]:
        """Fill slots now, on the caller's thread; return which of the keys arrived.

        It is the one call that waits for a tier. The slots may be of some layers only.
        """
        return self._stack.read_layers(group, keys, slots)

    def load(self, parts: Sequence[Part], sources: tuple[str, ...] = ()) -> int:
        """Fill pages from the tiers; return the ticket that its `Loaded` will carry.

        `sources` are those of the prompt that needs them, as in a `BlockRun`.
        """
        self._ticket += 1
        self._reader.add(self._ticket, parts, sources)
        return self._ticket

    def poll(self) -> list[Event]:
        """Return what happened since the last call, in order."""
        self._reader.find_late()
        return self._mailbox.take() if self._mailbox else []

    def wait(self, timeout_seconds: float) -> None:
        """Return once `poll` has something to give, or after the timeout."""
        end = time.monotonic() + timeout_seconds
        while not self._closed:
            version = self._mailbox.version
            self._reader.find_late()
            rest = end - time.monotonic()
            if self._mailbox or rest <= 0:
                return
            self._mailbox.wait(version, min(rest, self._reader.until_late()))

    def has(self, group: int, key: BlockKey) -> bool:
        """Return whether a load is likely to find the key."""
        if key in self._dropping:
            return False
        if self._stack.in_memory(group, key):
            return True
        return self._stack.is_durable(group, key) and not self._reader.avoids((group, key))

    def durable(self, group: int, key: BlockKey) -> bool:
        """Return whether the key is on stable storage, whatever happens to this process."""
        return self._stack.is_durable(group, key) and key not in self._dropping

    def explain(self, group: int, key: BlockKey) -> str | None:
        """Return why a key is not found: evicted, expired, corrupt, deleted, flushed or slow.

        None means that it is found, that it was never here, or that nobody remembers.
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
        """Keep these keys, and those that the owner named before, until its `release`.

        They are evicted from the lowest tier only when nothing else is left there.
        """
        first = self._owners.retain(owner, keys)
        if first:
            self._writer.add(lambda: self._stack.retain(first))

    def use(self, owner: str) -> None:
        """Note that what the owner retains is in use, though the device has it and no tier is read.

        Without this, a document would expire on disk while the device answers from it. The tiers
        are told once a minute at most, so further calls cost nothing.
        """
        now = self._clock()
        told = self._used.get(owner)
        if told is None or now - told >= USED_SECONDS:
            keys = self._owners.keys(owner)
            if keys:
                self._used[owner] = now
                self._writer.add(lambda: self._stack.use(keys))

    def release(self, owner: str) -> None:
        """End what the owner retains: keys that nobody else retains may be evicted from now on."""
        free = self._let_go(owner)
        if free:
            self._writer.add(lambda: self._stack.release(self._unowned(free)))

    def is_owned(self, key: BlockKey) -> bool:
        """Return whether any owner retains the key."""
        return key in self._owners

    def delete(self, owner: str, *, sources: bool = True) -> tuple[int, list[BlockKey]]:
        """Release what the owner retains, and delete it with all that stems from it.

        That is what nobody else retains: the owner's keys, which are not found from now on, what
        follows them in any chain, and, with `sources`, the blocks of runs that name the owner as a
        source. The writer deletes them after what was offered before. Returns the ticket that its
        `Gone` will carry, and the owner's keys.
        """
        free = self._let_go(owner)
        self._dropping.update(free)
        self._ticket += 1
        ticket, source = self._ticket, owner if sources else None
        self._writer.add(lambda: self._erase(ticket, source, free))
        return ticket, free

    @property
    def queued_bytes(self) -> int:
        """Bytes that were offered and are not written yet. The engine slows down when they grow."""
        return self._writer.queued_bytes

    @property
    def read_bytes_per_second(self) -> float:
        """The speed of the lowest tier, as measured lately; a hard disk's until it was read."""
        return self._stack.read_bytes_per_second

    def read_seconds(self, sizes: Mapping[TierName, int]) -> float | None:
        """Return how long so many bytes of each tier take to read; None if a speed is unknown.

        It is unknown where nothing was read from a tier within the last five minutes.
        """
        return self._stack.read_seconds(sizes)

    @property
    def losses(self) -> int:
        """A count that grows whenever something that was durable is so no more."""
        return self._stack.losses

    def stats(self) -> StoreStats:
        """Return what the tiers hold and what the store is doing, with all counts so far."""
        return StoreStats(
            tiers=self._stack.stats(),
            queued_bytes=self.queued_bytes,
            loads_running=len(self._reader),
            loads_late=self._reader.late,
            failures=self._reader.failures + self._writer.failures,
            read_bytes_per_second=self.read_bytes_per_second,
        )

    def flush(self, deadline_seconds: float) -> bool:
        """Wait until all that was offered or released so far is done; False if time ran out."""
        return self._writer.flush(deadline_seconds)

    def close(self, deadline_seconds: float = 10.0) -> None:
        """End the threads, then close the tiers. Call `flush` first: what is queued is not written.

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

    def _erase(self, ticket: int, source: str | None, keys: Sequence[BlockKey]) -> None:
        """Delete what stems from a source or from keys, on the writer's thread."""
        erased = Erased({}, left=max(1, len(keys)))
        try:
            erased = self._stack.erase(source, keys, self.is_owned)
            if not erased.left:  # else they are there still, and must not be served
                self._dropping.difference_update(keys)
        finally:
            self._mailbox.tell(Gone(ticket, erased))

    def _unowned(self, keys: Sequence[BlockKey]) -> list[BlockKey]:
        """Return the keys without those that somebody retained since they were released."""
        return [key for key in keys if key not in self._owners]
