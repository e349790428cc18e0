"""Runs jobs by name, some at a time, first come first served."""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from contextlib import suppress
from functools import partial
from typing import Any

from api.http.errors import logger


class JobQueue:
    """Queues names and runs one job for each. All methods are called on the event loop.

    A name that waits can be moved to the front, and any name cancelled.
    """

    def __init__(self, job: Callable[[str], Coroutine[Any, Any, None]], *, width: int) -> None:
        """`job` is called with a name and should not raise. `width`: how many run at a time."""
        self._job = job
        self._width = width
        self._waiting: OrderedDict[str, None] = OrderedDict()
        self._running: dict[str, asyncio.Future[None]] = {}

    def add(self, name: str) -> None:
        """Queues a name. One that waits already keeps its place; one that runs will run again."""
        self._waiting.setdefault(name)
        self._start()

    def prioritize(self, name: str) -> None:
        """Moves a name that waits to the front; does nothing to others."""
        if name in self._waiting:
            self._waiting.move_to_end(name, last=False)

    def is_running(self, name: str) -> bool:
        return name in self._running

    async def cancel(self, name: str) -> None:
        """Takes the name from the queue, cancels its job and waits for the job's end."""
        self._waiting.pop(name, None)
        if (task := self._running.get(name)) is not None:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def close(self) -> None:
        """Cancels all jobs, and waits for their end."""
        self._waiting.clear()
        for name in list(self._running):
            await self.cancel(name)

    def _start(self) -> None:
        ready = (name for name in list(self._waiting) if name not in self._running)
        while len(self._running) < self._width and (name := next(ready, None)) is not None:
            del self._waiting[name]
            task = asyncio.ensure_future(self._job(name))
            self._running[name] = task
            # Not in the job: one that is cancelled before its first step never runs at all.
            task.add_done_callback(partial(self._end, name))

    def _end(self, name: str, task: asyncio.Future[None]) -> None:
        del self._running[name]
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("a job on %s failed", name, exc_info=error)
        self._start()
