"""Expires each of many items at its deadline."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from typing import Generic, TypeVar

from api.http.errors import logger

Item = TypeVar("Item")

CHECK_SECONDS = 60.0  # the clock is looked at this often at least: it may be set


class Expiry(Generic[Item]):
    """Calls `expire(item)` when the item's deadline has come, in a task on the event loop.

    `start` begins, `reschedule` follows each new deadline, `close` ends it.
    """

    def __init__(
        self,
        deadlines: Callable[[], Iterable[tuple[float, Item]]],
        expire: Callable[[Item], Awaitable[None]],
    ) -> None:
        """`deadlines` lists all items, each with its deadline on the clock of `time.time`. Where
        `expire` fails, that is logged and tried again when the clock is looked at next."""
        self._deadlines = deadlines
        self._expire = expire
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    def reschedule(self) -> None:
        """Looks at the deadlines again: there is a new one, perhaps the next to come."""
        self._changed.set()

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    async def _run(self) -> None:
        while True:
            now = time.time()
            for deadline, item in list(self._deadlines()):
                if deadline <= now:
                    await self._try(item)
            self._changed.clear()
            pauses = (deadline - now for deadline, _ in self._deadlines() if deadline > now)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), min([CHECK_SECONDS, *pauses]))

    async def _try(self, item: Item) -> None:
        try:
            await self._expire(item)
        except Exception as error:  # a full disk, say, must not keep the others for ever
            logger.error("expiring an item failed; it is tried again", exc_info=error)
