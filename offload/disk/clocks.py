"""The time of day, watched for jumps by a clock that has none."""

import time
from collections.abc import Callable

_TOLERANCE_SECONDS = 60.0  # seconds since 1970 know no daylight saving; slewing stays far below
_BOOT = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def seconds_since_boot() -> float:
    """Return a time that goes on while the machine sleeps, so that waking up is no jump."""
    return time.clock_gettime(_BOOT)


class Clocks:
    """Compares a clock that may be set with one that never is. The caller holds a lock."""

    def __init__(self, clock: Callable[[], float], steady_clock: Callable[[], float]) -> None:
        self._clock, self.steady = clock, steady_clock
        self._ahead = clock() - steady_clock()  # by how much `clock` was ahead when last asked

    def now(self) -> tuple[float, float]:
        """Return (seconds since 1970, seconds by which the clock jumped since the last call).

        Corrections of up to a minute are no jumps: for them the second number is 0.
        """
        now = self._clock()
        jump = now - self.steady() - self._ahead
        self._ahead += jump
        return now, jump if abs(jump) > _TOLERANCE_SECONDS else 0.0
