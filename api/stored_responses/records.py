"""Stores responses in SQLite, so that they outlive the process.

Each has its own input and output only, and the id of the one it goes on from: what is deleted is in
no other. All that go on from each other share a thread, by whose name the engine knows what was
computed for them.
"""

import sqlite3
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from api.background.database import Database, transaction

VERSION = 1
TABLES = """
CREATE TABLE IF NOT EXISTS responses (
    number INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    tenant TEXT NOT NULL,
    created_at INTEGER NOT NULL,
    previous TEXT,
    thread TEXT NOT NULL,
    response TEXT NOT NULL,
    input TEXT NOT NULL
) STRICT;
CREATE INDEX IF NOT EXISTS responses_of_tenant ON responses (tenant, number);
CREATE INDEX IF NOT EXISTS responses_of_thread ON responses (thread);
CREATE INDEX IF NOT EXISTS responses_by_age ON responses (created_at);
CREATE TABLE IF NOT EXISTS leaving (thread TEXT PRIMARY KEY) STRICT;
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseRecord:
    """Holds one response. `response` is its object and `input` its own input items, as JSON."""

    id: str
    tenant: str
    created_at: int
    previous: str | None
    thread: str
    response: str
    input: str


NAMES = tuple(field.name for field in fields(ResponseRecord))
COLUMNS = ", ".join(NAMES)
MARKS = ", ".join("?" for _ in NAMES)
SIZE = "length(CAST(response AS BLOB)) + length(CAST(input AS BLOB))"


class ResponseRecords:
    """The tables of responses, and of threads of which the tiers may still have something.

    `open` comes first, `close` last; all methods are called on the event loop.
    """

    def __init__(self, path: Path) -> None:
        self._database = Database(path, tables=TABLES, version=VERSION)

    async def open(self) -> None:
        """Opens the file, or makes it. Raises LongctxError when it is no database of ours."""
        await self._database.open()

    async def close(self) -> None:
        await self._database.close()

    async def save(self, record: ResponseRecord, *, most: int, most_bytes: int) -> None:
        """Stores it; durable when this returns. Of the tenant's the oldest give way that are more
        than `most`, or have more than `most_bytes` together; the new one stays."""

        def save(connection: sqlite3.Connection) -> bool:
            with transaction(connection):
                connection.execute(
                    f"INSERT INTO responses ({COLUMNS}) VALUES ({MARKS})", astuple(record)
                )
                rows = connection.execute(
                    f"SELECT number, {SIZE} FROM responses WHERE tenant = ? ORDER BY number DESC",
                    (record.tenant,),
                )
                num_bytes = 0
                for kept, (number, size) in enumerate(rows.fetchall()):
                    num_bytes += size
                    if kept and (kept >= most or num_bytes > most_bytes):
                        connection.execute(
                            "DELETE FROM responses WHERE tenant = ? AND number <= ?",
                            (record.tenant, number),
                        )
                        return True
            return False

        if await self._database.run(save):
            await self._database.erase(lambda connection: None)

    async def find(self, tenant: str, name: str) -> ResponseRecord | None:
        return await self._database.run(lambda connection: _find(connection, tenant, name))

    async def chain(self, tenant: str, name: str) -> tuple[list[ResponseRecord], str | None]:
        """Returns the response and those it goes on from, the first one first; and the id of one
        that is not there any more, which ends the list."""

        def chain(connection: sqlite3.Connection) -> tuple[list[ResponseRecord], str | None]:
            found: list[ResponseRecord] = []
            wanted: str | None = name
            while wanted is not None:
                record = _find(connection, tenant, wanted)
                if record is None:
                    return found[::-1], wanted
                found.append(record)
                wanted = record.previous
            return found[::-1], None

        return await self._database.run(chain)

    async def remove(self, record: ResponseRecord, *, new_thread: str) -> None:
        """Deletes it, and notes that its thread leaves; those that stay get another thread."""

        def remove(connection: sqlite3.Connection) -> None:
            with transaction(connection):
                connection.execute("DELETE FROM responses WHERE id = ?", (record.id,))
                connection.execute(
                    "UPDATE responses SET thread = ? WHERE thread = ?", (new_thread, record.thread)
                )
                connection.execute("INSERT OR IGNORE INTO leaving VALUES (?)", (record.thread,))

        await self._database.erase(remove)

    async def remove_until(self, created_at: int) -> None:
        """Deletes those that are as old, or older."""
        await self._database.erase(
            lambda connection: connection.execute(
                "DELETE FROM responses WHERE created_at <= ?", (created_at,)
            ).close()
        )

    async def oldest(self) -> int | None:
        """Returns when the oldest one was made."""

        def oldest(connection: sqlite3.Connection) -> int | None:
            (found,) = connection.execute("SELECT min(created_at) FROM responses").fetchone()
            assert found is None or isinstance(found, int)
            return found

        return await self._database.run(oldest)

    async def leaving(self) -> list[str]:
        """Returns the threads of which the tiers may still have something."""
        return await self._database.run(
            lambda connection: [
                name for (name,) in connection.execute("SELECT thread FROM leaving")
            ]
        )

    async def forget_leaving(self, thread: str) -> None:
        await self._database.run(
            lambda connection: connection.execute(
                "DELETE FROM leaving WHERE thread = ?", (thread,)
            ).close()
        )


def _find(connection: sqlite3.Connection, tenant: str, name: str) -> ResponseRecord | None:
    row = connection.execute(
        f"SELECT {COLUMNS} FROM responses WHERE tenant = ? AND id = ?", (tenant, name)
    ).fetchone()
    return None if row is None else ResponseRecord(**dict(zip(NAMES, row, strict=True)))
