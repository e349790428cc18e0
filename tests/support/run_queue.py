"""What a stretch of time took beside waiting for a core.

On a busy machine a thread that could run waits for its turn, whatever the code does. Linux counts
that per thread (`schedstat`), so a test can bound what is left. Where it is not counted nothing is
taken off, and the bound is the plain one.
"""

import threading
import time
from pathlib import Path


class OwnTime:
    """Begins when made; `seconds()` is the time since, less what some threads waited for a core.

    These are the calling thread and `others`, which work one after the other: what any other thread
    of the process waits for is not taken off.
    """

    def __init__(self, *others: threading.Thread) -> None:
        self._ids = [threading.get_native_id(), *(other.native_id for other in others)]
        self._waited = self._waited_seconds()
        self._began = time.perf_counter()

    def seconds(self) -> float:
        return time.perf_counter() - self._began - (self._waited_seconds() - self._waited)

    def _waited_seconds(self) -> float:
        try:
            told = [Path(f"/proc/self/task/{each}/schedstat").read_text() for each in self._ids]
            return sum(int(each.split()[1]) for each in told) / 1e9
        except OSError:  # the kernel does not count
            return 0.0
