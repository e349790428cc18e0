"""What named prompts and cached contents share: beginnings of conversations, kept for a time.

Each is one module at position 0, with the texts of files in it. It goes when its time is over, and
what was computed of a file goes with the file.
"""

import time
from abc import abstractmethod
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import ClassVar, Protocol, TypeVar

import numpy as np

from api.background.expiry import Expiry
from api.background.store_dir import StoreDir
from api.files.document import Document
from api.files.document_library import DocumentLibrary
from api.http.errors import ApiError
from api.stored_prompts.module_keeper import ModuleKeeper, StoredModules
from api.stored_prompts.named_library import NamedLibrary, NamedRecord
from api.stored_prompts.records import PromptRecords
from longctx.errors import InvalidRequest
from longctx.text.chat_template import ChatPrompts, FilePart

WAIT_SECONDS = 60.0  # at a time, for a file to be tokenized


class KeptRecord(NamedRecord, Protocol):
    @property
    def file_ids(self) -> tuple[str, ...]: ...
    @property
    def expires_at(self) -> float | None: ...


class KeptItem(Protocol):
    """Has a record, and the beginning as one module."""

    @property
    def record(self) -> KeptRecord: ...
    @property
    def modules(self) -> StoredModules: ...


Kept = TypeVar("Kept", bound=KeptItem)


class KeptBeginnings(NamedLibrary[Kept]):
    """Knows the beginnings of one kind of all tenants. `open` comes first, `close` last."""

    again: ClassVar[str]  # what to do about a file that is gone
    files_param: ClassVar[str | None] = None  # where a request names files

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
        """Takes up everything that has not expired meanwhile."""
        for item in await self._recorded():
            self._take_up(item)
        self._expiry.start()

    async def close(self) -> None:
        await self._expiry.close()

    async def forget_file(self, file_id: str) -> None:
        """Drops what was computed of a deleted file's text; what has it in it has an error."""
        for item in list(self._items.values()):
            if file_id in item.record.file_ids:
                await self._keeper.drop(item.modules)
                item.modules.module_ids = ()
                item.modules.error = f"there is no file {file_id!r} any more; {self.again}"

    @abstractmethod
    async def _recorded(self) -> Iterable[Kept]:
        """Returns all that is in the database, not kept yet."""

    async def _keep(self, item: Kept, save: Callable[[], Awaitable[None]]) -> None:
        """Keeps an item from now on, as `_put` does. The caller holds the name's lock."""
        await self._put(item, item.modules, save)
        self._expiry.reschedule()
        for file_id in item.record.file_ids:
            if not self._folder.text_path(file_id).exists():  # deleted meanwhile
                await self.forget_file(file_id)

    def _is_expired(self, item: Kept) -> bool:
        return item.record.expires_at is not None and item.record.expires_at <= time.time()

    def _deadlines(self) -> Iterator[tuple[float, Kept]]:
        for item in self._items.values():
            if item.record.expires_at is not None:
                yield item.record.expires_at, item

    async def _expire(self, item: Kept) -> None:
        record = item.record
        async with self._locks.of(record.tenant, record.name):
            now = self._items.get((record.tenant, record.name))
            if now is item and self._is_expired(item):  # not replaced, and with no new end
                await self._forget(item)

    async def _tokenized(self, record: KeptRecord) -> list[Document]:
        """Returns the record's files once they are tokenized. Raises InvalidRequest for one that
        has failed or is gone."""
        documents = []
        for file_id in record.file_ids:
            try:
                document = self._documents.find(record.tenant, file_id)
                while not await self._documents.wait_tokenized(
                    document, timeout_seconds=WAIT_SECONDS
                ):
                    pass
                self._documents.check(document)
            except ApiError as error:
                raise InvalidRequest(error.message, param=self.files_param) from error
            documents.append(document)
        return documents

    def _joined(self, pieces: Iterable[tuple[int, ...] | FilePart]) -> tuple[int, ...]:
        """Returns the tokens of pieces of a prompt, with those of files in their places."""
        token_ids: list[int] = []
        for piece in pieces:
            if isinstance(piece, FilePart):
                path = self._folder.tokens_path(piece.document_id)
                token_ids += np.fromfile(path, dtype="<i4").tolist()
            else:
                token_ids += piece
        return tuple(token_ids)
