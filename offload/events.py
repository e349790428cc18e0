"""What the store tells the engine, and the box in which it waits until the engine looks."""

import threading
from collections import deque
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Written:
    """The pages of an offer are free again; `ok`: all of the run is on disk, fsynced."""

    ticket: int
    ok: bool


@dataclass(frozen=True, slots=True)
class Loaded:
    """The pages of a load are free again. `found`: by part and key; pages of False are garbage."""

    ticket: int
    found: tuple[tuple[bool, ...], ...]


@dataclass(frozen=True, slots=True)
class Late:
    """Do not wait for this load. Its pages are still written to until its `Loaded` comes."""

    ticket: int


Event = Written | Loaded | Late


class Mailbox:
    """Many threads tell, one looks. `version` counts what happened, so that no wake is missed."""

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
        with self._changed:
            events = list(self._events)
            self._events.clear()
            return events

    def wake(self) -> None:
        with self._changed:
            self.version += 1
            self._changed.notify_all()

    def wait(self, version: int, timeout_seconds: float) -> None:
        """Return when anything happened after `version`, or after the timeout."""
        with self._changed:
            self._changed.wait_for(lambda: self.version != version, timeout_seconds)
