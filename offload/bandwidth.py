"""How fast a tier is read, as measured by the reads themselves.

It is the bytes that came over the time during which any read ran. The engine compares it with its
own speed: what takes longer to read than to compute is computed. A speed that nobody has measured,
or not lately, is no reason to compute: the next read tells it.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Until something was read, a hard disk's 100 MB/s is assumed: 10 MB in 0.1 s. Real extents are of
# about that size, so the first few of them outweigh it.
_PRIOR_BYTES = 10e6
_PRIOR_SECONDS = 0.1
_HALF_LIFE_SECONDS = 5.0  # of time spent reading, after which a measurement counts half
_STALE_SECONDS = 300.0  # after so long without a read nobody knows how fast the tier is now


class Bandwidth:
    """Averages the speed of recent reads. Any number of threads may read at the same time.

    Concurrent reads count as one stretch of time: two threads that read 50 MB each during the same
    second make 100 MB/s. Time without any read does not count.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._bytes = _PRIOR_BYTES
        self._seconds = _PRIOR_SECONDS
        self._running = 0  # reads
        self._since = 0.0  # up to when `_seconds` is told
        self._measured_at: float | None = None

    @property
    def bytes_per_second(self) -> float:
        """Return the speed as measured lately, or assumed until something was read."""
        return self._bytes / self._seconds

    @property
    def known_bytes_per_second(self) -> float | None:
        """Return the speed where something was read within the last five minutes, else None."""
        measured_at = self._measured_at
        if measured_at is None or self._clock() - measured_at > _STALE_SECONDS:
            return None
        return self.bytes_per_second

    @contextmanager
    def reading(self) -> Iterator[Callable[[int], None]]:
        """Time a read, which tells the function that is given to it how many bytes came."""
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
            if size_bytes:
                self._measured_at = self._since

    def _advance(self) -> None:
        """Count the time since the last call, if any read ran during it."""
        now = self._clock()
        if self._running:
            elapsed = max(now - self._since, 0.0)
            decay = 0.5 ** (elapsed / _HALF_LIFE_SECONDS)
            self._bytes *= decay
            self._seconds = self._seconds * decay + elapsed
        self._since = now
