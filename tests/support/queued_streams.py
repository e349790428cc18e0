"""The streams of a device that is not there: two queues, whose work is done later.

What the waits leave open is decided for the worst: work of one queue is done as early as it may be,
that of the other as late.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Queue = Literal["steps", "copies"]


@dataclass(frozen=True)
class _Wait:
    """The work behind it comes after the first `count` entries of the other queue."""

    count: int


class QueuedStreams:
    """`CopyStreams` whose work is done by `finish`, or where somebody asks what is copied.

    `first` is the queue that goes ahead wherever it may. The wait of number `ignored` is left out.
    """

    def __init__(self, first: Queue, ignored: int | None = None) -> None:
        self._queues: dict[Queue, list[Callable[[], None] | _Wait]] = {"steps": [], "copies": []}
        self._done: dict[Queue, int] = {"steps": 0, "copies": 0}
        second: Queue = "copies" if first == "steps" else "steps"
        self._order: tuple[Queue, Queue] = (first, second)
        self._ignored = ignored
        self.waits = 0

    def step(self, work: Callable[[], None]) -> None:
        """Queue what a step does."""
        self._queues["steps"].append(work)

    def copy(self, work: Callable[[], None]) -> None:
        self._queues["copies"].append(work)

    def wait_for_steps(self) -> None:
        self._wait("copies", "steps")

    def wait_for_copies(self) -> None:
        self._wait("steps", "copies")

    def copied(self) -> Callable[[], bool]:
        count = len(self._queues["copies"])

        def are_done() -> bool:
            while self._done["copies"] < count:
                self._advance()
            return True

        return are_done

    def finish(self) -> None:
        while any(self._done[queue] < len(self._queues[queue]) for queue in self._order):
            self._advance()

    def _wait(self, waiting: Queue, other: Queue) -> None:
        if self.waits != self._ignored:
            self._queues[waiting].append(_Wait(len(self._queues[other])))
        self.waits += 1

    def _advance(self) -> None:
        """Do the next work of the first queue that may go on."""
        for queue, other in (self._order, self._order[::-1]):
            if self._done[queue] == len(self._queues[queue]):
                continue
            work = self._queues[queue][self._done[queue]]
            if isinstance(work, _Wait):
                if self._done[other] < work.count:
                    continue
            else:
                work()
            self._done[queue] += 1
            return
        raise AssertionError("both queues wait for each other")
