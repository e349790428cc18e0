"""Prompts that tenants have named: what conversations begin with, computed before anybody asks.

The beginning, system text and files in the chat template, is one module at position 0: kept on
disk, and found through its block keys by every conversation that begins with it, whether it names
the prompt or says the same by itself. When the prompt expires nothing keeps it any more.
"""

import asyncio
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from api.background.expiry import Expiry
from api.background.name_locks import NameLocks
from api.background.store_dir import StoreDir
from api.files.document_library import DocumentLibrary
from api.http.errors import ApiError
from api.stored_prompts.module_keeper import ModuleKeeper, Modules, StoredModules
from api.stored_prompts.records import PromptRecord, PromptRecords
from longctx.errors import InvalidRequest
from longctx.request import Piece
from longctx.text.chat_template import ChatPrompts, FilePart, Message, Placeholder

SETTLE_SECONDS = 60.0


@dataclass(slots=True, eq=False)
class StoredPrompt:
    record: PromptRecord
    modules: StoredModules
    tokens: int | None = None  # once its files are read
    uses: int = 0

    def expired(self, now: float) -> bool:
        return self.record.expires_at is not None and self.record.expires_at <= now


class PromptLibrary:
    def __init__(
        self,
        records: PromptRecords,
        documents: DocumentLibrary,
        folder: StoreDir,
        prompts: ChatPrompts,
        keeper: ModuleKeeper,
    ) -> None:
        self._records = records
        self._documents = documents
        self._folder = folder
        self._prompts = prompts
        self._keeper = keeper
        self._entries: dict[tuple[str, str], StoredPrompt] = {}
        self._locks = NameLocks()
        self._expiry = Expiry(self._moments, self._expire)

    async def open(self) -> None:
        """Takes up every prompt that has not expired meanwhile."""
        for record in await self._records.prompts():
            entry = self._entry(record)
            self._entries[record.tenant, record.name] = entry
            self._keeper.keep(entry.modules)
        self._expiry.start()

    async def close(self) -> None:
        await self._expiry.close()

    async def add(self, record: PromptRecord) -> StoredPrompt:
        """In place of the tenant's prompt of that name, once it is stored.

        Raises InvalidRequest where the model's chat template has no place for it, or its text is
        too long; how long files are is known later, and said by the prompt's state.
        """
        async with self._locks.of(record.tenant, record.name):
            files = [FilePart(name, self._title(record, name)) for name in record.file_ids]
            await asyncio.to_thread(self._pieces, record, files)
            entry = self._entry(record)
            self._keeper.keep(entry.modules)
            try:
                if not files:
                    await entry.modules.opened.wait()
                    if entry.modules.error is not None:
                        raise InvalidRequest(entry.modules.error, param="system")
                await self._records.save_prompt(record)
            except BaseException:
                await self._keeper.drop(entry.modules)
                raise
            known = self._entries.pop((record.tenant, record.name), None)
            self._entries[record.tenant, record.name] = entry  # the youngest
            self._expiry.reschedule()
            for file in files:
                if not self._folder.text_path(file.document_id).exists():  # deleted meanwhile
                    await self.forget_file(file.document_id)
            if known is not None:
                await self._keeper.replace(known.modules, entry.modules)
            return entry

    async def remove(self, tenant: str, name: str) -> None:
        """Whatever the tenant has under that name now."""
        async with self._locks.of(tenant, name):
            if (entry := self._entries.get((tenant, name))) is not None:
                await self._forget(entry)

    async def forget_file(self, file_id: str) -> None:
        """A file was deleted: what was computed of its text goes, and the prompts have an error."""
        for entry in list(self._entries.values()):
            if file_id in entry.record.file_ids:
                await self._keeper.drop(entry.modules)
                entry.modules.module_ids = ()
                entry.modules.error = (
                    f"there is no file {file_id!r} any more; store the prompt again"
                )

    def find(self, tenant: str, name: str, *, param: str | None = None) -> StoredPrompt:
        """Raises ApiError 404 when the tenant has no such prompt, or no more."""
        entry = self._entries.get((tenant, name))
        if entry is None or entry.expired(time.time()):
            raise ApiError(
                404,
                f"there is no prompt {name!r}; GET /v1/prompt_cache/prompts lists those there are",
                param=param,
                code="prompt_not_found",
            )
        return entry

    def of_tenant(self, tenant: str) -> Iterator[StoredPrompt]:
        """Oldest first."""
        now = time.time()
        return (
            entry
            for (owner, _), entry in self._entries.items()
            if owner == tenant and not entry.expired(now)
        )

    def _moments(self) -> Iterator[tuple[float, StoredPrompt]]:
        for entry in self._entries.values():
            if entry.record.expires_at is not None:
                yield entry.record.expires_at, entry

    async def _expire(self, entry: StoredPrompt) -> None:
        record = entry.record
        async with self._locks.of(record.tenant, record.name):
            if self._entries.get((record.tenant, record.name)) is entry:
                await self._forget(entry)

    async def _forget(self, entry: StoredPrompt) -> None:
        record = entry.record
        await self._records.remove_prompt(record.tenant, record.name)
        del self._entries[record.tenant, record.name]
        await self._keeper.drop(entry.modules)

    def _entry(self, record: PromptRecord) -> StoredPrompt:
        async def prepare() -> Modules:
            token_ids = await self._token_ids(record)
            entry.tokens = len(token_ids)
            return [(modules.id, (Piece(token_ids=token_ids, position=0),))]

        modules = StoredModules(
            id=f"prompt-{secrets.token_hex(12)}", salt=record.tenant, prepare=prepare
        )
        entry = StoredPrompt(record, modules)
        return entry

    async def _token_ids(self, record: PromptRecord) -> tuple[int, ...]:
        """Of everything before the user's own text. Waits for files that are still being read."""
        files = []
        for file_id in record.file_ids:
            try:
                document = self._documents.find(record.tenant, file_id)
                while not await self._documents.wait_tokenized(
                    document, timeout_seconds=SETTLE_SECONDS
                ):
                    pass
                self._documents.check(document)
            except ApiError as error:
                raise InvalidRequest(error.message) from error
            files.append(FilePart(file_id, document.record.filename))
        pieces = await asyncio.to_thread(self._pieces, record, files)
        token_ids: list[int] = []
        for piece in pieces:
            if isinstance(piece, FilePart):
                path = self._folder.tokens_path(piece.document_id)
                token_ids += np.fromfile(path, dtype="<i4").tolist()
            else:
                token_ids += piece
        return tuple(token_ids)

    def _pieces(
        self, record: PromptRecord, files: Sequence[FilePart]
    ) -> list[tuple[int, ...] | FilePart]:
        """What stands before the user's text."""
        system = [] if record.system is None else [Message("system", (record.system,))]
        opening: tuple[FilePart | Placeholder, ...] = tuple(files) or (Placeholder(0),)
        question = Message("user", (*opening, "?"))
        pieces = self._prompts.pieces([*system, question], date=record.date)
        last = max(i for i, piece in enumerate(pieces) if not isinstance(piece, tuple))
        return [piece for piece in pieces[: last + 1] if not isinstance(piece, Placeholder)]

    def _title(self, record: PromptRecord, file_id: str) -> str:
        document = self._documents.find(record.tenant, file_id, param="file_ids")
        return document.record.filename
