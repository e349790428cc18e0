"""The store's reader: threads that fill pages, extent by extent, and a deadline for each load.

A load is late when it takes longer than its deadline allows, counted from its first read. What it
still waits for is then taken from the queue, and its keys are avoided for a minute. When every
thread hangs in a late load, all loads are late.

    40 blocks to load, extents of 16 blocks: jobs of 16, 16 and 8 blocks, which any thread may take.
    A deadline of 5 s, and 1 GB to load: it is late 25 s after its first job was begun.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from offload.block_run import EXTENT_BLOCKS, Slots
from offload.events import Late, Loaded, Mailbox
from offload.key import BlockKey, GroupKey
from offload.tier_stack import TierStack

log = logging.getLogger(__name__)

SLOWEST_BYTES_PER_SECOND = 50e6  # a load may take its deadline, plus its bytes at this speed
AVOIDED_SECONDS = 60.0  # so long, keys that failed or came late are not found

Part = tuple[int, tuple[BlockKey, ...], Slots]  # group; keys of one chain, in order; their pages


@dataclass(slots=True)
class _Load:
    ticket: int
    size_bytes: int
    found: list[list[bool]]  # by part and key
    jobs_left: int = 0
    started: float | None = None
    late: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    """At most one extent of one part of a load."""

    load: _Load
    part: int
    begin: int  # of its keys in the part
    group: int
    keys: tuple[BlockKey, ...]
    parent: BlockKey | None  # the key before its first one, where known
    slots: Slots
    sources: tuple[str, ...]


class Reader:
    """Reads loads from the tiers on threads of its own, and tells the mailbox how they ended.

    The engine's thread calls `add`, `avoids`, `find_late` and `until_late`; each returns at once.
    Each load ends in exactly one `Loaded`, also a late one, for which a `Late` comes before it.
    `find_late` has to be called now and then, since nobody else notices that a thread hangs.
    `close` ends the threads, `join` waits for them.
    """

    def __init__(
        self,
        stack: TierStack,
        mailbox: Mailbox,
        *,
        threads: int,
        deadline_seconds: float,
        clock: Callable[[], float],
    ) -> None:
        self._stack, self._mailbox, self._clock = stack, mailbox, clock
        self._deadline_seconds = deadline_seconds
        self._lock = threading.Lock()
        self._wanted = threading.Condition(self._lock)
        self._jobs: deque[_Job] = deque()
        self._running: set[_Job] = set()
        self._loads: dict[int, _Load] = {}
        self._avoided: dict[GroupKey, float] = {}  # until when
        self._closed = False
        self.late = 0
        self.failures = 0
        # Daemons: a disk that hangs must not keep the process from ending
        self._threads = [
            threading.Thread(target=self._loop, name=f"longctx-read-{number}", daemon=True)
            for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def __len__(self) -> int:
        """How many loads have not ended."""
        return len(self._loads)

    def add(self, ticket: int, parts: Sequence[Part], sources: tuple[str, ...] = ()) -> None:
        """Queue a load. One without any keys ends at once. `sources`: see `KVStore.load`."""
        size_bytes = sum(len(keys) * slots.block_bytes for _, keys, slots in parts)
        load = _Load(ticket, size_bytes, [[False] * len(keys) for _, keys, _ in parts])
        jobs = list(_jobs(load, parts, sources))
        load.jobs_left = len(jobs)
        if not jobs:
            self._mailbox.tell(Loaded(ticket, tuple(() for _ in parts)))
            return
        with self._lock:
            assert not self._closed, "the store is closed"
            self._loads[ticket] = load
            self._jobs.extend(jobs)
            self._wanted.notify(len(jobs))

    def avoids(self, block: GroupKey) -> bool:
        """Return whether the block failed or was late within the last minute."""
        until = self._avoided.get(block)
        return until is not None and self._clock() < until

    def find_late(self) -> None:
        """Give up the loads whose deadline has passed."""
        if not self._loads:
            return
        with self._lock:
            now = self._clock()
            for load in list(self._loads.values()):
                if not load.late and load.started is not None and now > self._last_moment(load):
                    self._give_up(load, now)
            if len(self._running) == len(self._threads):
                hang = all(job.load.late for job in self._running)
                for load in list(self._loads.values()) if hang else ():
                    if not load.late:
                        self._give_up(load, now)

    def until_late(self) -> float:
        """Return the seconds until the next load that is being read is late; at most 60."""
        with self._lock:
            moments = [
                self._last_moment(load)
                for load in self._loads.values()
                if load.started is not None and not load.late
            ]
        rest = min(moments, default=float("inf")) - self._clock()
        return min(max(rest, 0.001), 60.0)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._wanted.notify_all()

    def join(self, deadline_seconds: float) -> None:
        end = self._clock() + deadline_seconds
        for thread in self._threads:
            thread.join(max(end - self._clock(), 0.0))

    def _loop(self) -> None:
        while True:
            with self._lock:
                while not self._jobs and not self._closed:
                    self._wanted.wait()
                if self._closed:
                    return
                job = self._jobs.popleft()
                self._running.add(job)
                starts = job.load.started is None
                if starts:
                    job.load.started = self._clock()
            if starts:
                self._mailbox.wake()  # whoever waits for events has to wake by the new deadline
            found = self._read(job)
            with self._lock:
                failed = [
                    (job.group, key)
                    for key, here in zip(job.keys, found, strict=True)
                    if not here and self._stack.is_durable(job.group, key)
                ]
                if failed:  # they are there still, and cannot be read: do not try at once again
                    self._avoid(failed, self._clock())
                self._running.remove(job)
                self._finish(job, found)

    def _read(self, job: _Job) -> list[bool]:
        try:
            return self._stack.read(job.group, job.keys, job.slots, job.parent, job.sources)
        except Exception:  # a thread that ended would keep all later loads waiting
            log.exception("the KV store's reader failed; these blocks count as missing")
            self.failures += 1
            return [False] * len(job.keys)

    # The caller of what follows holds the lock

    def _finish(self, job: _Job, found: Sequence[bool]) -> None:
        load = job.load
        load.found[job.part][job.begin : job.begin + len(job.keys)] = found
        load.jobs_left -= 1
        if not load.jobs_left:
            del self._loads[load.ticket]
            self._mailbox.tell(Loaded(load.ticket, tuple(map(tuple, load.found))))

    def _give_up(self, load: _Load, now: float) -> None:
        load.late = True
        self.late += 1
        log.warning(
            "reading %.1f MB of KV blocks took longer than %.1f s; they are computed instead, "
            "and not looked for on disk for %.0f s",
            load.size_bytes / 1e6,
            self._allowed_seconds(load),
            AVOIDED_SECONDS,
        )
        self._mailbox.tell(Late(load.ticket))
        waiting = [job for job in self._jobs if job.load is load]
        running = [job for job in self._running if job.load is load]
        self._avoid([(job.group, key) for job in waiting + running for key in job.keys], now)
        self._jobs = deque(job for job in self._jobs if job.load is not load)
        for job in waiting:
            self._finish(job, [False] * len(job.keys))

    def _last_moment(self, load: _Load) -> float:
        assert load.started is not None
        return load.started + self._allowed_seconds(load)

    def _allowed_seconds(self, load: _Load) -> float:
        return self._deadline_seconds + load.size_bytes / SLOWEST_BYTES_PER_SECOND

    def _avoid(self, blocks: Iterable[GroupKey], now: float) -> None:
        kept = {block: until for block, until in self._avoided.items() if until > now}
        self._avoided = kept | dict.fromkeys(blocks, now + AVOIDED_SECONDS)


def _jobs(load: _Load, parts: Sequence[Part], sources: tuple[str, ...]) -> Iterator[_Job]:
    """Cut the parts of a load into jobs of at most one extent."""
    for number, (group, keys, slots) in enumerate(parts):
        assert len(keys) == len(slots.pages), (len(keys), len(slots.pages))
        for begin in range(0, len(keys), EXTENT_BLOCKS):
            end = min(begin + EXTENT_BLOCKS, len(keys))
            yield _Job(
                load=load,
                part=number,
                begin=begin,
                group=group,
                keys=keys[begin:end],
                parent=keys[begin - 1] if begin else None,
                slots=slots.rows(begin, end),
                sources=sources,
            )
