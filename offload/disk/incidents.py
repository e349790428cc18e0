"""What goes wrong below a tier: everything is counted, and each kind is logged now and then."""

import logging
import threading
from collections.abc import Callable, Iterable

log = logging.getLogger("longctx.offload")

_QUIET_SECONDS = 60.0  # between two lines of one kind


class Incidents:
    def __init__(self, kinds: Iterable[str], clock: Callable[[], float]) -> None:
        """`clock` never goes backwards."""
        self._clock = clock
        self._lock = threading.Lock()
        self._counts = dict.fromkeys(kinds, 0)
        self._untold = dict.fromkeys(self._counts, 0)  # since the kind's last line
        self._told_at: dict[str, float] = {}

    def report(self, kind: str, message: str) -> None:
        with self._lock:
            self._counts[kind] += 1
            now = self._clock()
            if now - self._told_at.get(kind, -_QUIET_SECONDS) < _QUIET_SECONDS:
                self._untold[kind] += 1
                return
            untold, self._untold[kind] = self._untold[kind], 0
            self._told_at[kind] = now
        log.warning("%s%s", message, f" ({untold} more like this before)" if untold else "")

    def totals(self) -> dict[str, float]:
        with self._lock:
            return {f"{kind}_total": count for kind, count in self._counts.items()}
