"""Contents that tenants keep computed for a time: what conversations begin with, by a name that the
server gives.

Unlike a named prompt it may be any beginning of a conversation, tools among it. What the chat
template writes of it whatever follows is one module at position 0: it is kept on disk, and found
through its block keys by every conversation that begins with it.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from api.background.endings import Receipt
from api.http.errors import ApiError
from api.stored_prompts.kept_beginnings import KeptBeginnings
from api.stored_prompts.module_keeper import Modules, StoredModules
from api.stored_prompts.named_library import until_opened
from api.stored_prompts.records import CachedRecord
from longctx.request import Piece
from longctx.text.chat_template import FilePart, Message, Placeholder

PROBES = ("?", "Who")  # stand for what may follow


@dataclass(slots=True, eq=False)
class CachedContent:
    """Holds the contents of a tenant, with what is computed of them as one module."""

    record: CachedRecord
    modules: StoredModules


class CachedContents(KeptBeginnings[CachedContent]):
    """Knows the cached contents of all tenants. `open` comes first, `close` last."""

    kind = "cached content"
    again = "cache it again"
    files_param = "contents"

    def find(self, tenant: str, name: str, *, param: str | None = None) -> CachedContent:
        """Returns the cached content. Raises ApiError 404 when the tenant has none of that name."""
        found = self._items.get((tenant, name))
        if found is None or self._is_expired(found):
            raise ApiError(
                404,
                f"there is no cachedContents/{name}; it may have expired, and GET "
                "/v1beta/cachedContents lists those there are",
                param=param,
                code="cached_content_not_found",
            )
        return found

    async def count(self, record: CachedRecord) -> int:
        """Counts the tokens that are kept of it. Waits for files that are being tokenized.

        Raises InvalidRequest where the model's chat template has no place for it.
        """
        return len(await self._token_ids(record))

    async def add(self, record: CachedRecord) -> CachedContent:
        """Keeps it from now on. Its files have been tokenized.

        Raises InvalidRequest where the engine cannot keep it.
        """
        async with self._locks.of(record.tenant, record.name):
            cached = self._cached(record)

            async def save() -> None:
                await until_opened(cached.modules, param="contents")
                await self._records.save_cached(record)

            await self._keep(cached, save)
            return cached

    async def expire_at(self, cached: CachedContent, moment: float) -> None:
        """Gives it a new end. Raises ApiError 404 where it was removed meanwhile."""
        record = cached.record
        async with self._locks.of(record.tenant, record.name):
            cached = self.find(record.tenant, record.name)
            changed = replace(cached.record, expires_at=moment, updated_at=time.time())
            await self._records.save_cached(changed)
            cached.record = changed
            self._expiry.reschedule()

    def owns(self, file_id: str) -> bool:
        """Tells whether the file came inside a cached content, and goes with the last one of it."""
        return any(file_id in each.record.owned_file_ids for each in self._items.values())

    async def _remove_record(self, item: CachedContent) -> None:
        await self._records.remove_cached(item.record.tenant, item.record.name)

    async def _forget(self, item: CachedContent) -> Receipt:
        receipt = await super()._forget(item)
        await self.release(item.record.tenant, item.record.owned_file_ids)
        return receipt

    async def release(self, tenant: str, file_ids: Sequence[str]) -> None:
        """Deletes files that came inside a cached content, but for those that another one has."""
        for file_id in file_ids:
            if not any(file_id in each.record.file_ids for each in self._items.values()):
                try:
                    document = self._documents.find(tenant, file_id)
                except ApiError:  # its owner was first
                    continue
                await self._documents.remove(document)

    async def _recorded(self) -> list[CachedContent]:
        return [self._cached(record) for record in await self._records.cached_contents()]

    def _cached(self, record: CachedRecord) -> CachedContent:
        """Makes it with its module, which is not kept yet."""

        async def prepare() -> Modules:
            token_ids = await self._token_ids(record)
            return [(modules.id, (Piece(token_ids=token_ids, position=0),))]

        modules = StoredModules(
            id=self._keeper.new_id("cached", (record.tenant, record.name)),
            salt=record.tenant,
            prepare=prepare,
            sources=record.file_ids,
        )
        return CachedContent(record, modules)

    async def _token_ids(self, record: CachedRecord) -> tuple[int, ...]:
        """Returns the tokens that every conversation with it begins with. Waits for files that are
        still being tokenized. Raises InvalidRequest for a file that has failed or is gone."""
        await self._tokenized(record)
        return await asyncio.to_thread(self._rendered, record)

    def _rendered(self, record: CachedRecord) -> tuple[int, ...]:
        one, other = (self._prompt(record, probe) for probe in PROBES)
        alike = next(
            (number for number, (a, b) in enumerate(zip(one, other, strict=False)) if a != b),
            min(len(one), len(other)),
        )
        return self._joined(
            piece if isinstance(piece, FilePart) else (piece,) for piece in one[:alike]
        )

    def _prompt(self, record: CachedRecord, question: str) -> list[int | FilePart]:
        """Returns the tokens and files of a conversation that asks this."""
        pieces = self._prompts.pieces(
            [*record.messages, Message("user", (question,))],
            date=record.date,
            tools=record.offered,
        )
        found: list[int | FilePart] = []
        for piece in pieces:
            assert not isinstance(piece, Placeholder), "a cached content has no gaps"
            found += [piece] if isinstance(piece, FilePart) else piece
        return found
