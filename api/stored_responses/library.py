"""Keeps responses: adds and finds them, lets them go by age and by number, and deletes them with
all that was computed for them."""

import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

from api.background.endings import Endings, Receipt
from api.background.expiry import Expiry
from api.http.errors import ApiError
from api.stored_responses.records import ResponseRecord, ResponseRecords
from longctx.errors import EngineDied
from longctx.process.client import EngineClient

MOST = 1000  # responses of one tenant
MOST_BYTES = 256 << 20  # of their JSON together
LIFE_SECONDS = 30 * 86_400


class StoredResponses:
    """Holds the stored responses of all tenants. Every method is called on the event loop.

    `open` comes first; `reopen` after each restart of the engine; `close` last, while the engine
    still runs, so that a deletion at work can end.
    """

    def __init__(
        self,
        records: ResponseRecords,
        engine: EngineClient,
        forget: Sequence[Callable[[str], Awaitable[None]]],
    ) -> None:
        """Each of `forget` is called with a thread that leaves, and drops what was made of it."""
        self._records = records
        self._engine = engine
        self._forget = forget
        self._endings = Endings()
        self._oldest: int | None = None
        self._expiry: Expiry[None] = Expiry(self._deadlines, self._expire)

    async def open(self) -> None:
        """Takes up the deletions that did not end."""
        self._oldest = await self._records.oldest()
        self._expiry.start()
        await self.reopen()

    async def close(self) -> None:
        await self._expiry.close()
        await self._endings.close()

    async def reopen(self) -> None:
        """Ends the deletions again, with an engine that was started anew."""
        for thread in await self._records.leaving():
            await self._erase(thread)

    @staticmethod
    def new_thread() -> str:
        return f"thread-{secrets.token_hex(12)}"

    async def add(self, record: ResponseRecord) -> None:
        """Stores it; durable when this returns. It goes after LIFE_SECONDS, and sooner where the
        tenant has more than MOST, or more than MOST_BYTES of them."""
        if record.previous is not None:
            previous = await self._records.find(record.tenant, record.previous)
            # One of its thread was deleted while it was answered: the thread has left.
            if previous is None:
                record = replace(record, thread=self.new_thread())
            elif previous.thread != record.thread:
                record = replace(record, thread=previous.thread)
        await self._records.save(record, most=MOST, most_bytes=MOST_BYTES)
        if self._oldest is None:
            self._oldest = record.created_at
            self._expiry.reschedule()

    async def find(self, tenant: str, name: str) -> ResponseRecord:
        """Returns the response. Raises ApiError 404 when the tenant has none of that id."""
        record = await self._records.find(tenant, name)
        if record is None:
            raise ApiError(404, f"there is no response {name!r}", code="response_not_found")
        return record

    async def chain(self, tenant: str, name: str) -> list[ResponseRecord]:
        """Returns the response after those it goes on from. Raises ApiError 400 where one of them
        is not there any more."""
        found, missing = await self._records.chain(tenant, name)
        if missing is not None:
            which = "" if missing == name else f", which {name!r} goes on from"
            raise ApiError(
                400,
                f"there is no response {missing!r}{which}; send the conversation as input",
                param="previous_response_id",
                code="previous_response_not_found",
            )
        return found

    async def delete(self, tenant: str, name: str) -> Receipt:
        """Deletes a response, with what was computed for it in every tier; what others that stay
        have computed with it goes too, and is computed again when they are gone on from.

        Returns how far that is when it has ended, or after a moment. Raises ApiError 404.
        """
        record = await self.find(tenant, name)
        await self._records.remove(record, new_thread=self.new_thread())
        for each in self._forget:
            await each(record.thread)
        return await self._erase(record.thread)

    async def _erase(self, thread: str) -> Receipt:
        try:
            closing = await self._engine.close_module(thread)
        except EngineDied:  # `reopen` comes when it is back
            return Receipt(engine_away=True)

        async def forget() -> None:
            await self._records.forget_leaving(thread)

        return await self._endings.begin(thread, [closing], forget).receipt()

    def _deadlines(self) -> list[tuple[float, None]]:
        return [] if self._oldest is None else [(self._oldest + LIFE_SECONDS, None)]

    async def _expire(self, _: None) -> None:
        await self._records.remove_until(int(time.time()) - LIFE_SECONDS)
        self._oldest = await self._records.oldest()
