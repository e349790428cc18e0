"""The library of documents: adds, finds and removes them, and tells how far each has come.

    upload -> queued -> tokenized (`tokenizer_process.py`) -> computed by the engine -> ready
                 \\________________\\______________________________\\____________-> error

A document's state is derived from what is true, it is not stored: after a restart of the server
every known document is taken up again. `document_jobs.py` has the work.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Literal

from api.background.endings import Receipt
from api.background.expiry import Expiry
from api.background.store_dir import StoreDir
from api.files.document import Document, DocumentState
from api.files.document_jobs import DocumentJobs
from api.files.document_store import DocumentRecord, DocumentStore
from api.files.reading import load_reading
from api.files.tokenizer_process import TokenizerProcess
from api.http.errors import ApiError
from longctx.errors import InvalidRequest
from longctx.process.client import EngineClient
from longctx.text.chat_template import ChatPrompts

logger = logging.getLogger("longctx.api")

TOKEN_BYTES = 4


class DocumentLibrary:
    """Knows all documents of all tenants. Every method is called on the server's event loop.

    `open` comes first; `reopen` after each restart of the engine; `close` last, while the engine
    still runs, so that a deletion at work can end.
    """

    def __init__(
        self,
        folder: StoreDir,
        store: DocumentStore,
        tokenizer_process: TokenizerProcess,
        prompts: ChatPrompts,
        engine: EngineClient,
    ) -> None:
        self._folder = folder
        self._store = store
        self._prompts = prompts
        self._engine = engine
        self._documents: dict[str, Document] = {}
        self._forget: tuple[Callable[[str], Awaitable[None]], ...] = ()
        self._expiry = Expiry(self._deadlines, self._expire)
        self._jobs = DocumentJobs(folder, store, tokenizer_process, engine)

    async def open(self) -> None:
        """Takes up every known document again, and the deletions that did not end."""
        records, deleted = await self._store.all(), await self._store.deleted()
        self._folder.remove_orphans(frozenset(r.id for r in (*records, *deleted)))
        for record in records:
            if not self._folder.text_path(record.id).exists():
                logger.warning("the text of %s is gone; forgetting it", record.id)
                await self._store.remove(record.id)
                continue
            await self._take_up(record)
        for record in deleted:
            with suppress(InvalidRequest):  # this model's template takes no documents
                self._jobs.drop_later(Document(record, await self._prefix(record)))

    def start_expiry(self, *forget: Callable[[str], Awaitable[None]]) -> None:
        """Begins to delete documents whose time is over.

        Each of `forget` is called with the id of every document that is removed from now on, and
        drops what was made of its text.
        """
        self._forget = forget
        self._expiry.start()

    async def stop_expiry(self) -> None:
        await self._expiry.close()

    async def close(self) -> None:
        """Stops all work, which is taken up again next time."""
        await self._jobs.close()

    async def reopen(self) -> None:
        """Begins again after the engine was restarted: it knows no document."""
        await self._jobs.restart()

    async def add(self, record: DocumentRecord, text: Path) -> Document:
        """Moves the uploaded text into the store and starts the work on it. Raises InvalidRequest
        when the model has no place for a document in its chat template."""
        prefix = await self._prefix(record)
        await asyncio.to_thread(text.rename, self._folder.text_path(record.id))
        await self._store.save(record)
        document = self._start(record, prefix)
        self._expiry.reschedule()
        return document

    async def remove(self, document: Document) -> Receipt:
        """Deletes the document, whatever is done about it now; those who wait for it get 404.

        When this returns its text is gone, and what was made of it. Its tokens and blocks are gone
        too, unless the receipt says what they wait for: questions that were asked before, or the
        engine where it is away.
        """
        document.removed = True
        document.tokenized.set()
        del self._documents[document.id]
        await self._jobs.cancel(document)
        await self._store.delete(document.id)
        await asyncio.to_thread(self._folder.remove_text, document.id)
        for each in self._forget:
            await each(document.id)
        return await self._jobs.drop(document)

    def find(self, tenant: str, document_id: str, *, param: str | None = None) -> Document:
        """Returns the document. Raises ApiError 404 when the tenant has none of that id."""
        document = self._documents.get(document_id)
        if document is None or document.record.tenant != tenant or _is_over(document):
            raise _unknown(document_id, param)
        return document

    def find_same(self, tenant: str, sha256: str, filename: str) -> Document | None:
        """Returns a document of the tenant of that content and name, without a system prompt, that
        has not failed and stays until it is deleted; None when there is none."""
        for document in self._documents.values():
            record = document.record
            same_content = (record.tenant, record.sha256) == (tenant, sha256)
            told = (record.filename, record.system, record.expires_at)
            same_prompt = told == (filename, None, None)
            if same_content and same_prompt and document.error is None:
                return document
        return None

    def documents(self) -> Iterator[Document]:
        """Yields all documents of all tenants, in order of upload."""
        return iter(self._documents.values())

    async def page(
        self,
        tenant: str,
        *,
        purpose: str | None,
        order: Literal["asc", "desc"],
        after: str | None,
        limit: int,
    ) -> list[Document]:
        """Returns at most `limit` documents of the tenant after the one named, by upload."""
        records = await self._store.page(
            tenant, purpose=purpose, order=order, after=after, limit=limit
        )
        found = (self._documents.get(record.id) for record in records)
        return [document for document in found if document is not None]  # some may just be leaving

    def upload_path(self, document: Document) -> Path:
        return self._folder.text_path(document.id)

    def text_path(self, document: Document) -> Path:
        """Returns the text that the model reads, in UTF-8."""
        folder = self._folder
        path = folder.text_path if document.reading is None else folder.read_path
        return path(document.id)

    def state(self, document: Document) -> DocumentState:
        """Derives the state that the API tells."""
        if document.error is not None:
            return "error"
        if self.is_ready(document):
            return "ready"
        return "processing" if self._jobs.is_running(document) else "queued"

    def is_ready(self, document: Document) -> bool:
        return document.computed and self._engine.state != "restarting"

    def prefilled_tokens(self, document: Document) -> int:
        """Counts the tokens of it that the engine has computed."""
        if self.is_ready(document):
            return document.tokens
        if document.progress is None or document.computed:
            return 0
        return max(0, document.progress.processed - len(document.prefix))

    def durable_tokens(self, document: Document) -> int:
        """Counts the tokens of it that need not be computed again after a restart."""
        return self._engine.durable_tokens.get(document.id, 0)

    def kv_bytes(self, document: Document) -> int:
        """Returns the device memory of what is computed, as if no other document shared it."""
        return self._engine.info.kv_bytes(self.prefilled_tokens(document))

    def eta_seconds(self, document: Document) -> float | None:
        """Estimates the time until it is computed; None before anything of it is."""
        if self.is_ready(document):
            return 0.0
        progress = document.progress
        if progress is None or progress.rest_ms is None:
            return None
        return round(progress.rest_ms / 1000, 1)

    async def wait_tokenized(self, document: Document, *, timeout_seconds: float) -> bool:
        """Moves the document to the head of the queue and waits for `Document.tokenized`; returns
        False when the time is over first."""
        self._jobs.prioritize(document)
        with suppress(TimeoutError):
            await asyncio.wait_for(document.tokenized.wait(), timeout_seconds)
        return document.tokenized.is_set()

    def check(self, document: Document) -> None:
        """Raises ApiError: 400 when the document has failed, 404 when it was deleted."""
        if document.removed:
            raise _unknown(document.id, "messages")
        if document.error is not None:
            raise ApiError(
                400,
                f"file {document.id} ({document.record.filename}) cannot be asked about: "
                f"{document.error}",
                param="messages",
                code="file_error",
            )

    def _deadlines(self) -> Iterator[tuple[float, Document]]:
        for document in self._documents.values():
            if document.record.expires_at is not None:
                yield float(document.record.expires_at), document

    async def _expire(self, document: Document) -> None:
        if not document.removed:  # by a client, meanwhile
            await self.remove(document)

    async def _take_up(self, record: DocumentRecord) -> None:
        tokens = self._folder.tokens_path(record.id)
        known = record.fingerprint == self._engine.info.fingerprint
        size_bytes = tokens.stat().st_size if tokens.exists() else None
        if not known or record.tokens is None or size_bytes != record.tokens * TOKEN_BYTES:
            record = replace(record, tokens=None, fingerprint=None)
        try:
            document = self._start(record, await self._prefix(record))
            document.reading = load_reading(self._folder.reading_path(record.id))
        except InvalidRequest as error:  # this model's template takes no documents
            self._documents[record.id] = Document(record, prefix=(), error=str(error))

    def _start(self, record: DocumentRecord, prefix: tuple[int, ...]) -> Document:
        document = Document(record, prefix)
        self._documents[record.id] = document
        self._jobs.start(document)
        return document

    async def _prefix(self, record: DocumentRecord) -> tuple[int, ...]:
        return await asyncio.to_thread(
            self._prompts.document_prefix,
            record.system,
            title=record.filename,
            date=record.date,
        )


def _is_over(document: Document) -> bool:
    expires_at = document.record.expires_at
    return expires_at is not None and expires_at <= time.time()


def _unknown(document_id: str, param: str | None) -> ApiError:
    return ApiError(
        404,
        f"there is no file {document_id!r}; GET /v1/files lists those there are",
        param=param,
        code="file_not_found",
    )
