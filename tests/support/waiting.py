"""How tests wait: for an event, with a deadline that only ends what hangs.

A deadline measures nothing, so it is generous, and it grows with the load of the machine: with
twice as many busy processes as processors everything may take twice as long. Where that is not
enough, as in an emulator, LONGCTX_TEST_PATIENCE multiplies it.
"""

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

Result = TypeVar("Result")

HANGING_SECONDS = 60.0  # on an idle machine nothing that a test waits for takes a tenth of this
PAUSE_SECONDS = 0.01


def patience() -> float:
    """How many times longer than on an idle machine things may take now, at least 1."""
    busy = os.getloadavg()[0] / (os.cpu_count() or 1)
    return max(1.0, busy) * float(os.environ.get("LONGCTX_TEST_PATIENCE", "1"))


def patient(seconds: float = HANGING_SECONDS) -> float:
    """A time-out for something that takes a string of `seconds` only if it hangs."""
    return seconds * patience()


def wait_for(condition: Callable[[], Result], seconds: float = HANGING_SECONDS) -> Result:
    """The first true result of `condition`. AssertionError when it never comes."""
    for result in _tries(condition, seconds):
        if result:
            return result
        time.sleep(PAUSE_SECONDS)
    raise AssertionError("unreachable")


async def eventually(condition: Callable[[], Result], seconds: float = HANGING_SECONDS) -> Result:
    """The same for code on an event loop, which goes on meanwhile."""
    for result in _tries(condition, seconds):
        if result:
            return result
        await asyncio.sleep(PAUSE_SECONDS)
    raise AssertionError("unreachable")


def _tries(condition: Callable[[], Result], seconds: float) -> Iterator[Result]:
    began = time.monotonic()
    while True:
        result = condition()
        yield result
        waited = time.monotonic() - began
        if waited > patient(seconds):  # asked again each time: the load changes
            raise AssertionError(f"waited {waited:.0f} s, and it still is {result!r}")
