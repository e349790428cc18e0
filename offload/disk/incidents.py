"""What goes wrong below a tier: all of it is counted, and each kind is logged now and then."""

import logging
import threading
from collections.abc import Callable, Iterable

log = logging.getLogger("longctx.offload")

_QUIET_SECONDS = 60.0  # between two log lines of one kind


class Incidents:
    """Counts incidents by kind and logs them, at most one line a minute for each kind.

    Any thread may report. The count of those that were not logged stands in the kind's next line.
    """

    def __init__(self, kinds: Iterable[str], clock: Callable[[], float]) -> None:
        """Start with a count of 0 for each kind. `clock` is in seconds and never goes backwards."""
        self._clock = clock
        self._lock = threading.Lock()
        self._counts = dict.fromkeys(kinds, 0)
        self._untold = dict.fromkeys(self._counts, 0)  # since the kind's last line
        self._told_at: dict[str, float] = {}

    def report(self, kind: str, message: str) -> None:
        """Count an incident; `message` says what happened, and what the user can do."""
        with self._lock:
            self._counts[kind] += 1
            now = self._clock()
            told_at = self._told_at.get(kind)
            if told_at is not None and now - told_at < _QUIET_SECONDS:
                self._untold[kind] += 1
                return
            untold, self._untold[kind] = self._untold[kind], 0
            self._told_at[kind] = now
        log.warning("%s%s", message, f" ({untold} more like this before)" if untold else "")

    def counts(self) -> dict[str, int]:
        """Return how many incidents of each kind there were so far."""
        with self._lock:
            return dict(self._counts)
