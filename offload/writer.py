"""The store's writer: one thread that carries out offers and other orders, in turn."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from offload.block_run import BlockRun, Slots
from offload.events import Mailbox, Written
from offload.tier_stack import TierStack

log = logging.getLogger(__name__)

GC_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Offer:
    """A run to be written. `retained` is asked when its turn comes."""

    ticket: int
    run: BlockRun
    slots: Slots
    cost_seconds: float
    retained: Callable[[], bool]
    in_memory: bool = False

    @property
    def size_bytes(self) -> int:
        return len(self.run.keys) * self.slots.block_bytes


Order = Callable[[], None]  # anything else that has to happen in turn with the offers: a deletion


class Writer:
    """Writes offers to the tiers on a thread of its own, and tells the mailbox when each is done.

    The engine's thread calls `add`, which returns at once; `flush` and `join` wait. Everything
    happens in the order in which it was added, so a key that was deleted and offered again is there
    afterwards. Once a minute the thread collects garbage in the tiers.

    A failure is logged and counted, and the thread goes on: if it ended, all later offers would
    keep the engine waiting. After `close`, what is still queued is left undone.
    """

    def __init__(self, stack: TierStack, mailbox: Mailbox) -> None:
        self._stack, self._mailbox = stack, mailbox
        self._changed = threading.Condition()
        self._queue: deque[Offer | Order] = deque()
        self._accepted = self._done = 0
        self._closed = False
        self.queued_bytes = 0
        self.failures = 0
        # A daemon: a disk that hangs must not keep the process from ending
        self._thread = threading.Thread(target=self._loop, name="longctx-write", daemon=True)
        self._thread.start()

    def add(self, work: Offer | Order) -> None:
        """Queue an offer or an order."""
        with self._changed:
            assert not self._closed, "the store is closed"
            self._queue.append(work)
            self._accepted += 1
            if isinstance(work, Offer):
                self.queued_bytes += work.size_bytes
            self._changed.notify_all()

    def flush(self, deadline_seconds: float) -> bool:
        """Wait until all that was added so far is done; return False if time ran out first."""
        with self._changed:
            target = self._accepted
            self._changed.wait_for(lambda: self._done >= target or self._closed, deadline_seconds)
            return self._done >= target

    def close(self) -> None:
        """Let the thread end after what it is doing now."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def join(self, deadline_seconds: float) -> None:
        self._thread.join(deadline_seconds)

    def _loop(self) -> None:
        next_gc = time.monotonic() + GC_SECONDS
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._queue or self._closed, max(next_gc - time.monotonic(), 0.0)
                )
                if self._closed:
                    return
                work = self._queue.popleft() if self._queue else None
            if work is not None:
                self._do(work)
            if time.monotonic() >= next_gc:
                self._guarded(self._stack.gc)
                next_gc = time.monotonic() + GC_SECONDS

    def _do(self, work: Offer | Order) -> None:
        if isinstance(work, Offer):
            written: list[bool] = []  # empty where it failed
            self._guarded(lambda: written.append(self._write(work)))
            self._mailbox.tell(Written(work.ticket, ok=written == [True]))
        else:
            self._guarded(work)
        with self._changed:
            self._done += 1
            if isinstance(work, Offer):
                self.queued_bytes -= work.size_bytes
            self._changed.notify_all()

    def _write(self, offer: Offer) -> bool:
        return self._stack.write(
            offer.run,
            offer.slots,
            cost_seconds=offer.cost_seconds,
            retained=offer.retained(),
            in_memory=offer.in_memory,
        )

    def _guarded(self, action: Callable[[], object]) -> None:
        """Run the action; count and log its failure."""
        try:
            action()
        except Exception:
            log.exception("the KV store's writer failed; this write is not tried again")
            self.failures += 1
