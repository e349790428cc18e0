"""The documents of this process, and how far each has come.

    upload -> queued -> tokenized (`parser.py`) -> computed by the engine -> ready
                 \\________________\\______________________\\____________-> error

One document is tokenized at a time, two are computed. The state is derived from what is true, it is
not stored: after a restart of the server, or of the engine, every known document is taken up again
in the background. What the tiers below the device have kept of it is not computed again, and a
question that comes first joins that work.

What they have kept of a deleted one can be named, and dropped, by an engine that knows its tokens.
Where the engine does not know them (yet), that waits its turn behind the documents there are, which
may share blocks with it, and outlives the server.
"""

import asyncio
import logging
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from api.background.finish import finish
from api.background.ingest import Failures, prefill, to_keep
from api.background.job_queue import Lane
from api.background.store_dir import StoreDir
from api.files.document_store import Document, DocumentStore
from api.files.tokenizer_process import Parser
from api.http.errors import ApiError
from longctx.errors import ContextTooLong, EngineDied, InvalidRequest, LongctxError
from longctx.process.client import EngineClient
from longctx.request import Progress, Request, Segment
from longctx.text.chat_template import ChatPrompts

logger = logging.getLogger("longctx.api")

DocumentState = Literal["queued", "processing", "ready", "error"]
TOKEN_BYTES = 4


@dataclass(slots=True, eq=False)
class Entry:
    """A document, and what has been done about it in this process."""

    document: Document
    prefix: tuple[int, ...]  # the tokens before it, in the prompt it is computed under
    read_bytes: int = 0
    tokenized: asyncio.Event = field(default_factory=asyncio.Event)  # or failed, or removed
    progress: Progress | None = None
    ready: bool = False
    failures: Failures = field(default_factory=Failures)
    error: str | None = None
    removed: bool = False
    opened_by: int | None = None  # how often the engine had been restarted then
    differed: str | None = None  # why the last question had to compute it again

    @property
    def tokens(self) -> int:
        assert self.document.tokens is not None, "asked before it is tokenized"
        return self.document.tokens

    def reading(self) -> dict[str, Any]:
        """How far tokenization is."""
        size = self.document.bytes
        return {"file_id": self.document.id, "bytes": size, "read_bytes": self.read_bytes}


class Library:
    def __init__(
        self,
        folder: StoreDir,
        store: DocumentStore,
        parser: Parser,
        prompts: ChatPrompts,
        engine: EngineClient,
    ) -> None:
        self._folder = folder
        self._store = store
        self._parser = parser
        self._prompts = prompts
        self._engine = engine
        self._entries: dict[str, Entry] = {}
        self._deleted: dict[str, Entry] = {}  # which the tiers may still have something of
        self._tokenizing = Lane(self._tokenize, width=1)
        self._prefilling = Lane(self._prefill, width=2)

    async def open(self) -> None:
        """Takes up every known document again."""
        documents, deleted = await self._store.all(), await self._store.deleted()
        self._folder.remove_strangers(frozenset(d.id for d in (*documents, *deleted)))
        for document in documents:
            if not self._folder.text_path(document.id).exists():
                logger.warning("the text of %s is gone; forgetting it", document.id)
                await self._store.remove(document.id)
                continue
            await self._take_up(document)
        for document in deleted:
            with suppress(InvalidRequest):  # this model's template takes no documents
                self._drop_later(Entry(document=document, prefix=await self._prefix(document)))

    async def close(self) -> None:
        """Stops all work, which is taken up again next time."""
        await self._tokenizing.close()
        await self._prefilling.close()

    async def add(self, document: Document, text: Path) -> Entry:
        """Moves the uploaded text into the store. Raises InvalidRequest when the model has no
        place for a document in its chat template."""
        prefix = await self._prefix(document)
        await asyncio.to_thread(text.rename, self._folder.text_path(document.id))
        await self._store.save(document)
        return self._begin(document, prefix)

    async def remove(self, entry: Entry) -> None:
        """Forgets it; requests that wait for it get 404."""
        document_id = entry.document.id
        entry.removed = True
        entry.tokenized.set()
        del self._entries[document_id]
        await self._tokenizing.cancel(document_id)
        await self._prefilling.cancel(document_id)
        await self._store.delete(document_id)
        await asyncio.to_thread(self._folder.remove_text, document_id)
        if entry.document.tokens is None or entry.opened_by == self._engine.restarts:
            await self._drop(entry)
        else:
            self._drop_later(entry)

    def find(self, tenant: str, document_id: str, *, param: str | None = None) -> Entry:
        """Raises ApiError 404 when the tenant has no such document."""
        entry = self._entries.get(document_id)
        if entry is None or entry.document.tenant != tenant:
            raise _unknown(document_id, param)
        return entry

    def entries(self) -> Iterator[Entry]:
        """All documents of all tenants, in order of upload."""
        return iter(self._entries.values())

    def twin(self, tenant: str, sha256: str, filename: str) -> Entry | None:
        """A document of the tenant with that content and name, and no system prompt."""
        for entry in self._entries.values():
            document = entry.document
            same_content = (document.tenant, document.sha256) == (tenant, sha256)
            same_prompt = (document.filename, document.system) == (filename, None)
            if same_content and same_prompt and entry.error is None:
                return entry
        return None

    async def page(
        self,
        tenant: str,
        *,
        purpose: str | None,
        order: Literal["asc", "desc"],
        after: str | None,
        limit: int,
    ) -> list[Entry]:
        """At most `limit` documents of the tenant in order of upload, after the one named."""
        documents = await self._store.page(
            tenant, purpose=purpose, order=order, after=after, limit=limit
        )
        entries = (self._entries.get(document.id) for document in documents)
        return [entry for entry in entries if entry is not None]  # some may just be leaving

    def text_path(self, entry: Entry) -> Path:
        return self._folder.text_path(entry.document.id)

    def state(self, entry: Entry) -> DocumentState:
        document_id = entry.document.id
        if entry.error is not None:
            return "error"
        if self.is_ready(entry):
            return "ready"
        if self._tokenizing.runs(document_id) or self._prefilling.runs(document_id):
            return "processing"
        return "queued"

    def is_ready(self, entry: Entry) -> bool:
        return entry.ready and self._engine.state != "restarting"

    def prefilled_tokens(self, entry: Entry) -> int:
        """How many of its tokens the engine has computed."""
        if self.is_ready(entry):
            return entry.tokens
        if entry.progress is None or entry.ready:
            return 0
        return max(0, entry.progress.processed - len(entry.prefix))

    def durable_tokens(self, entry: Entry) -> int:
        """How many of its tokens need not be computed again after a restart."""
        return self._engine.durable_tokens.get(entry.document.id, 0)

    def kv_bytes(self, entry: Entry) -> int:
        """Device memory of what is computed, before any other document shares it."""
        return self._engine.info.kv_bytes(self.prefilled_tokens(entry))

    def eta_seconds(self, entry: Entry) -> float | None:
        """Until it is computed, at the pace so far; None while there is no pace."""
        if self.is_ready(entry):
            return 0.0
        progress = entry.progress
        if progress is None or progress.processed <= progress.cache or progress.time_ms <= 0:
            return None
        tokens_per_ms = (progress.processed - progress.cache) / progress.time_ms
        return round((progress.total - progress.processed) / tokens_per_ms / 1000, 1)

    async def wait_tokenized(self, entry: Entry, *, timeout_seconds: float) -> bool:
        """Moves the document to the head of the queue, and waits until it needs no more waiting:
        the engine knows its tokens, or it has failed or was deleted. False after the time-out."""
        self._tokenizing.hurry(entry.document.id)
        with suppress(TimeoutError):
            await asyncio.wait_for(entry.tokenized.wait(), timeout_seconds)
        return entry.tokenized.is_set()

    def check(self, entry: Entry) -> None:
        """Raises ApiError: 400 when the document has failed, 404 when it was deleted."""
        if entry.removed:
            raise _unknown(entry.document.id, "messages")
        if entry.error is not None:
            raise ApiError(
                400,
                f"file {entry.document.id} ({entry.document.filename}) cannot be asked about: "
                f"{entry.error}",
                param="messages",
                code="file_error",
            )

    async def reopen(self) -> None:
        """After the engine was restarted: it knows no document, and has computed none."""
        for entry in self._entries.values():
            if entry.error is None:
                entry.ready = False
                entry.progress = None
                entry.tokenized.clear()
                self._tokenizing.add(entry.document.id)
        for entry in list(self._deleted.values()):
            await self._tokenizing.cancel(entry.document.id)  # its place is behind all others
            self._drop_later(entry)

    async def _take_up(self, document: Document) -> None:
        tokens = self._folder.tokens_path(document.id)
        known = document.fingerprint == self._engine.info.fingerprint
        size = tokens.stat().st_size if tokens.exists() else None
        if not known or document.tokens is None or size != document.tokens * TOKEN_BYTES:
            document = replace(document, tokens=None, fingerprint=None)
        try:
            entry = self._begin(document, await self._prefix(document))
        except InvalidRequest as error:  # this model's template takes no documents
            entry = Entry(document=document, prefix=(), error=str(error))
            self._entries[document.id] = entry

    def _begin(self, document: Document, prefix: tuple[int, ...]) -> Entry:
        entry = Entry(document=document, prefix=prefix)
        self._entries[document.id] = entry
        self._tokenizing.add(document.id)
        return entry

    async def _prefix(self, document: Document) -> tuple[int, ...]:
        return await asyncio.to_thread(
            self._prompts.document_prefix,
            document.system,
            title=document.filename,
            date=document.date,
        )

    async def _tokenize(self, document_id: str) -> None:
        if (deleted := self._deleted.get(document_id)) is not None:
            await self._drop(deleted)
            return
        entry = self._entries[document_id]
        try:
            if entry.document.tokens is None:
                await self._parse(entry)
            self._check_length(entry)
            await self._open_and_prefill(entry)
        except (LongctxError, OSError) as error:
            entry.error = str(error)
        except Exception as error:  # a bug of ours must not leave anybody waiting
            logger.error("tokenizing %s failed", document_id, exc_info=error)
            entry.error = "the server failed; its log says why"
        entry.tokenized.set()

    async def _parse(self, entry: Entry) -> None:
        def note(read_bytes: int) -> None:
            entry.read_bytes = read_bytes

        tokens = await self._parser.tokenize(
            self._folder.text_path(entry.document.id),
            self._folder.tokens_path(entry.document.id),
            continues=bool(entry.prefix),
            on_progress=note,
        )
        fingerprint = self._engine.info.fingerprint
        entry.document = replace(entry.document, tokens=tokens, fingerprint=fingerprint)
        await self._store.save(entry.document)

    def _check_length(self, entry: Entry) -> None:
        limits = self._engine.info.limits
        total = len(entry.prefix) + entry.tokens
        if total >= limits.longest_tokens:
            raise ContextTooLong(
                f"with the prompt before it the document has {total} tokens, the limit is "
                f"{limits.longest_tokens} together with question and answer; split it or "
                f"{limits.cure}"
            )

    async def _open_and_prefill(self, entry: Entry) -> None:
        with suppress(EngineDied):  # `reopen` comes when it is back
            await self._open(entry)
            self._prefilling.add(entry.document.id)

    async def _open(self, entry: Entry) -> None:
        tokens = self._folder.tokens_path(entry.document.id)
        opened_by = self._engine.restarts
        await self._engine.open_document(entry.document.id, tokens, keep=_to_keep(entry))
        entry.opened_by = opened_by

    def _drop_later(self, entry: Entry) -> None:
        self._deleted[entry.document.id] = entry
        self._tokenizing.add(entry.document.id)

    async def _drop(self, entry: Entry) -> None:
        """Drops what is left of a deleted document; once begun, this ends before a shutdown does.

        The engine must know the document to find its blocks.
        """
        await finish(self._drop_to_the_end(entry))

    async def _drop_to_the_end(self, entry: Entry) -> None:
        document_id = entry.document.id
        try:
            if entry.document.fingerprint == self._engine.info.fingerprint:
                if entry.opened_by != self._engine.restarts:
                    await self._open(entry)
                await self._engine.close_document(document_id)
        except EngineDied:  # `reopen` comes when it is back
            self._deleted[document_id] = entry
            return
        except LongctxError as error:
            logger.warning("what is stored of %s stays until it expires: %s", document_id, error)
        await self._store.remove(document_id)
        await asyncio.to_thread(self._folder.remove_document, document_id)
        self._deleted.pop(document_id, None)

    async def _prefill(self, document_id: str) -> None:
        entry = self._entries[document_id]
        if entry.error is not None:  # since it was queued
            return

        def note(progress: Progress) -> None:
            entry.progress = progress

        try:
            computed = await prefill(
                self._engine,
                _to_keep(entry),
                failures=entry.failures,
                on_progress=note,
            )
            if computed:
                entry.ready = True
                entry.failures.count = 0
        except LongctxError as error:
            entry.error = str(error)


def _to_keep(entry: Entry) -> Request:
    document = Segment(document_id=entry.document.id)
    before = (Segment(token_ids=entry.prefix),) if entry.prefix else ()
    name = f"ingest-{entry.document.id}"
    return to_keep(name, (*before, document), salt=entry.document.tenant)


def _unknown(document_id: str, param: str | None) -> ApiError:
    return ApiError(
        404,
        f"there is no file {document_id!r}; GET /v1/files lists those there are",
        param=param,
        code="file_not_found",
    )
