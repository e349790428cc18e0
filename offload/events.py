"""What the store tells the engine: events, which wait in a `Mailbox` until the engine polls."""

import threading
from collections import deque
from dataclasses import dataclass

from offload.stats import Erased


@dataclass(frozen=True, slots=True)
class Written:
    """The store is done with the pages of an offer. `ok`: all of the run is on stable storage."""

    ticket: int
    ok: bool


@dataclass(frozen=True, slots=True)
class Loaded:
    """The store is done with the pages of a load.

    `found` says for each part which of its keys arrived. The pages of the others hold garbage.
    """

    ticket: int
    found: tuple[tuple[bool, ...], ...]


@dataclass(frozen=True, slots=True)
class Late:
    """A load takes too long to be waited for. Its pages are written to until its `Loaded` comes."""

    ticket: int


@dataclass(frozen=True, slots=True)
class Gone:
    """The store has erased what it could."""

    ticket: int
    erased: Erased


Event = Written | Loaded | Late | Gone


class Mailbox:
    """Carries events from many threads to one, which can wait for them.

    To miss nothing, the waiting thread reads `version` first, then looks whether there is anything
    to do, and then waits for a later version. Any thread may call `tell` and `wake`.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._events: deque[Event] = deque()
        self.version = 0

    def __len__(self) -> int:
        return len(self._events)

    def tell(self, event: Event) -> None:
        with self._changed:
            self._events.append(event)
        self.wake()

    def take(self) -> list[Event]:
        """Return the events since the last call, in order."""
        with self._changed:
            events = list(self._events)
            self._events.clear()
            return events

    def wake(self) -> None:
        """Let `wait` return, without an event: a deadline has changed."""
        with self._changed:
            self.version += 1
            self._changed.notify_all()

    def wait(self, version: int, timeout_seconds: float) -> None:
        """Return once anything has happened after `version`, or after the timeout."""
        with self._changed:
            self._changed.wait_for(lambda: self.version != version, timeout_seconds)
