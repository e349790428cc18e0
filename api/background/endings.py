"""Sees deletions to their end, which may come long after they were asked for, and tells how far
they are.

    DELETE -> the engine erases what nothing uses -> Receipt
                  \\_ the rest, when the last question about it has been answered
                                                   -> the deletion is no longer written down
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from longctx.process.client import Closing
from longctx.request import Erasure
from offload.stats import Cleared
from offload.tier_names import TierName

logger = logging.getLogger("longctx.api")

RECEIPT_SECONDS = 2.0  # so long, a DELETE waits for what it has begun


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """Says what a deletion has erased from each tier, and what the rest waits for."""

    tiers: dict[TierName, Cleared] = field(default_factory=dict)
    requests: int = 0
    transfers: int = 0
    left: int = 0
    engine_away: bool = False

    @classmethod
    def of(cls, erasures: Sequence[Erasure]) -> "Receipt":
        """Sums up what was erased for one deletion."""
        tiers: dict[TierName, Cleared] = {}
        for erasure in erasures:
            for name, cleared in erasure.tiers.items():
                before = tiers.get(name, Cleared(0, 0))
                tiers[name] = Cleared(
                    before.blocks + cleared.blocks, before.num_bytes + cleared.num_bytes
                )
        return cls(
            tiers=tiers,
            requests=max((erasure.requests for erasure in erasures), default=0),
            transfers=sum(erasure.transfers for erasure in erasures),
            left=sum(erasure.left for erasure in erasures),
        )

    def body(self) -> dict[str, Any]:
        """Returns what a client is told: `waiting_for` is empty once nothing is left."""
        waiting = {
            "requests": self.requests,
            "transfers": self.transfers,
            "undeletable_blocks": self.left,
            "engine": int(self.engine_away),
        }
        return {
            "erased": {
                name: {"blocks": cleared.blocks, "bytes": cleared.num_bytes}
                for name, cleared in self.tiers.items()
            },
            "waiting_for": {name: count for name, count in waiting.items() if count},
        }


@dataclass(frozen=True, slots=True)
class Ending:
    """A deletion under way."""

    closings: Sequence[Closing]
    task: "asyncio.Task[Receipt]"

    async def receipt(self) -> Receipt:
        """Returns what was erased in the end, or after a moment what it was at first."""
        await asyncio.wait({self.task}, timeout=RECEIPT_SECONDS)
        if self.task.done() and not self.task.cancelled():
            return self.task.result()
        return Receipt.of([closing.now for closing in self.closings])


class Endings:
    """Waits for erasures in tasks of its own. All methods are called on the event loop.

    `begin` each, and its `receipt` tells how far it is; `close` at the end, while the engine runs.
    """

    def __init__(self) -> None:
        self._tasks: dict[str, asyncio.Task[Receipt]] = {}

    def begin(
        self, name: str, closings: Sequence[Closing], forget: Callable[[], Awaitable[None]]
    ) -> "Ending":
        """Calls `forget` once all is erased.

        Where the engine dies before, or could not delete something, `forget` is not called: the
        deletion is done again by the next engine or server.
        """
        task = asyncio.ensure_future(_end(name, closings, forget))
        self._tasks[name] = task
        task.add_done_callback(lambda _: self._forget(name, task))
        return Ending(closings, task)

    async def close(self) -> None:
        """Ends what takes longer than a moment: the next server sees to it."""
        tasks = list(self._tasks.values())
        if tasks:
            await asyncio.wait(tasks, timeout=RECEIPT_SECONDS)
        for task in tasks:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    def _forget(self, name: str, task: "asyncio.Task[Receipt]") -> None:
        if self._tasks.get(name) is task:
            del self._tasks[name]
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("the deletion of %s did not end", name, exc_info=error)


async def _end(
    name: str, closings: Sequence[Closing], forget: Callable[[], Awaitable[None]]
) -> Receipt:
    erasures = [await closing.end for closing in closings]
    found = [erasure for erasure in erasures if erasure is not None]
    receipt = Receipt.of(found)
    if len(found) < len(erasures):
        return Receipt.of([closing.now for closing in closings])
    if receipt.left:
        logger.error(
            "%d blocks of %s could not be deleted; the next start of the server tries again",
            receipt.left,
            name,
        )
    else:
        await forget()
    return receipt
