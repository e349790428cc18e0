"""The background work on documents: tokenize, compute, and drop what is left of deleted ones.

One document is tokenized at a time, two are computed. All of it is done again after a restart of
the engine, which then knows no document; what the tiers below the device have kept of one is found
there and not computed again, and a question that comes first joins that work.

What the tiers keep of a deleted document is erased by an engine that knows its tokens, or where
there is none, by its id. While the engine does not know them, the deletion waits its turn behind
the documents there are, which may share blocks with it. An engine that still answers questions
about the document erases it after those. Until all of it is gone the deletion is written down
(`DocumentStore.delete`), so it outlives the server.
"""

import asyncio
import logging
from contextlib import suppress
from dataclasses import replace

from api.background.endings import Ending, Endings, Receipt
from api.background.finish import finish
from api.background.ingest import ingest, ingest_request
from api.background.job_queue import JobQueue
from api.background.store_dir import StoreDir
from api.files.document import Document
from api.files.document_store import DocumentStore
from api.files.reading import load_reading
from api.files.tokenizer_process import TokenizerProcess
from longctx.errors import ContextTooLong, EngineDied, InvalidRequest, LongctxError
from longctx.process.client import EngineClient
from longctx.request import Progress, Request, Segment

logger = logging.getLogger("longctx.api")


class DocumentJobs:
    """Does the work on documents. All methods are called on the event loop.

       A document is started once, and cancelled before it is dropped.
    Jobs end by
       setting its `computed` or `error`, and never raise.
    """

    def __init__(
        self,
        folder: StoreDir,
        store: DocumentStore,
        tokenizer_process: TokenizerProcess,
        engine: EngineClient,
    ) -> None:
        self._folder = folder
        self._store = store
        self._tokenizer_process = tokenizer_process
        self._engine = engine
        self._documents: dict[str, Document] = {}
        self._deleted: dict[str, Document] = {}  # which the tiers may still have something of
        self._endings = Endings()
        self._tokenizing = JobQueue(self._tokenize, width=1)
        self._ingesting = JobQueue(self._ingest, width=2)

    def start(self, document: Document) -> None:
        """Queues the document to be tokenized and then computed."""
        self._documents[document.id] = document
        self._tokenizing.add(document.id)

    def prioritize(self, document: Document) -> None:
        """Lets it be tokenized before all others that wait."""
        self._tokenizing.prioritize(document.id)

    def is_running(self, document: Document) -> bool:
        return self._tokenizing.is_running(document.id) or self._ingesting.is_running(document.id)

    async def cancel(self, document: Document) -> None:
        """Ends all work on the document; when this returns nothing writes its files any more."""
        self._documents.pop(document.id, None)
        await self._tokenizing.cancel(document.id)
        await self._ingesting.cancel(document.id)

    async def drop(self, document: Document) -> Receipt:
        """Drops what is stored of a deleted document: now, or once the engine knows it.

        Returns how far that is when it has ended, or after a moment.
        """
        if document.record.tokens is None or document.opened_by == self._engine.restarts:
            return await self._drop(document)
        self.drop_later(document)
        return Receipt(engine_away=True)

    def drop_later(self, document: Document) -> None:
        """Queues the deletion behind the documents that wait now."""
        self._deleted[document.id] = document
        self._tokenizing.add(document.id)

    async def restart(self) -> None:
        """Begins again with every document, for an engine that was restarted and knows none."""
        for document in self._documents.values():
            if document.error is None:
                document.computed = False
                document.progress = None
                document.tokenized.clear()
                self._tokenizing.add(document.id)
        for document in list(self._deleted.values()):
            await self._tokenizing.cancel(document.id)  # its place is behind all others
            self.drop_later(document)

    async def close(self) -> None:
        """Stops all work, which is taken up again next time; a deletion at work is ended."""
        await self._tokenizing.close()
        await self._ingesting.close()
        await self._endings.close()

    async def _tokenize(self, document_id: str) -> None:
        if (deleted := self._deleted.get(document_id)) is not None:
            await self._drop(deleted)
            return
        document = self._documents[document_id]
        try:
            if document.record.tokens is None:
                await self._write_tokens(document)
            self._check_length(document)
            with suppress(EngineDied):  # `restart` comes when it is back
                await self._open(document)
                self._ingesting.add(document_id)
        except (LongctxError, OSError) as error:
            document.error = str(error)
        except Exception as error:  # a bug of ours must not leave anybody waiting
            logger.error("tokenizing %s failed", document_id, exc_info=error)
            document.error = "the server failed; its log says why"
        document.tokenized.set()

    async def _write_tokens(self, document: Document) -> None:
        def note(read_bytes: int) -> None:
            document.read_bytes = read_bytes

        tokens = await self._tokenizer_process.tokenize(
            self._folder.text_path(document.id),
            self._folder.tokens_path(document.id),
            filename=document.record.filename,
            continues=bool(document.prefix),
            on_progress=note,
        )
        reading = self._folder.reading_path(document.id)
        document.reading = await asyncio.to_thread(load_reading, reading)
        fingerprint = self._engine.info.fingerprint
        document.record = replace(document.record, tokens=tokens, fingerprint=fingerprint)
        await self._store.save(document.record)

    def _check_length(self, document: Document) -> None:
        limits = self._engine.info.limits
        total = len(document.prefix) + document.tokens
        if total >= limits.longest_tokens:
            raise ContextTooLong(
                f"with the prompt before it the document has {total} tokens, the limit is "
                f"{limits.longest_tokens} together with question and answer; split it or "
                f"{limits.cure}"
            )

    async def _open(self, document: Document) -> None:
        tokens = self._folder.tokens_path(document.id)
        opened_by = self._engine.restarts
        await self._engine.open_document(document.id, tokens, keep=_request_of(document))
        document.opened_by = opened_by

    async def _ingest(self, document_id: str) -> None:
        document = self._documents[document_id]
        if document.error is not None:  # since it was queued
            return

        def note(progress: Progress) -> None:
            document.progress = progress

        try:
            document.computed = await ingest(
                self._engine,
                _request_of(document),
                failures=document.failures,
                on_progress=note,
            )
            if document.computed:
                document.failures.count = 0
        except LongctxError as error:
            document.error = str(error)

    async def _drop(self, document: Document) -> Receipt:
        """Has the engine erase what stems from the document, then removes its tokens and record."""
        self._deleted[document.id] = document
        ending = await finish(self._end(document))  # also when the server ends meanwhile
        if ending is None:
            return Receipt(engine_away=True)  # `restart` comes when it is back
        return await ending.receipt()

    async def _end(self, document: Document) -> Ending | None:
        """Begins to end a deletion; returns None where the engine died."""
        known = document.record.fingerprint == self._engine.info.fingerprint
        try:
            if known and document.opened_by != self._engine.restarts:
                with suppress(InvalidRequest, ContextTooLong):  # its tokens are lost, or too many
                    await self._open(document)
            closing = await self._engine.close_document(document.id)
        except EngineDied:
            return None

        async def forget() -> None:
            await self._store.remove(document.id)
            await asyncio.to_thread(self._folder.remove_document, document.id)
            self._deleted.pop(document.id, None)

        return self._endings.begin(document.id, [closing], forget)


def _request_of(document: Document) -> Request:
    """Makes the request that computes the document, after the tokens it is computed under."""
    before = (Segment(token_ids=document.prefix),) if document.prefix else ()
    return ingest_request(
        f"ingest-{document.id}",
        (*before, Segment(document_id=document.id)),
        salt=document.record.tenant,
    )
