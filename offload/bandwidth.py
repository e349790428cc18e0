"""How fast the disk is, as measured by the reads themselves: bytes over the time that any ran."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_PRIOR_BYTES = 10e6  # what is believed until something was read: a hard disk's 100 MB/s,
_PRIOR_SECONDS = 0.1  # outweighed by the first few extents
_HALF_LIFE_SECONDS = 5.0  # of reading, after which a measurement counts half


class Bandwidth:
    """An average over recent reading; concurrent reads count as one stretch of time."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._bytes = _PRIOR_BYTES
        self._seconds = _PRIOR_SECONDS
        self._running = 0
        self._since = 0.0

    @property
    def bytes_per_second(self) -> float:
        return self._bytes / self._seconds

    @contextmanager
    def reading(self) -> Iterator[Callable[[int], None]]:
        """A read, which says by the function given to it how many bytes came."""
        with self._lock:
            self._advance()
            self._running += 1
        try:
            yield self._add
        finally:
            with self._lock:
                self._advance()
                self._running -= 1

    def _add(self, size_bytes: int) -> None:
        with self._lock:
            self._advance()
            self._bytes += size_bytes

    def _advance(self) -> None:
        now = self._clock()
        if self._running:
            elapsed = max(now - self._since, 0.0)
            decay = 0.5 ** (elapsed / _HALF_LIFE_SECONDS)
            self._bytes *= decay
            self._seconds = self._seconds * decay + elapsed
        self._since = now
