"""Keeps modules computed: opens them in the engine, encodes them in the background, and does both
again whenever the engine has been restarted."""

import asyncio
import hashlib
import secrets
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeAlias

from api.background.endings import Endings, Receipt
from api.background.ingest import Failures, ingest, ingest_request
from api.background.job_queue import JobQueue
from api.http.errors import logger
from longctx.errors import ContextTooLong, EngineDied, InvalidRequest, LongctxError
from longctx.process.client import EngineClient
from longctx.request import Piece, Progress, Request, Segment

ModulesState = Literal["queued", "processing", "ready", "error"]
OTHERS_SECONDS = 10.0  # modules that take longer to open, of files say, hold no deletion up
Modules: TypeAlias = Sequence[tuple[str, tuple[Piece, ...]]]  # id and pieces of each


@dataclass(slots=True, eq=False)
class StoredModules:
    """Holds modules that come and go together, and how far they are in this process.

    `prepare` makes them, each time that the engine is to be told of them. It may wait, and raises
    LongctxError where they cannot be had.
    """

    id: str
    salt: str
    prepare: Callable[[], Awaitable[Modules]]
    sources: tuple[str, ...] = ()  # files whose text is in them
    opened: asyncio.Event = field(default_factory=asyncio.Event)  # or failed, or dropped
    module_ids: tuple[str, ...] = ()
    opened_by: int | None = None  # how often the engine had been restarted then
    computed: int = 0  # how many of them
    progress: Progress | None = None
    failures: Failures = field(default_factory=Failures)  # at any of them, until all are computed
    error: str | None = None
    # What these replace. It is dropped once these are computed: the blocks of what both say are
    # then held by these, and never computed twice.
    replaces: "StoredModules | None" = None

    @property
    def is_computed(self) -> bool:
        return self.opened.is_set() and self.computed == len(self.module_ids)

    async def wait_opened(self, *, timeout_seconds: float) -> bool:
        """Waits until the engine knows the modules, or never will; False after the time-out."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self.opened.wait(), timeout_seconds)
        return self.opened.is_set()


class KeptIds(Protocol):
    """Remembers, also through a crash, of which modules the tiers may have something."""

    async def note_kept(self, name: str) -> None: ...
    async def forget_kept(self, name: str) -> None: ...
    async def kept(self) -> list[str]: ...


class ModuleKeeper:
    """Keeps the modules of all schemas, named prompts and retained prompts.

    Every method is called on the server's event loop: `keep`, perhaps `replace`, in the end `drop`;
    `drop_unknown` once what is known has been taken up; `reopen` after each restart of the engine;
    `close` at the end.
    """

    def __init__(self, engine: EngineClient, ids: KeptIds) -> None:
        self._engine = engine
        self._ids = ids
        self._kept: dict[str, StoredModules] = {}
        self._opening = JobQueue(self._open, width=4)
        self._encoding = JobQueue(self._encode, width=1)
        self._dropped: dict[str, StoredModules] = {}  # of which the tiers may still have something
        self._closing = JobQueue(self._close_later, width=1)
        self._endings = Endings()

    def new_id(self, kind: str, record: object) -> str:
        """Makes the id of a record's modules, which is the same after a restart."""
        digest = hashlib.blake2b(repr(record).encode(), digest_size=12)
        name = f"{kind}-{digest.hexdigest()}"
        return f"{name}-{secrets.token_hex(4)}" if name in self._kept else name

    def keep(self, stored: StoredModules) -> None:
        """Opens and encodes them in the background, now and after each restart of the engine."""
        self._kept[stored.id] = stored
        self._opening.add(stored.id)

    async def drop(self, stored: StoredModules) -> Receipt:
        """Erases what nothing else needs; requests that wait for the modules go on without them.

        What the tiers have of them can be named, and deleted, by an engine that knows them: where
        that does not (yet), this is done later. Returns how far it is.
        """
        stored.opened.set()
        if self._kept.get(stored.id) is stored:
            del self._kept[stored.id]
        await self._opening.cancel(stored.id)
        await self._encoding.cancel(stored.id)
        await self._wait_for_others()
        self._dropped[stored.id] = stored
        receipt = Receipt(engine_away=True)
        if stored.error is not None or stored.opened_by == self._engine.restarts:
            receipt = await self._close(stored.id)
        else:
            self._closing.add(stored.id)
        await self._drop_replaced(stored)
        return receipt

    async def drop_unknown(self) -> None:
        """Erases what the tiers have of modules that nothing known has: a crash has left it."""
        for name in await self._ids.kept():
            if name not in self._kept and name not in self._dropped:
                self._dropped[name] = StoredModules(
                    id=name, salt="", prepare=_nothing, error="its record is gone"
                )
                self._closing.add(name)

    async def replace(self, old: StoredModules, new: StoredModules) -> None:
        """Drops the old ones once the new ones are computed."""
        new.replaces = old
        if new.is_computed:
            await self._drop_replaced(new)

    async def reopen(self) -> None:
        """Begins again with all of them, for an engine that was restarted and knows no module."""
        for stored in self._kept.values():
            if stored.error is None:
                stored.computed, stored.progress = 0, None
                stored.opened.clear()
                self._opening.add(stored.id)
        for name in self._dropped:
            self._closing.add(name)

    async def close(self) -> None:
        """Stops all work, which is taken up again next time."""
        await self._closing.close()
        await self._endings.close()
        await self._opening.close()
        await self._encoding.close()

    def state(self, stored: StoredModules) -> ModulesState:
        if stored.error is not None:
            return "error"
        if stored.is_computed:
            return "ready" if self._engine.state != "restarting" else "queued"
        if self._opening.is_running(stored.id) or self._encoding.is_running(stored.id):
            return "processing"
        return "queued"

    async def _open(self, name: str) -> None:
        stored = self._kept[name]
        try:
            with suppress(EngineDied):  # `reopen` comes when it is back
                await self._tell_engine(stored)
                self._encoding.add(name)
        except LongctxError as error:
            stored.error = str(error)
        except Exception as error:  # a bug of ours must not leave anybody waiting
            logger.error("opening %s failed", name, exc_info=error)
            stored.error = "the server failed; its log says why"
        stored.opened.set()

    async def _tell_engine(self, stored: StoredModules) -> None:
        modules = await stored.prepare()
        await self._ids.note_kept(stored.id)
        stored.module_ids = tuple(module_id for module_id, _ in modules)
        opened_by = self._engine.restarts
        for module_id, pieces in modules:
            request = _request_of(module_id, stored)
            await self._engine.open_module(module_id, pieces, keep=request, sources=stored.sources)
        stored.opened_by = opened_by

    async def _encode(self, name: str) -> None:
        stored = self._kept[name]
        if stored.error is not None:  # since it was queued
            return

        def note(progress: Progress) -> None:
            stored.progress = progress

        stored.computed = 0
        try:
            for module_id in stored.module_ids:
                encoded = await ingest(
                    self._engine,
                    _request_of(module_id, stored),
                    failures=stored.failures,
                    on_progress=note,
                )
                if not encoded:
                    return
                stored.computed += 1
            stored.failures.count = 0
            await self._drop_replaced(stored)
        except LongctxError as error:
            stored.error = str(error)

    async def _drop_replaced(self, stored: StoredModules) -> None:
        replaced, stored.replaces = stored.replaces, None
        if replaced is not None:
            await self.drop(replaced)

    async def _wait_for_others(self) -> None:
        """Waits until the modules that stay are open.

        After a start, blocks that several modules share belong to nobody until one of those that
        stay is open: closing another would delete them.
        """
        waiting = [asyncio.ensure_future(stored.opened.wait()) for stored in self._kept.values()]
        if waiting:
            await asyncio.wait(waiting, timeout=OTHERS_SECONDS)
        for task in waiting:
            task.cancel()

    async def _close_later(self, name: str) -> None:
        await self._wait_for_others()
        if name in self._dropped:
            await self._close(name)

    async def _close(self, name: str) -> Receipt:
        stored = self._dropped[name]
        if name in self._kept:  # its blocks are those of what is kept again
            del self._dropped[name]
            return Receipt()
        try:
            if stored.error is None and stored.opened_by != self._engine.restarts:
                with suppress(InvalidRequest, ContextTooLong):  # a file of it is gone
                    await self._tell_engine(stored)
            # By its id as well: where it is not open, that is all that the tiers know of it.
            names = dict.fromkeys((*stored.module_ids, name))
            closings = [await self._engine.close_module(each) for each in names]
        except EngineDied:  # `reopen` comes when it is back
            return Receipt(engine_away=True)

        async def forget() -> None:
            if self._dropped.pop(name, None) is not None and name not in self._kept:
                await self._ids.forget_kept(name)

        return await self._endings.begin(name, closings, forget).receipt()


async def _nothing() -> Modules:
    return ()


def _request_of(module_id: str, stored: StoredModules) -> Request:
    """Makes the request that encodes one of the modules."""
    return ingest_request(f"encode-{module_id}", (Segment(encodes=module_id),), salt=stored.salt)
