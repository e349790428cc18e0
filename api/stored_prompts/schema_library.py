"""The schemas of this process: laid out in the model's tokens, and their modules modules computed.

What a tenant stored is taken up again at every start. With another model its text has other tokens,
so the layout is made anew; where it no longer fits, the schema stays, with the reason.
"""

import asyncio
import datetime
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from api.background.name_locks import NameLocks
from api.http.errors import ApiError
from api.stored_prompts.module_keeper import ModuleKeeper, Modules, StoredModules
from api.stored_prompts.records import PromptRecords, SchemaRecord
from longctx.errors import InvalidRequest, LongctxError
from longctx.process.client import EngineClient
from longctx.request import Piece, Segment
from longctx.text.chat_template import ChatPrompts, Message, Placeholder
from longctx.text.tokenizer import Tokenizer
from prompt_cache.assembly import AssembledPrompt, ReusedPiece, assemble
from prompt_cache.errors import SchemaError
from prompt_cache.layout import SchemaLayout, lay_out
from prompt_cache.level import Level
from prompt_cache.schema import Schema


@dataclass(slots=True, eq=False)
class StoredSchema:
    """The rest is there unless the schema does not suit the model: then `error` says why."""

    record: SchemaRecord
    layout: SchemaLayout | None = None
    frames: tuple[tuple[int, ...], ...] = ()
    modules: StoredModules | None = None
    error: str | None = None

    def module_id(self, name: str) -> str:
        assert self.modules is not None
        return f"{self.modules.id}/{name}"

    def preamble(self) -> list[Message]:
        """The messages that every conversation begins with; a place stands for their text."""
        roles = self.record.schema.roles
        return [Message(role.role, (Placeholder(number),)) for number, role in enumerate(roles)]

    @property
    def goes_on(self) -> Placeholder | None:
        """Where the schema's last text stands: at the beginning of the request's first message."""
        schema = self.record.schema
        return Placeholder(len(schema.roles)) if schema.content else None


class SchemaLibrary:
    def __init__(
        self,
        records: PromptRecords,
        tokenizer: Tokenizer,
        prompts: ChatPrompts,
        engine: EngineClient,
        keeper: ModuleKeeper,
    ) -> None:
        self._records = records
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._engine = engine
        self._keeper = keeper
        self._entries: dict[tuple[str, str], StoredSchema] = {}
        self._locks = NameLocks()

    async def open(self) -> None:
        """Takes up every known schema again."""
        for record in await self._records.schemas():
            try:
                entry = await self._entry(record)
            except (LongctxError, SchemaError) as error:
                entry = StoredSchema(record, error=str(error))
            self._entries[record.tenant, record.name] = entry
            if entry.modules is not None:
                self._keeper.keep(entry.modules)

    async def add(self, tenant: str, schema: Schema) -> StoredSchema:
        """In place of the tenant's schema of that name, once it is stored. Raises SchemaError and
        InvalidRequest."""
        async with self._locks.of(tenant, schema.name):
            known = self._entries.get((tenant, schema.name))
            if known is not None and known.record.schema == schema and known.error is None:
                return known
            record = SchemaRecord(
                tenant=tenant,
                name=schema.name,
                created_at=int(time.time()),
                date=datetime.date.today().isoformat(),
                schema=schema,
            )
            entry = await self._entry(record)
            assert entry.modules is not None
            self._keeper.keep(entry.modules)
            try:
                await entry.modules.opened.wait()
                if entry.modules.error is not None:
                    raise InvalidRequest(entry.modules.error, param="schema")
                await self._records.save_schema(record)
            except BaseException:
                await self._keeper.drop(entry.modules)
                raise
            self._entries.pop((tenant, schema.name), None)  # the new one is the youngest
            self._entries[tenant, schema.name] = entry
            if known is not None and known.modules is not None:
                await self._keeper.replace(known.modules, entry.modules)
            return entry

    async def remove(self, tenant: str, name: str) -> None:
        """Whatever the tenant has under that name now."""
        async with self._locks.of(tenant, name):
            if (entry := self._entries.get((tenant, name))) is None:
                return
            await self._records.remove_schema(tenant, name)
            del self._entries[tenant, name]
            if entry.modules is not None:
                await self._keeper.drop(entry.modules)

    def find(self, tenant: str, name: str, *, param: str | None = None) -> StoredSchema:
        """Raises ApiError 404 when the tenant has no such schema."""
        entry = self._entries.get((tenant, name))
        if entry is None:
            raise ApiError(
                404,
                f"there is no schema {name!r}; GET /v1/prompt_cache/schemas lists those there are",
                param=param,
                code="schema_not_found",
            )
        return entry

    def of_tenant(self, tenant: str) -> Iterator[StoredSchema]:
        """Oldest first."""
        return (entry for (owner, _), entry in self._entries.items() if owner == tenant)

    def check(self, entry: StoredSchema) -> SchemaLayout:
        """Raises ApiError 400 when the schema cannot be used."""
        error = entry.error or (entry.modules and entry.modules.error)
        if error is not None or entry.layout is None:
            raise ApiError(
                400,
                f"schema {entry.record.name!r} cannot be used: {error}",
                param="prompt_cache.schema",
                code="schema_error",
            )
        return entry.layout

    async def assemble(
        self, entry: StoredSchema, modules: Sequence[str], arguments: Mapping[str, str]
    ) -> AssembledPrompt:
        """Raises ApiError and SchemaError."""
        layout = self.check(entry)
        return await asyncio.to_thread(assemble, layout, modules, arguments, self._encode)

    async def _entry(self, record: SchemaRecord) -> StoredSchema:
        frames, layout = await asyncio.to_thread(self._lay_out, record.schema, record.date)
        name = f"schema-{secrets.token_hex(12)}"

        async def prepare() -> Modules:
            return [
                (
                    f"{name}/{module}",
                    tuple(Piece(token_ids=p.token_ids, position=p.position) for p in pieces),
                )
                for module, pieces in layout.encoded()
            ]

        modules = StoredModules(id=name, salt=record.tenant, prepare=prepare)
        return StoredSchema(record, layout, frames, modules)

    def _lay_out(
        self, schema: Schema, date: str
    ) -> tuple[tuple[tuple[int, ...], ...], SchemaLayout]:
        frames = self._prompts.frames(
            [role.role for role in schema.roles], continued=bool(schema.content), date=date
        )
        limit = self._engine.info.limits.longest_tokens
        return frames, lay_out(schema, self._encode, frames, max_positions=limit)

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, continues=True)


def segments_of(entry: StoredSchema, prompt: AssembledPrompt, level: Level) -> tuple[Segment, ...]:
    """The prompt's beginning as the engine takes it.

    `exact` is the same text without gaps. With `link:k`, the first k tokens of a module are
    computed in the prompt, also where they reach beyond its first piece.
    """
    if level.link_tokens is None:
        return (Segment(token_ids=prompt.token_ids),)
    assert entry.layout is not None
    begins: dict[str, list[int]] = {}  # of each module: its tokens before each of its pieces
    for name, pieces in entry.layout.encoded():
        lengths = [0]
        for piece in pieces:
            lengths.append(lengths[-1] + len(piece.token_ids))
        begins[name] = lengths
    segments = []
    for part in prompt.parts:
        if not isinstance(part, ReusedPiece):
            segments.append(Segment(token_ids=part.token_ids, position=part.position))
            continue
        segments.append(
            Segment(
                module_id=entry.module_id(part.module),
                piece=part.piece,
                link_tokens=max(0, level.link_tokens - begins[part.module][part.piece]),
                position=part.position,
            )
        )
    return tuple(segments)
