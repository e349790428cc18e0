"""Prompts that tenants have named: what conversations begin with, computed before anybody asks.

The beginning, system text and files in the chat template, is one module at position 0: it is kept
on disk, and found through its block keys by every conversation that begins with it, whether that
names the prompt or says the same by itself. When the prompt expires nothing keeps it any more.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from api.stored_prompts.kept_beginnings import KeptBeginnings
from api.stored_prompts.module_keeper import Modules, StoredModules
from api.stored_prompts.named_library import until_opened
from api.stored_prompts.records import PromptRecord
from longctx.request import Piece
from longctx.text.chat_template import FilePart, Message, Placeholder


@dataclass(slots=True, eq=False)
class StoredPrompt:
    """Holds a prompt of a tenant, with its beginning as one module."""

    record: PromptRecord
    modules: StoredModules
    tokens: int | None = None  # once its files are tokenized
    uses: int = 0


class PromptLibrary(KeptBeginnings[StoredPrompt]):
    """Knows all named prompts of all tenants. `open` comes first, `close` last."""

    kind = "prompt"
    again = "store the prompt again"

    async def add(self, record: PromptRecord) -> StoredPrompt:
        """Puts the prompt in the place of the tenant's prompt of that name.

        Raises InvalidRequest where the model's chat template has no place for it, or its text is
        too long; how long files are is known later, and said by the prompt's state.
        """
        async with self._locks.of(record.tenant, record.name):
            known = self._items.get((record.tenant, record.name))
            if known is not None and known.record == record and known.modules.error is None:
                return known
            files = [FilePart(name, self._title(record, name)) for name in record.file_ids]
            await asyncio.to_thread(self._pieces, record, files)
            stored = self._stored(record)

            async def save() -> None:
                if not files:
                    await until_opened(stored.modules, param="system")
                await self._records.save_prompt(record)

            await self._keep(stored, save)
            return stored

    async def _remove_record(self, item: StoredPrompt) -> None:
        await self._records.remove_prompt(item.record.tenant, item.record.name)

    async def _recorded(self) -> list[StoredPrompt]:
        return [self._stored(record) for record in await self._records.prompts()]

    def _stored(self, record: PromptRecord) -> StoredPrompt:
        """Makes the prompt with its module, which is not kept yet."""

        async def prepare() -> Modules:
            token_ids = await self._token_ids(record)
            stored.tokens = len(token_ids)
            return [(modules.id, (Piece(token_ids=token_ids, position=0),))]

        modules = StoredModules(
            id=self._keeper.new_id("prompt", record),
            salt=record.tenant,
            prepare=prepare,
            sources=record.file_ids,
        )
        stored = StoredPrompt(record, modules)
        return stored

    async def _token_ids(self, record: PromptRecord) -> tuple[int, ...]:
        """Returns the tokens of all that precedes the user's own text. Waits for files that are
        still being tokenized. Raises InvalidRequest for a file that has failed or is gone."""
        documents = await self._tokenized(record)
        files = [FilePart(document.id, document.record.filename) for document in documents]
        return self._joined(await asyncio.to_thread(self._pieces, record, files))

    def _pieces(
        self, record: PromptRecord, files: Sequence[FilePart]
    ) -> list[tuple[int, ...] | FilePart]:
        """Returns the template's tokens and the files in order, up to the user's text."""
        system = [] if record.system is None else [Message("system", (record.system,))]
        begin: tuple[FilePart | Placeholder, ...] = tuple(files) or (Placeholder(0),)
        question = Message("user", (*begin, "?"))
        pieces = self._prompts.pieces([*system, question], date=record.date)
        last = max(i for i, piece in enumerate(pieces) if not isinstance(piece, tuple))
        return [piece for piece in pieces[: last + 1] if not isinstance(piece, Placeholder)]

    def _title(self, record: PromptRecord, file_id: str) -> str:
        document = self._documents.find(record.tenant, file_id, param="file_ids")
        return document.record.filename
