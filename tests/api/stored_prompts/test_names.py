"""Stores, replacements and deletions of one name at the same time leave memory and database alike.

The engine is replaced by one that takes its time with long text and refuses what is longer.
"""

import asyncio
import sqlite3
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from api.completions.preamble import SchemaPreamble
from api.http.errors import ApiError
from api.stored_prompts.module_keeper import ModuleKeeper
from api.stored_prompts.records import PromptRecords
from api.stored_prompts.schema_library import SchemaLibrary
from longctx.errors import ContextTooLong, InvalidRequest
from longctx.process.client import Closing
from longctx.request import Erasure, FinishReason, Piece, Request, RequestOutput
from prompt_cache.level import EXACT
from prompt_cache.read import read_schema
from prompt_cache.schema import Schema
from tests.support.waiting import eventually

LONG, TOO_LONG = 100, 400


class SlowEngine:
    state = "ready"
    restarts = 0
    info = SimpleNamespace(limits=SimpleNamespace(longest_tokens=10_000))

    def __init__(self) -> None:
        self.open: set[str] = set()

    async def open_module(
        self,
        module_id: str,
        pieces: tuple[Piece, ...],
        *,
        keep: Request,
        sources: tuple[str, ...] = (),
    ) -> None:
        tokens = len(pieces[0].token_ids)
        await asyncio.sleep(0.05 if tokens > LONG else 0)
        if tokens > TOO_LONG:
            raise ContextTooLong("it is larger than the device")
        self.open.add(module_id)

    async def close_module(self, module_id: str) -> Closing:
        self.open.discard(module_id)
        end: asyncio.Future[Erasure | None] = asyncio.get_running_loop().create_future()
        end.set_result(Erasure())
        return Closing(Erasure(), end)

    async def generate(self, request: Request) -> AsyncGenerator[RequestOutput, None]:
        yield RequestOutput(
            request_id=request.request_id, finish_reason=FinishReason.LENGTH, finished=True
        )


class Shelf:
    """A library of schemas, and what it is made of."""

    def __init__(self, path: Path) -> None:
        self.records = PromptRecords(path)
        self.engine: Any = SlowEngine()
        self.keeper = ModuleKeeper(self.engine, self.records)
        tokenizer: Any = SimpleNamespace(encode=lambda text, continues: list(range(len(text))))
        prompts: Any = SimpleNamespace(
            frames=lambda roles, continued, date: ((),) * (len(roles) + continued)
        )
        self.library = SchemaLibrary(self.records, tokenizer, prompts, self.engine, self.keeper)

    async def check(self, *expected: Schema) -> None:
        """Whether that is what everyone knows."""
        known = [entry.record.schema for entry in self.library.of_tenant("")]
        stored = [record.schema for record in await self.records.schemas()]
        assert known == stored == list(expected)
        await eventually(lambda: len(self.engine.open) == len(expected))


def schema(text: str) -> Schema:
    return read_schema(f'{{"name": "x", "content": [{{"module": "m", "content": "{text}"}}]}}')


def run(tmp_path: Path, steps: Callable[[Shelf], Awaitable[None]]) -> None:
    async def all_of_it() -> None:
        shelf = Shelf(tmp_path / "prompts.sqlite")
        await shelf.records.open()
        await steps(shelf)
        await shelf.keeper.close()
        await shelf.records.close()

    asyncio.run(all_of_it())


async def begin(shelf: Shelf, text: str) -> "asyncio.Task[object]":
    task = asyncio.create_task(shelf.library.add("", schema(text)))
    await asyncio.sleep(0.02)
    return task


def test_what_is_deleted_while_it_is_stored_is_gone(tmp_path: Path) -> None:
    async def steps(shelf: Shelf) -> None:
        storing = await begin(shelf, "a" * 200)
        await shelf.library.remove("", "x")
        await storing
        await shelf.check()

    run(tmp_path, steps)


def test_of_two_stored_at_once_the_later_one_stays(tmp_path: Path) -> None:
    async def steps(shelf: Shelf) -> None:
        first = await begin(shelf, "a" * 200)
        await asyncio.gather(first, await begin(shelf, "b"))
        await shelf.check(schema("b"))

    run(tmp_path, steps)


def test_what_was_there_stays_where_all_that_would_replace_it_is_refused(tmp_path: Path) -> None:
    async def steps(shelf: Shelf) -> None:
        await shelf.library.add("", schema("old"))
        tasks = [await begin(shelf, letter * 500) for letter in "cd"]
        for refused in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(refused, InvalidRequest)
        await shelf.check(schema("old"))

    run(tmp_path, steps)


def test_what_was_there_stays_where_its_replacement_cannot_be_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_record: object) -> None:
        await asyncio.sleep(0.02)  # it is computed meanwhile
        raise sqlite3.OperationalError("database or disk is full")

    async def steps(shelf: Shelf) -> None:
        await shelf.library.add("", schema("old"))
        with monkeypatch.context() as broken:
            broken.setattr(shelf.records, "save_schema", fail)
            with pytest.raises(sqlite3.OperationalError):
                await shelf.library.add("", schema("new"))
        await shelf.check(schema("old"))
        with monkeypatch.context() as broken:
            broken.setattr(shelf.records, "remove_schema", fail)
            with pytest.raises(sqlite3.OperationalError):
                await shelf.library.remove("", "x")
        await shelf.check(schema("old"))
        await shelf.library.add("", schema("new"))
        await shelf.check(schema("new"))

    run(tmp_path, steps)


def test_a_schema_that_is_deleted_while_it_is_waited_for_is_not_found(tmp_path: Path) -> None:
    async def steps(shelf: Shelf) -> None:
        entry = await shelf.library.add("", schema("a"))
        preamble = SchemaPreamble(shelf.library, entry, ("m",), {}, EXACT, "")
        await shelf.library.remove("", "x")
        with pytest.raises(ApiError, match="there is no schema 'x'") as refused:
            await preamble.split(())
        assert refused.value.status == 404

    run(tmp_path, steps)
