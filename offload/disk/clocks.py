"""The time of day, watched for jumps by a clock that has none."""

import time
from collections.abc import Callable

_TOLERANCE_SECONDS = 60.0  # daylight is no matter here, and slewing stays far below


_BOOT = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def seconds_since_boot() -> float:
    """Goes on while the machine sleeps, so waking up is no jump."""
    return time.clock_gettime(_BOOT)


class Clocks:
    def __init__(self, clock: Callable[[], float], steady_clock: Callable[[], float]) -> None:
        self._clock, self.steady = clock, steady_clock
        self._ahead = clock() - steady_clock()  # what `clock` was ahead by when last asked

    def now(self) -> tuple[float, float]:
        """(time of day in seconds since 1970, seconds by which it has jumped since the last call).

        Small corrections are no jumps.
        """
        now = self._clock()
        jump = now - self.steady() - self._ahead
        self._ahead += jump
        return now, jump if abs(jump) > _TOLERANCE_SECONDS else 0.0
