"""Stores what is known about each uploaded file in SQLite, so that it outlives the process.

Only what cannot be had again is here; `Document` has how far one has come in this process.
"""

import sqlite3
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Literal

from api.background.database import Database

SCHEMA_VERSION = 2  # 1 had no expires_at
FILE_PREFIX = "file-"  # of the ids of files, and of nothing else that has an id
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
    fingerprint TEXT,
    expires_at INTEGER
) STRICT;
CREATE INDEX IF NOT EXISTS documents_of_tenant ON documents (tenant, number);
CREATE TABLE IF NOT EXISTS deleted (id TEXT PRIMARY KEY) STRICT;
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class DocumentRecord:
    """Holds what is stored of one file. `date` is the template's today, frozen at upload. `tokens`
    counts the file's tokens for the model and tokenizer whose `fingerprint` is beside it."""

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
    expires_at: int | None = None  # None: kept until it is deleted


COLUMNS = ", ".join(field.name for field in fields(DocumentRecord))
DELETED = "SELECT id FROM deleted"
MARKS = ", ".join("?" for _ in fields(DocumentRecord))


def _document(row: tuple[object, ...]) -> DocumentRecord:
    return DocumentRecord(**dict(zip(COLUMNS.split(", "), row, strict=True)))  # type: ignore[arg-type]


class DocumentStore:
    """The table of documents, and that of deletions that have not ended.

    `open` comes first, `close` last; all methods are called on the event loop.
    """

    def __init__(self, path: Path) -> None:
        self._database = Database(path, tables=SCHEMA, version=SCHEMA_VERSION)

    async def open(self) -> None:
        """Opens the file, or makes it. Raises LongctxError when it is no database of ours."""
        await self._database.open()
        await self._database.run(_add_missing_column)

    async def close(self) -> None:
        await self._database.close()

    async def save(self, document: DocumentRecord) -> None:
        """Adds it, or replaces what was known; durable when this returns."""
        updates = ", ".join(f"{name} = excluded.{name}" for name in COLUMNS.split(", "))
        await self._database.run(
            lambda connection: connection.execute(
                f"INSERT INTO documents ({COLUMNS}) VALUES ({MARKS}) "
                f"ON CONFLICT (id) DO UPDATE SET {updates}",
                astuple(document),
            )
        )

    async def delete(self, document_id: str) -> None:
        """Moves it from `all` and `page` to `deleted`; durable when this returns."""
        await self._database.run(
            lambda connection: connection.execute(
                "INSERT OR IGNORE INTO deleted (id) VALUES (?)", (document_id,)
            )
        )

    async def remove(self, document_id: str) -> None:
        """Forgets all that is known about it, its deletion too."""

        def remove(connection: sqlite3.Connection) -> None:
            for table in ("documents", "deleted"):
                connection.execute(f"DELETE FROM {table} WHERE id = ?", (document_id,))

        await self._database.erase(remove)

    async def all(self) -> list[DocumentRecord]:
        """Returns the records that were not deleted, oldest first."""
        clause = f"WHERE id NOT IN ({DELETED}) ORDER BY number"
        return await self._database.run(lambda connection: _select(connection, clause))

    async def deleted(self) -> list[DocumentRecord]:
        """Returns the deleted ones, of which something may still be stored elsewhere."""
        clause = f"WHERE id IN ({DELETED}) ORDER BY number"
        return await self._database.run(lambda connection: _select(connection, clause))

    async def page(
        self,
        tenant: str,
        *,
        purpose: str | None,
        order: Literal["asc", "desc"],
        after: str | None,
        limit: int,
    ) -> list[DocumentRecord]:
        """Returns at most `limit` records of the tenant that come after the one with id `after`."""
        conditions, values = ["tenant = ?", f"id NOT IN ({DELETED})"], [tenant]
        if purpose is not None:
            conditions.append("purpose = ?")
            values.append(purpose)
        if after is not None:
            beyond = ">" if order == "asc" else "<"
            conditions.append(f"number {beyond} (SELECT number FROM documents WHERE id = ?)")
            values.append(after)
        clause = f"WHERE {' AND '.join(conditions)} ORDER BY number {order} LIMIT {limit}"
        return await self._database.run(lambda connection: _select(connection, clause, *values))


def _add_missing_column(connection: sqlite3.Connection) -> None:
    columns = [row[1] for row in connection.execute("PRAGMA table_info(documents)")]
    if "expires_at" not in columns:
        connection.execute("ALTER TABLE documents ADD COLUMN expires_at INTEGER")


def _select(connection: sqlite3.Connection, clause: str, *values: str) -> list[DocumentRecord]:
    rows = connection.execute(f"SELECT {COLUMNS} FROM documents {clause}", values)
    return [_document(row) for row in rows]
