"""A queue of jobs by name, some at a time, first come first served.

A waiting job can be hurried to the front, and any job cancelled.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from contextlib import suppress


class Lane:
    def __init__(self, job: Callable[[str], Awaitable[None]], *, width: int) -> None:
        """`job` is called with the name and must not raise."""
        self._job = job
        self._width = width
        self._waiting: OrderedDict[str, None] = OrderedDict()
        self._running: dict[str, asyncio.Task[None]] = {}

    def add(self, name: str) -> None:
        """A name that waits already keeps its place; one that runs will run again."""
        self._waiting.setdefault(name)
        self._start()

    def hurry(self, name: str) -> None:
        if name in self._waiting:
            self._waiting.move_to_end(name, last=False)

    def runs(self, name: str) -> bool:
        return name in self._running

    async def cancel(self, name: str) -> None:
        """When this returns the job neither waits nor runs."""
        self._waiting.pop(name, None)
        if (task := self._running.get(name)) is not None:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def close(self) -> None:
        self._waiting.clear()
        for name in list(self._running):
            await self.cancel(name)

    def _start(self) -> None:
        ready = (name for name in list(self._waiting) if name not in self._running)
        while len(self._running) < self._width and (name := next(ready, None)) is not None:
            del self._waiting[name]
            task = asyncio.create_task(self._run(name))
            self._running[name] = task

    async def _run(self, name: str) -> None:
        try:
            await self._job(name)
        finally:
            del self._running[name]
            self._start()
