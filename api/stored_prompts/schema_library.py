"""The schemas of this process: laid out in the model's tokens, with their modules kept computed.

What a tenant stored is taken up again at every start. With another model its text has other tokens,
so the layout is made anew; where it no longer fits, the schema stays, with the reason.
"""

import asyncio
import datetime
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from api.http.errors import ApiError
from api.stored_prompts.module_keeper import ModuleKeeper, Modules, StoredModules
from api.stored_prompts.named_library import NamedLibrary, until_opened
from api.stored_prompts.records import PromptRecords, SchemaRecord
from longctx.errors import LongctxError
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
    """Holds a schema of a tenant. All fields are there unless it does not suit the model: then
    `error` says why, and there is only the record."""

    record: SchemaRecord
    layout: SchemaLayout | None = None
    frames: tuple[tuple[int, ...], ...] = ()
    modules: StoredModules | None = None
    error: str | None = None

    def module_id(self, name: str) -> str:
        assert self.modules is not None
        return f"{self.modules.id}/{name}"

    def preamble(self) -> list[Message]:
        """Returns the messages that conversations begin with, with placeholders for their text."""
        roles = self.record.schema.roles
        return [Message(role.role, (Placeholder(number),)) for number, role in enumerate(roles)]

    @property
    def last_text(self) -> Placeholder | None:
        """The placeholder of the text after the last role, which begins the first message."""
        schema = self.record.schema
        return Placeholder(len(schema.roles)) if schema.content else None


class SchemaLibrary(NamedLibrary[StoredSchema]):
    """Knows all schemas of all tenants. `open` comes first."""

    kind = "schema"

    def __init__(
        self,
        records: PromptRecords,
        tokenizer: Tokenizer,
        prompts: ChatPrompts,
        engine: EngineClient,
        keeper: ModuleKeeper,
    ) -> None:
        super().__init__(keeper)
        self._records = records
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._engine = engine

    async def open(self) -> None:
        """Takes up every known schema again."""
        for record in await self._records.schemas():
            try:
                stored, _ = await self._laid_out(record)
            except (LongctxError, SchemaError) as error:
                stored = StoredSchema(record, error=str(error))
            self._take_up(stored)

    async def add(self, tenant: str, schema: Schema) -> StoredSchema:
        """Puts the schema in the place of the tenant's schema of that name. Raises SchemaError and
        InvalidRequest where it does not suit the model."""
        async with self._locks.of(tenant, schema.name):
            known = self._items.get((tenant, schema.name))
            if known is not None and known.record.schema == schema and known.error is None:
                return known
            record = SchemaRecord(
                tenant=tenant,
                name=schema.name,
                created_at=int(time.time()),
                date=datetime.date.today().isoformat(),
                schema=schema,
            )
            stored, modules = await self._laid_out(record)

            async def save() -> None:
                await until_opened(modules, param="schema")
                await self._records.save_schema(record)

            await self._put(stored, modules, save)
            return stored

    def check(self, stored: StoredSchema) -> SchemaLayout:
        """Returns the schema's layout. Raises ApiError 400 when the schema cannot be used."""
        error = stored.error or (stored.modules and stored.modules.error)
        if error is not None or stored.layout is None:
            raise ApiError(
                400,
                f"schema {stored.record.name!r} cannot be used: {error}",
                param="prompt_cache.schema",
                code="schema_error",
            )
        return stored.layout

    async def assemble(
        self, stored: StoredSchema, modules: Sequence[str], arguments: Mapping[str, str]
    ) -> AssembledPrompt:
        """Picks the modules and fills in the arguments. Raises ApiError when the schema cannot be
        used, and SchemaError for modules or arguments that it does not have."""
        layout = self.check(stored)
        return await asyncio.to_thread(assemble, layout, modules, arguments, self._encode)

    async def _remove_record(self, item: StoredSchema) -> None:
        await self._records.remove_schema(item.record.tenant, item.record.name)

    async def _laid_out(self, record: SchemaRecord) -> tuple[StoredSchema, StoredModules]:
        """Lays the schema out in this model's tokens; returns it with its modules, not kept yet."""
        frames, layout = await asyncio.to_thread(self._lay_out, record.schema, record.date)
        name = self._keeper.new_id("schema", record)

        async def prepare() -> Modules:
            return [
                (
                    f"{name}/{module}",
                    tuple(Piece(token_ids=p.token_ids, position=p.position) for p in pieces),
                )
                for module, pieces in layout.encoded()
            ]

        modules = StoredModules(id=name, salt=record.tenant, prepare=prepare)
        return StoredSchema(record, layout, frames, modules), modules

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


def segments_of(stored: StoredSchema, prompt: AssembledPrompt, level: Level) -> tuple[Segment, ...]:
    """Makes the prompt's beginning as the engine takes it.

    `exact` is the same text without gaps. With `link:k`, the first k tokens of a module are
    computed in the prompt, also where they reach beyond its first piece: with k = 16 and pieces of
    10 and 30 tokens, all of the first piece and 6 tokens of the second.
    """
    if level.link_tokens is None:
        return (Segment(token_ids=prompt.token_ids),)
    assert stored.layout is not None
    begins: dict[str, list[int]] = {}  # for each module, its tokens before each of its pieces
    for name, pieces in stored.layout.encoded():
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
                module_id=stored.module_id(part.module),
                piece=part.piece,
                link_tokens=max(0, level.link_tokens - begins[part.module][part.piece]),
                position=part.position,
            )
        )
    return tuple(segments)
