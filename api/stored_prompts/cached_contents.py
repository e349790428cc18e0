"""Contents that tenants keep computed for a time: what conversations begin with, by a name that the
server gives.

Unlike a named prompt it may be any beginning of a conversation, tools among it. What the chat
template writes of it whatever follows is one module at position 0: it is kept on disk, and found
through its block keys by every conversation that begins with it.
"""

import asyncio
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from api.background.endings import Receipt
from api.background.expiry import Expiry
from api.background.store_dir import StoreDir
from api.files.document_library import DocumentLibrary
from api.http.errors import ApiError
from api.stored_prompts.module_keeper import ModuleKeeper, Modules, StoredModules
from api.stored_prompts.named_library import NamedLibrary, until_opened
from api.stored_prompts.records import CachedRecord, PromptRecords
from longctx.errors import InvalidRequest
from longctx.request import Piece
from longctx.text.chat_template import ChatPrompts, FilePart, Message, Placeholder

WAIT_SECONDS = 60.0  # at a time, for a file to be tokenized
PROBES = ("?", "Who")  # stand for what may follow


@dataclass(slots=True, eq=False)
class CachedContent:
    """Holds the contents of a tenant, with what is computed of them as one module."""

    record: CachedRecord
    modules: StoredModules


class CachedContents(NamedLibrary[CachedContent]):
    """Knows the cached contents of all tenants. `open` comes first, `close` last."""

    kind = "cached content"

    def __init__(
        self,
        records: PromptRecords,
        documents: DocumentLibrary,
        folder: StoreDir,
        prompts: ChatPrompts,
        keeper: ModuleKeeper,
    ) -> None:
        super().__init__(keeper)
        self._records = records
        self._documents = documents
        self._folder = folder
        self._prompts = prompts
        self._expiry = Expiry(self._deadlines, self._expire)

    async def open(self) -> None:
        """Takes up every cached content that has not expired meanwhile."""
        for record in await self._records.cached_contents():
            self._take_up(self._cached(record))
        self._expiry.start()

    async def close(self) -> None:
        await self._expiry.close()

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

            await self._put(cached, cached.modules, save)
            self._expiry.reschedule()
            for file_id in record.file_ids:
                if not self._folder.text_path(file_id).exists():  # deleted meanwhile
                    await self.forget_file(file_id)
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

    async def forget_file(self, file_id: str) -> None:
        """Drops what was computed of a deleted file's text; contents with it have an error."""
        for cached in list(self._items.values()):
            if file_id in cached.record.file_ids:
                await self._keeper.drop(cached.modules)
                cached.modules.module_ids = ()
                cached.modules.error = f"there is no file {file_id!r} any more; cache it again"

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

    def _is_expired(self, item: CachedContent) -> bool:
        return item.record.expires_at <= time.time()

    def _deadlines(self) -> Iterator[tuple[float, CachedContent]]:
        for cached in self._items.values():
            yield cached.record.expires_at, cached

    async def _expire(self, cached: CachedContent) -> None:
        record = cached.record
        async with self._locks.of(record.tenant, record.name):
            now = self._items.get((record.tenant, record.name))
            if now is cached and self._is_expired(cached):  # it may have got a new end
                await self._forget(cached)

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
        for file_id in record.file_ids:
            try:
                document = self._documents.find(record.tenant, file_id)
                while not await self._documents.wait_tokenized(
                    document, timeout_seconds=WAIT_SECONDS
                ):
                    pass
                self._documents.check(document)
            except ApiError as error:
                raise InvalidRequest(error.message, param="contents") from error
        return await asyncio.to_thread(self._rendered, record)

    def _rendered(self, record: CachedRecord) -> tuple[int, ...]:
        one, other = (self._prompt(record, probe) for probe in PROBES)
        alike = next(
            (number for number, (a, b) in enumerate(zip(one, other, strict=False)) if a != b),
            min(len(one), len(other)),
        )
        token_ids: list[int] = []
        for piece in one[:alike]:
            if isinstance(piece, FilePart):
                path = self._folder.tokens_path(piece.document_id)
                token_ids += np.fromfile(path, dtype="<i4").tolist()
            else:
                token_ids.append(piece)
        return tuple(token_ids)

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
