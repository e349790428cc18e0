"""What a stretch of time took beside waiting for a core.

On a busy machine a thread that could run waits for its turn, whatever the code does. Linux counts
that per thread (`schedstat`), so a test can bound what is left. Where it is not counted nothing is
taken off, and the bound is the plain one.
"""

import time
from pathlib import Path

TASKS = Path("/proc/self/task")


class OwnTime:
    """Begins when made; `seconds()` is the time since, less what threads here waited for a core.

    Waits of all threads of this process are added up, since the one that is asked for may stand
    behind another that holds the interpreter and has no core: at most 0 seconds are left then.
    """

    def __init__(self) -> None:
        self._waited = _waited_nanoseconds()
        self._began = time.perf_counter()

    def seconds(self) -> float:
        seconds = time.perf_counter() - self._began
        waited = sum(
            now - self._waited.get(thread, 0) for thread, now in _waited_nanoseconds().items()
        )
        return max(0.0, seconds - waited / 1e9)


def _waited_nanoseconds() -> dict[str, int]:
    waited = {}
    for thread in TASKS.iterdir():
        try:
            waited[thread.name] = int((thread / "schedstat").read_text().split()[1])
        except (OSError, IndexError):  # it has ended, or the kernel does not count
            continue
    return waited
