"""Opens an SQLite file of ours and runs work on it.

One thread does all the work, so the event loop never waits for a disk and nothing needs a lock.
"""

import asyncio
import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from longctx.errors import LongctxError

Result = TypeVar("Result")


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """Makes what is executed in it one transaction: all of it is stored, or nothing."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")


class Database:
    """Runs work on one database file. `open` comes first, `close` last, all on the event loop."""

    def __init__(self, path: Path, *, tables: str, version: int) -> None:
        """`tables` is SQL that creates missing tables; `version` grows with their format."""
        self._path = path
        self._tables = tables
        self._version = version
        self._thread = ThreadPoolExecutor(1, path.stem)
        self._connection: sqlite3.Connection | None = None

    async def open(self) -> None:
        """Opens the file, or makes it. Raises LongctxError when it is no database of ours."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._open)

    async def close(self) -> None:
        if self._connection is not None:
            await self.run(lambda connection: connection.close())
        self._thread.shutdown()

    async def run(self, work: Callable[[sqlite3.Connection], Result]) -> Result:
        """Calls `work` on the database's thread; what it writes is durable when this returns."""
        connection = self._connection
        assert connection is not None, "not open"
        return await asyncio.get_running_loop().run_in_executor(
            self._thread, lambda: work(connection)
        )

    async def erase(self, work: Callable[[sqlite3.Connection], Result]) -> Result:
        """Calls `work` as `run` does; what it deletes is in no file any more when this returns."""

        def erase(connection: sqlite3.Connection) -> Result:
            result = work(connection)
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").close()
            return result

        return await self.run(erase)

    def _open(self) -> None:
        try:
            self._connection = connection = sqlite3.connect(self._path, isolation_level=None)
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version > self._version:
                raise LongctxError(
                    f"{self._path} was written by a newer longctx (format {version}, known "
                    f"{self._version}); use that one or another --store-dir"
                )
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA secure_delete = ON")  # what is deleted is overwritten
            connection.executescript(self._tables)
            connection.execute(f"PRAGMA user_version = {self._version}")
        except sqlite3.Error as error:
            raise LongctxError(
                f"{self._path} cannot be read: {error}; move it away to start without it"
            ) from error
