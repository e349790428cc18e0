"""Work that must not be left half done."""

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

Result = TypeVar("Result")


async def finish(
    work: Coroutine[Any, Any, Result], *, on_cancel: Callable[[], None] = lambda: None
) -> Result:
    """Awaits `work` to its end, also when the caller is cancelled meanwhile.

    A cancellation calls `on_cancel`, which may make `work` end sooner, and is raised once `work`
    has ended. Then its result or exception is dropped.
    """
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        on_cancel()
        while not task.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait({task})
        if not task.cancelled():
            task.exception()  # or asyncio would report that nobody looked at it
        raise
