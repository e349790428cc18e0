"""Modules that are kept computed: opened in the engine, encoded in the background, taken up again
whenever the engine has been restarted."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from api.background.ingest import Failures, prefill, to_keep
from api.background.job_queue import Lane
from api.http.errors import logger
from longctx.errors import EngineDied, LongctxError
from longctx.process.client import EngineClient
from longctx.request import Piece, Progress, Request, Segment

KeptState = Literal["queued", "processing", "ready", "error"]
OTHERS_SECONDS = 10.0  # openings that take longer, of files say, hold no deletion up
Modules: TypeAlias = Sequence[tuple[str, tuple[Piece, ...]]]  # id and pieces of each


@dataclass(slots=True, eq=False)
class Kept:
    """Modules that come and go together, and how far they are in this process.

    `prepare` makes them, each time that the engine is to be told. It may wait, and raises
    LongctxError where they cannot be had.
    """

    id: str
    salt: str
    prepare: Callable[[], Awaitable[Modules]]
    opened: asyncio.Event = field(default_factory=asyncio.Event)  # or failed, or dropped
    module_ids: tuple[str, ...] = ()
    opened_by: int | None = None  # how often the engine had been restarted then
    computed: int = 0  # how many of them
    progress: Progress | None = None
    failures: Failures = field(default_factory=Failures)  # at any of them, until all are computed
    error: str | None = None
    before: "Kept | None" = None  # goes once this is computed: what both say is not twice

    async def settled(self, *, timeout_seconds: float) -> bool:
        """Whether the engine knows its modules, or never will; waits at most so long for it."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self.opened.wait(), timeout_seconds)
        return self.opened.is_set()


def _encoding_of(module_id: str, kept: Kept) -> Request:
    return to_keep(f"encode-{module_id}", (Segment(encodes=module_id),), salt=kept.salt)


class Keeper:
    def __init__(self, engine: EngineClient) -> None:
        self._engine = engine
        self._kept: dict[str, Kept] = {}
        self._opening = Lane(self._open, width=4)
        self._encoding = Lane(self._encode, width=1)
        self._gone: dict[str, Kept] = {}  # of which the tiers may still have something
        self._leaving = Lane(self._leave, width=1)

    def keep(self, kept: Kept) -> None:
        self._kept[kept.id] = kept
        self._opening.add(kept.id)

    async def drop(self, kept: Kept) -> None:
        """Frees what nothing else needs; requests that wait for it go on without.

        What the tiers have of it can be named, and deleted, by an engine that knows it: where that
        does not (yet), this is done later.
        """
        kept.opened.set()
        if self._kept.get(kept.id) is kept:
            del self._kept[kept.id]
        await self._opening.cancel(kept.id)
        await self._encoding.cancel(kept.id)
        await self._others_open()
        self._gone[kept.id] = kept
        if kept.error is not None or kept.opened_by == self._engine.restarts:
            await self._leave(kept.id)
        else:
            self._leaving.add(kept.id)
        await self._drop_before(kept)

    async def _others_open(self) -> None:
        """After a start nobody owns what several share until it is open: it would be deleted."""
        waiting = [asyncio.ensure_future(kept.opened.wait()) for kept in self._kept.values()]
        if waiting:
            await asyncio.wait(waiting, timeout=OTHERS_SECONDS)
        for task in waiting:
            task.cancel()

    async def replace(self, before: Kept, kept: Kept) -> None:
        """`before` goes once `kept` is computed."""
        kept.before = before
        if kept.opened.is_set() and kept.computed == len(kept.module_ids):
            await self._drop_before(kept)

    async def reopen(self) -> None:
        """After the engine was restarted: it knows no module."""
        for kept in self._kept.values():
            if kept.error is None:
                kept.computed, kept.progress = 0, None
                kept.opened.clear()
                self._opening.add(kept.id)
        for name in self._gone:
            self._leaving.add(name)

    async def close(self) -> None:
        """Stops all work, which is taken up again next time."""
        await self._leaving.close()
        await self._opening.close()
        await self._encoding.close()

    def state(self, kept: Kept) -> KeptState:
        if kept.error is not None:
            return "error"
        if kept.opened.is_set() and kept.computed == len(kept.module_ids):
            return "ready" if self._engine.state != "restarting" else "queued"
        if self._opening.runs(kept.id) or self._encoding.runs(kept.id):
            return "processing"
        return "queued"

    async def _open(self, name: str) -> None:
        kept = self._kept[name]
        try:
            with suppress(EngineDied):  # `reopen` comes when it is back
                await self._tell(kept)
                self._encoding.add(name)
        except LongctxError as error:
            kept.error = str(error)
        except Exception as error:  # a bug of ours must not leave anybody waiting
            logger.error("opening %s failed", name, exc_info=error)
            kept.error = "the server failed; its log says why"
        kept.opened.set()

    async def _tell(self, kept: Kept) -> None:
        modules = await kept.prepare()
        kept.module_ids = tuple(module_id for module_id, _ in modules)
        opened_by = self._engine.restarts
        for module_id, pieces in modules:
            await self._engine.open_module(module_id, pieces, keep=_encoding_of(module_id, kept))
        kept.opened_by = opened_by

    async def _leave(self, name: str) -> None:
        kept = self._gone[name]
        try:
            if name not in self._kept:  # else its blocks are those of what is kept again
                if kept.error is None and kept.opened_by != self._engine.restarts:
                    await self._tell(kept)
                for module_id in kept.module_ids:
                    await self._engine.close_module(module_id)
        except EngineDied:  # `reopen` comes when it is back
            return
        except LongctxError as error:
            logger.warning("what is stored of %s stays until it is evicted: %s", name, error)
        self._gone.pop(name, None)

    async def _encode(self, name: str) -> None:
        kept = self._kept[name]
        if kept.error is not None:  # since it was queued
            return

        def note(progress: Progress) -> None:
            kept.progress = progress

        kept.computed = 0
        try:
            for module_id in kept.module_ids:
                encoded = await prefill(
                    self._engine,
                    _encoding_of(module_id, kept),
                    failures=kept.failures,
                    on_progress=note,
                )
                if not encoded:
                    return
                kept.computed += 1
            kept.failures.count = 0
            await self._drop_before(kept)
        except LongctxError as error:
            kept.error = str(error)

    async def _drop_before(self, kept: Kept) -> None:
        before, kept.before = kept.before, None
        if before is not None:
            await self.drop(before)
