"""A document in this process: its record, and how far it has come since the server started."""

import asyncio
from dataclasses import dataclass, field
from typing import Any, Literal

from api.background.ingest import Failures
from api.files.document_store import DocumentRecord
from api.files.reading import Reading
from longctx.request import Progress

DocumentState = Literal["queued", "processing", "ready", "error"]


@dataclass(slots=True, eq=False)
class Document:
    """Holds the state of one uploaded file. Only code on the event loop may read or change it.

    `DocumentJobs` sets what the jobs find out, `DocumentLibrary` sets `removed`.
    """

    record: DocumentRecord
    prefix: tuple[int, ...]  # the tokens before it, in the prompt it is computed under
    reading: Reading | None = None  # how it was read, where it is no UTF-8 text
    read_bytes: int = 0  # of the file, by the tokenizer
    # Set when nobody needs to wait any longer: the engine knows its tokens, or it has failed or
    # was removed.
    tokenized: asyncio.Event = field(default_factory=asyncio.Event)
    progress: Progress | None = None  # of the ingestion
    computed: bool = False  # by the engine that runs now
    failures: Failures = field(default_factory=Failures)
    error: str | None = None
    removed: bool = False
    opened_by: int | None = None  # how often the engine had been restarted then
    prefix_difference: str | None = None  # why the last question had to compute it again

    @property
    def id(self) -> str:
        return self.record.id

    @property
    def tokens(self) -> int:
        assert self.record.tokens is not None, "asked before it is tokenized"
        return self.record.tokens

    def tokenizing_progress(self) -> dict[str, Any]:
        """Returns what a stream tells while it waits for the document."""
        return {"file_id": self.id, "bytes": self.record.bytes, "read_bytes": self.read_bytes}
