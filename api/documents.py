"""What is known about each uploaded file, in SQLite, so that it outlives the process.

Only what cannot be had again stands here; how far a document has come in this process is the
`Library`'s (`library.py`). One thread does all the work, so the event loop never waits for a disk
and nothing needs a lock.
"""

import asyncio
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Literal, TypeVar

from longctx.errors import LongctxError

Result = TypeVar("Result")

SCHEMA_VERSION = 1
SCHEMA = """
CREATE TABLE IF NOT EXISTS documents (
    number INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    tenant TEXT NOT NULL,
    filename TEXT NOT NULL,
    purpose TEXT NOT NULL,
    bytes INTEGER NOT NULL,
    created_at INTEGER NOT NULL,
    sha256 TEXT NOT NULL,
    system TEXT,
    date TEXT NOT NULL,
    tokens INTEGER,
    fingerprint TEXT
) STRICT;
CREATE INDEX IF NOT EXISTS documents_of_tenant ON documents (tenant, number);
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """`date` is the template's today, frozen at upload. `tokens` is the count for the model whose
    `fingerprint` stands beside it."""

    id: str
    tenant: str
    filename: str
    purpose: str
    bytes: int
    created_at: int
    sha256: str
    system: str | None
    date: str
    tokens: int | None = None
    fingerprint: str | None = None


COLUMNS = ", ".join(field.name for field in fields(Document))
MARKS = ", ".join("?" for _ in fields(Document))


def _document(row: tuple[object, ...]) -> Document:
    return Document(**dict(zip(COLUMNS.split(", "), row, strict=True)))  # type: ignore[arg-type]


class DocumentStore:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._thread = ThreadPoolExecutor(1, "documents")
        self._connection: sqlite3.Connection | None = None

    async def open(self) -> None:
        """Raises LongctxError when the file is no database of ours."""
        await self._run(self._open)

    async def close(self) -> None:
        if self._connection is not None:
            await self._run(self._connection.close)
        self._thread.shutdown()

    async def save(self, document: Document) -> None:
        """Adds it, or replaces what was known; durable when this returns."""
        updates = ", ".join(f"{name} = excluded.{name}" for name in COLUMNS.split(", "))
        await self._run(
            lambda: self._database.execute(
                f"INSERT INTO documents ({COLUMNS}) VALUES ({MARKS}) "
                f"ON CONFLICT (id) DO UPDATE SET {updates}",
                astuple(document),
            )
        )

    async def remove(self, document_id: str) -> None:
        await self._run(
            lambda: self._database.execute("DELETE FROM documents WHERE id = ?", (document_id,))
        )

    async def all(self) -> list[Document]:
        """Oldest first."""
        return await self._run(lambda: self._select("ORDER BY number"))

    async def page(
        self,
        tenant: str,
        *,
        purpose: str | None,
        order: Literal["asc", "desc"],
        after: str | None,
        limit: int,
    ) -> list[Document]:
        """At most `limit` documents of the tenant that come after the one with id `after`."""
        conditions, values = ["tenant = ?"], [tenant]
        if purpose is not None:
            conditions.append("purpose = ?")
            values.append(purpose)
        if after is not None:
            beyond = ">" if order == "asc" else "<"
            conditions.append(f"number {beyond} (SELECT number FROM documents WHERE id = ?)")
            values.append(after)
        clause = f"WHERE {' AND '.join(conditions)} ORDER BY number {order} LIMIT {limit}"
        return await self._run(lambda: self._select(clause, *values))

    @property
    def _database(self) -> sqlite3.Connection:
        assert self._connection is not None, "not open"
        return self._connection

    def _select(self, clause: str, *values: str) -> list[Document]:
        rows = self._database.execute(f"SELECT {COLUMNS} FROM documents {clause}", values)
        return [_document(row) for row in rows]

    def _open(self) -> None:
        try:
            self._connection = sqlite3.connect(self._path, isolation_level=None)
            (version,) = self._database.execute("PRAGMA user_version").fetchone()
            if version > SCHEMA_VERSION:
                raise LongctxError(
                    f"{self._path} was written by a newer longctx (format {version}, known "
                    f"{SCHEMA_VERSION}); use that one or another --store-dir"
                )
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = FULL")
            self._database.executescript(SCHEMA)
            self._database.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        except sqlite3.Error as error:
            raise LongctxError(
                f"{self._path} cannot be read: {error}; move it away to start without files"
            ) from error

    async def _run(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)
