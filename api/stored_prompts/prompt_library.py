"""Prompts that tenants have named: what conversations begin with, computed before anybody asks.

The beginning, system text and files in the chat template, is one module at position 0: it is kept
on disk, and found through its block keys by every conversation that begins with it, whether that
names the prompt or says the same by itself. When the prompt expires nothing keeps it any more.
"""

import asyncio
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from api.background.expiry import Expiry
from api.background.store_dir import StoreDir
from api.files.document_library import DocumentLibrary
from api.http.errors import ApiError
from api.stored_prompts.module_keeper import ModuleKeeper, Modules, StoredModules
from api.stored_prompts.named_library import NamedLibrary, until_opened
from api.stored_prompts.records import PromptRecord, PromptRecords
from longctx.errors import InvalidRequest
from longctx.request import Piece
from longctx.text.chat_template import ChatPrompts, FilePart, Message, Placeholder

WAIT_SECONDS = 60.0  # at a time, for a file to be tokenized


@dataclass(slots=True, eq=False)
class StoredPrompt:
    """Holds a prompt of a tenant, with its beginning as one module."""

    record: PromptRecord
    modules: StoredModules
    tokens: int | None = None  # once its files are tokenized
    uses: int = 0


class PromptLibrary(NamedLibrary[StoredPrompt]):
    """Knows all named prompts of all tenants. `open` comes first, `close` last."""

    kind = "prompt"

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
        """Takes up every prompt that has not expired meanwhile."""
        for record in await self._records.prompts():
            self._take_up(self._stored(record))
        self._expiry.start()

    async def close(self) -> None:
        await self._expiry.close()

    async def add(self, record: PromptRecord) -> StoredPrompt:
        """Puts the prompt in the place of the tenant's prompt of that name.

        Raises InvalidRequest where the model's chat template has no place for it, or its text is
        too long; how long files are is known later, and said by the prompt's state.
        """
        async with self._locks.of(record.tenant, record.name):
            known = self._items.get((record.tenant, record.name))
            if known is not None and known.record == record and known.modules.error is None:
                return known
            files = [FilePart(name, self._title(record, name)) for name in record.file_ids]
            await asyncio.to_thread(self._pieces, record, files)
            stored = self._stored(record)

            async def save() -> None:
                if not files:
                    await until_opened(stored.modules, param="system")
                await self._records.save_prompt(record)

            await self._put(stored, stored.modules, save)
            self._expiry.reschedule()
            for file in files:
                if not self._folder.text_path(file.document_id).exists():  # deleted meanwhile
                    await self.forget_file(file.document_id)
            return stored

    async def forget_file(self, file_id: str) -> None:
        """Drops what was computed of a deleted file's text; the prompts with it have an error."""
        for stored in list(self._items.values()):
            if file_id in stored.record.file_ids:
                await self._keeper.drop(stored.modules)
                stored.modules.module_ids = ()
                stored.modules.error = (
                    f"there is no file {file_id!r} any more; store the prompt again"
                )

    async def _remove_record(self, item: StoredPrompt) -> None:
        await self._records.remove_prompt(item.record.tenant, item.record.name)

    def _is_expired(self, item: StoredPrompt) -> bool:
        return item.record.expires_at is not None and item.record.expires_at <= time.time()

    def _deadlines(self) -> Iterator[tuple[float, StoredPrompt]]:
        for stored in self._items.values():
            if stored.record.expires_at is not None:
                yield stored.record.expires_at, stored

    async def _expire(self, stored: StoredPrompt) -> None:
        record = stored.record
        async with self._locks.of(record.tenant, record.name):
            if self._items.get((record.tenant, record.name)) is stored:  # not replaced meanwhile
                await self._forget(stored)

    def _stored(self, record: PromptRecord) -> StoredPrompt:
        """Makes the prompt with its module, which is not kept yet."""

        async def prepare() -> Modules:
            token_ids = await self._token_ids(record)
            stored.tokens = len(token_ids)
            return [(modules.id, (Piece(token_ids=token_ids, position=0),))]

        modules = StoredModules(
            id=self._keeper.new_id("prompt", record),
            salt=record.tenant,
            prepare=prepare,
            sources=record.file_ids,
        )
        stored = StoredPrompt(record, modules)
        return stored

    async def _token_ids(self, record: PromptRecord) -> tuple[int, ...]:
        """Returns the tokens of all that precedes the user's own text. Waits for files that are
        still being tokenized. Raises InvalidRequest for a file that has failed or is gone."""
        files = []
        for file_id in record.file_ids:
            try:
                document = self._documents.find(record.tenant, file_id)
                while not await self._documents.wait_tokenized(
                    document, timeout_seconds=WAIT_SECONDS
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
        """Returns the template's tokens and the files in order, up to the user's text."""
        system = [] if record.system is None else [Message("system", (record.system,))]
        begin: tuple[FilePart | Placeholder, ...] = tuple(files) or (Placeholder(0),)
        question = Message("user", (*begin, "?"))
        pieces = self._prompts.pieces([*system, question], date=record.date)
        last = max(i for i, piece in enumerate(pieces) if not isinstance(piece, tuple))
        return [piece for piece in pieces[: last + 1] if not isinstance(piece, Placeholder)]

    def _title(self, record: PromptRecord, file_id: str) -> str:
        document = self._documents.find(record.tenant, file_id, param="file_ids")
        return document.record.filename
