"""Stores schemas, named prompts, cached contents and retained prompts in SQLite, so that they
outlive the process.

Each tenant has names of its own. `schema_library.py`, `prompt_library.py`, `cached_contents.py` and
`retention.py` know how far each is computed in this process.
"""

import json
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from api.background.database import Database, transaction
from api.http.tool_bodies import ToolDefinition
from longctx.text.chat_template import FilePart, Message
from longctx.text.tool_calls import ToolCall
from longctx.text.tool_forms import Tool
from prompt_cache.schema import Schema
from prompt_cache.schema_json import read_json, schema_object

VERSION = 2
TABLES = """
CREATE TABLE IF NOT EXISTS schemas (
    tenant TEXT NOT NULL,
    name TEXT NOT NULL,
    created_at INTEGER NOT NULL,
    date TEXT NOT NULL,
    source TEXT NOT NULL,
    PRIMARY KEY (tenant, name)
) STRICT;
CREATE TABLE IF NOT EXISTS prompts (
    tenant TEXT NOT NULL,
    name TEXT NOT NULL,
    created_at INTEGER NOT NULL,
    expires_at INTEGER,
    date TEXT NOT NULL,
    system TEXT,
    files TEXT NOT NULL,
    PRIMARY KEY (tenant, name)
) STRICT;
CREATE TABLE IF NOT EXISTS retained (
    id TEXT PRIMARY KEY,
    tenant TEXT NOT NULL,
    expires_at INTEGER NOT NULL,
    token_ids BLOB NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS retained_files (
    id TEXT NOT NULL,
    file_id TEXT NOT NULL,
    PRIMARY KEY (id, file_id)
) STRICT;
CREATE TABLE IF NOT EXISTS cached_contents (
    tenant TEXT NOT NULL,
    name TEXT NOT NULL,
    created_at REAL NOT NULL,
    updated_at REAL NOT NULL,
    expires_at REAL NOT NULL,
    body TEXT NOT NULL,
    PRIMARY KEY (tenant, name)
) STRICT;
CREATE TABLE IF NOT EXISTS kept (id TEXT PRIMARY KEY) STRICT;
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class SchemaRecord:
    """Holds a schema. `date` is the chat template's today, frozen when it was stored."""

    tenant: str
    name: str
    created_at: int
    date: str
    schema: Schema


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptRecord:
    """Holds a system text, then files, in the order in which a conversation begins with them."""

    tenant: str
    name: str
    created_at: int
    expires_at: int | None  # None: kept until it is deleted
    date: str
    system: str | None
    file_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedRecord:
    """Holds what conversations can begin with: messages, and the fields of a chat beside them.

    `fields` are `tools` and `tool_choice`, as a chat's body has them. `owned_file_ids` are those
    files that came inside the contents.
    """

    tenant: str
    name: str
    created_at: float
    updated_at: float
    expires_at: float
    model: str
    display_name: str | None
    date: str
    messages: tuple[Message, ...]
    fields: dict[str, Any]
    file_ids: tuple[str, ...]
    owned_file_ids: tuple[str, ...]
    tokens: int = 0

    @property
    def offered(self) -> list[Tool]:
        """The tools that the model is told of."""
        if self.fields.get("tool_choice") == "none":
            return []
        return [ToolDefinition.model_validate(each).tool for each in self.fields.get("tools", ())]


@dataclass(frozen=True, slots=True, kw_only=True)
class RetainedRecord:
    """Holds a prompt that is to be retained. `token_ids` are little-endian int32."""

    id: str
    tenant: str
    expires_at: int
    token_ids: bytes
    file_ids: tuple[str, ...]  # whose text is among them


class PromptRecords:
    """The tables of schemas, named prompts, cached contents and retained prompts.

    `open` comes first, `close` last; all methods are called on the event loop.
    """

    def __init__(self, path: Path) -> None:
        self._database = Database(path, tables=TABLES, version=VERSION)

    async def open(self) -> None:
        """Opens the file, or makes it. Raises LongctxError when it is no database of ours."""
        await self._database.open()

    async def close(self) -> None:
        await self._database.close()

    async def save_schema(self, record: SchemaRecord) -> None:
        """Stores it in the place of one of the same name; durable when this returns."""
        source = json.dumps(schema_object(record.schema))
        await self._erase(
            "INSERT OR REPLACE INTO schemas VALUES (?, ?, ?, ?, ?)",
            (record.tenant, record.name, record.created_at, record.date, source),
        )

    async def remove_schema(self, tenant: str, name: str) -> None:
        await self._erase("DELETE FROM schemas WHERE tenant = ? AND name = ?", (tenant, name))

    async def schemas(self) -> list[SchemaRecord]:
        """Returns all schemas, oldest first."""
        rows = await self._select(
            "SELECT tenant, name, created_at, date, source FROM schemas ORDER BY created_at, rowid"
        )
        return [
            SchemaRecord(
                tenant=tenant, name=name, created_at=created, date=date, schema=read_json(source)
            )
            for tenant, name, created, date, source in rows
        ]

    async def save_prompt(self, record: PromptRecord) -> None:
        """Stores it in the place of one of the same name; durable when this returns."""
        await self._erase(
            "INSERT OR REPLACE INTO prompts VALUES (?, ?, ?, ?, ?, ?, ?)",
            (
                record.tenant,
                record.name,
                record.created_at,
                record.expires_at,
                record.date,
                record.system,
                json.dumps(record.file_ids),
            ),
        )

    async def remove_prompt(self, tenant: str, name: str) -> None:
        await self._erase("DELETE FROM prompts WHERE tenant = ? AND name = ?", (tenant, name))

    async def prompts(self) -> list[PromptRecord]:
        """Returns all named prompts, oldest first."""
        rows = await self._select(
            "SELECT tenant, name, created_at, expires_at, date, system, files FROM prompts "
            "ORDER BY created_at, rowid"
        )
        return [
            PromptRecord(
                tenant=tenant,
                name=name,
                created_at=created,
                expires_at=expires,
                date=date,
                system=system,
                file_ids=tuple(json.loads(files)),
            )
            for tenant, name, created, expires, date, system, files in rows
        ]

    async def save_cached(self, record: CachedRecord) -> None:
        """Stores it in the place of one of the same name; durable when this returns."""
        body = {
            "model": record.model,
            "display_name": record.display_name,
            "date": record.date,
            "messages": [_written(message) for message in record.messages],
            "fields": record.fields,
            "file_ids": record.file_ids,
            "owned_file_ids": record.owned_file_ids,
            "tokens": record.tokens,
        }
        await self._erase(
            "INSERT OR REPLACE INTO cached_contents VALUES (?, ?, ?, ?, ?, ?)",
            (
                record.tenant,
                record.name,
                record.created_at,
                record.updated_at,
                record.expires_at,
                json.dumps(body),
            ),
        )

    async def remove_cached(self, tenant: str, name: str) -> None:
        await self._erase(
            "DELETE FROM cached_contents WHERE tenant = ? AND name = ?", (tenant, name)
        )

    async def cached_contents(self) -> list[CachedRecord]:
        """Returns all cached contents, oldest first."""
        rows = await self._select(
            "SELECT tenant, name, created_at, updated_at, expires_at, body FROM cached_contents "
            "ORDER BY created_at, rowid"
        )
        found = []
        for tenant, name, created, updated, expires, source in rows:
            body = json.loads(source)
            found.append(
                CachedRecord(
                    tenant=tenant,
                    name=name,
                    created_at=created,
                    updated_at=updated,
                    expires_at=expires,
                    model=body["model"],
                    display_name=body["display_name"],
                    date=body["date"],
                    messages=tuple(_read(message) for message in body["messages"]),
                    fields=body["fields"],
                    file_ids=tuple(body["file_ids"]),
                    owned_file_ids=tuple(body["owned_file_ids"]),
                    tokens=body["tokens"],
                )
            )
        return found

    async def save_retained(self, record: RetainedRecord) -> None:
        """Stores it in the place of what was known of it; durable when this returns."""
        files = [(record.id, file_id) for file_id in record.file_ids]

        def save(connection: sqlite3.Connection) -> None:
            with transaction(connection):
                connection.executemany("INSERT OR REPLACE INTO retained_files VALUES (?, ?)", files)
                connection.execute(
                    "INSERT OR REPLACE INTO retained VALUES (?, ?, ?, ?)",
                    (record.id, record.tenant, record.expires_at, record.token_ids),
                )

        await self._database.run(save)

    async def remove_retained(self, name: str) -> None:
        def remove(connection: sqlite3.Connection) -> None:
            with transaction(connection):
                connection.execute("DELETE FROM retained WHERE id = ?", (name,))
                connection.execute("DELETE FROM retained_files WHERE id = ?", (name,))

        await self._database.erase(remove)

    async def retained(self) -> list[RetainedRecord]:
        rows = await self._select("SELECT id, tenant, expires_at, token_ids FROM retained")
        files: dict[str, list[str]] = {}
        for name, file_id in await self._select("SELECT id, file_id FROM retained_files"):
            files.setdefault(name, []).append(file_id)
        return [
            RetainedRecord(
                id=name,
                tenant=tenant,
                expires_at=expires,
                token_ids=token_ids,
                file_ids=tuple(files.get(name, ())),
            )
            for name, tenant, expires, token_ids in rows
        ]

    async def note_kept(self, name: str) -> None:
        """Notes that the tiers may have something of these modules; durable when this returns."""
        await self._execute("INSERT OR IGNORE INTO kept (id) VALUES (?)", (name,))

    async def forget_kept(self, name: str) -> None:
        await self._execute("DELETE FROM kept WHERE id = ?", (name,))

    async def kept(self) -> list[str]:
        """Returns the ids of all modules of which the tiers may have something."""
        return [name for (name,) in await self._select("SELECT id FROM kept")]

    async def _execute(self, statement: str, values: tuple[object, ...]) -> None:
        await self._database.run(lambda connection: connection.execute(statement, values).close())

    async def _erase(self, statement: str, values: tuple[object, ...]) -> None:
        await self._database.erase(lambda connection: connection.execute(statement, values).close())

    async def _select(self, statement: str) -> list[tuple[Any, ...]]:
        return await self._database.run(lambda connection: connection.execute(statement).fetchall())


def _written(message: Message) -> dict[str, Any]:
    content: list[str | list[str]] = []
    for part in message.content:
        if isinstance(part, str):
            content.append(part)
        else:
            assert isinstance(part, FilePart), "a cached content has no gaps"
            content.append([part.document_id, part.title])
    calls = [[call.name, call.arguments, call.id] for call in message.tool_calls]
    answered = message.tool_call_id
    return {"role": message.role, "content": content, "calls": calls, "answered": answered}


def _read(written: dict[str, Any]) -> Message:
    content = tuple(
        part if isinstance(part, str) else FilePart(*part) for part in written["content"]
    )
    calls = tuple(ToolCall(*call) for call in written["calls"])
    return Message(written["role"], content, calls, written["answered"])
