"""Retains prompts for OpenAI's fields `prompt_cache_retention` and `prompt_cache_options`.

The prompt of a conversation is found again through its block keys as long as some tier has its
blocks. A retained one is also a module at position 0: it is on disk whatever its length, and stays
until its time is over, through restarts. Asking for it again begins its time anew. A prompt that
goes on where a retained one ends, as each turn of a conversation does, takes its place.
"""

import asyncio
import hashlib
import time
from collections.abc import Iterable, Sequence

import numpy as np

from api.background.expiry import Expiry
from api.background.store_dir import StoreDir
from api.files.document_store import FILE_PREFIX
from api.stored_prompts.module_keeper import ModuleKeeper, Modules, StoredModules
from api.stored_prompts.records import PromptRecords, RetainedRecord
from compress.shape import BLOCK_TOKENS
from longctx.errors import ContextTooLong, InvalidRequest
from longctx.process.client import EngineClient
from longctx.request import Piece, Segment

BLOCK_BYTES = (
    4 * BLOCK_TOKENS
)  # of token ids; a prompt of less fills no block, and is not found again


class Retention:
    """Holds the retained prompts of all tenants. `open` comes first, `close` last; all methods are
    called on the event loop, and one change is made at a time."""

    def __init__(
        self, records: PromptRecords, folder: StoreDir, engine: EngineClient, keeper: ModuleKeeper
    ) -> None:
        self._records = records
        self._folder = folder
        self._engine = engine
        self._keeper = keeper
        self._retained: dict[str, tuple[RetainedRecord, StoredModules]] = {}
        self._of_other_models: dict[str, RetainedRecord] = {}
        self._changing = asyncio.Lock()
        self._expiry = Expiry(
            lambda: ((record.expires_at, name) for name, (record, _) in self._retained.items()),
            self._expire,
        )

    async def open(self) -> None:
        """Takes up what was retained before; forgets what has the text of files that are gone.

        The tokens of another model or tokenizer say nothing to this one: they wait for it until
        their time is over.
        """
        for record in await self._records.retained():
            whole = self._all_there(record.file_ids)
            if whole and record.id == self._name(record.tenant, record.token_ids):
                self._keep(record)
            elif whole and record.expires_at > time.time():
                self._of_other_models[record.id] = record
            else:
                await self._records.remove_retained(record.id)
        self._expiry.start()

    async def close(self) -> None:
        await self._expiry.close()

    def check(self, segments: Sequence[Segment], tokens: int) -> None:
        """Raises InvalidRequest when a prompt of so many tokens cannot be retained."""
        if not _plain(segments):
            return
        if self._engine.config.ring.ranks > 1:
            raise InvalidRequest(
                "a prompt is kept by one rank only, and this server has "
                f"{self._engine.config.ring.ranks}; leave out prompt_cache_retention and "
                "prompt_cache_options.ttl, or start it without --ranks",
                param="prompt_cache_retention",
            )
        limit = self._engine.info.limits.capacity_tokens - BLOCK_TOKENS
        if tokens > limit:
            raise ContextTooLong(
                f"the prompt has {tokens} tokens, and only one of up to {limit}, which fits the "
                "device, can be kept; shorten it, leave out prompt_cache_retention and "
                "prompt_cache_options.ttl, or raise --device-pool-gib",
                param="prompt_cache_retention",
            )

    async def retain(
        self,
        tenant: str,
        segments: Sequence[Segment],
        seconds: int,
        sources: tuple[str, ...] = (),
    ) -> None:
        """Retains a prompt of literal text and documents; modules of others are kept anyway.

        `sources`: what else its text is from, as `Request.sources`; it goes with these, too.
        """
        if not _plain(segments):
            return
        async with self._changing:
            try:
                token_ids = await asyncio.to_thread(self._token_ids, segments)
            except FileNotFoundError:
                return
            if not self._all_there(_file_ids(segments)):
                return  # one was deleted while it was asked about
            if len(token_ids) < BLOCK_BYTES:
                return
            record = RetainedRecord(
                id=self._name(tenant, token_ids),
                tenant=tenant,
                expires_at=int(time.time()) + seconds,
                token_ids=token_ids,
                file_ids=tuple(dict.fromkeys((*_file_ids(segments), *sources))),
            )
            await self._retain(record)

    async def forget_file(self, file_id: str) -> None:
        """Drops all that is retained with the text of a file or another source that leaves."""
        async with self._changing:
            for name, (record, _) in list(self._retained.items()):
                if file_id in record.file_ids:
                    await self._drop(name)
            for name, record in list(self._of_other_models.items()):
                if file_id in record.file_ids:
                    await self._records.remove_retained(name)
                    del self._of_other_models[name]

    def _all_there(self, sources: Iterable[str]) -> bool:
        """Tells whether all files among the sources are there; others forget themselves."""
        files = (name for name in sources if name.startswith(FILE_PREFIX))
        return all(self._folder.text_path(name).exists() for name in files)

    def _name(self, tenant: str, token_ids: bytes) -> str:
        """Names a prompt by what it is computed from, the model and its tokenizer among it."""
        model = self._engine.info.fingerprint.encode()
        parts = b"\0".join((model, tenant.encode(), token_ids))
        return f"retained-{hashlib.blake2b(parts, digest_size=16).hexdigest()}"

    async def _retain(self, record: RetainedRecord) -> None:
        known = self._retained.get(record.id)
        if known is not None and known[0].expires_at >= record.expires_at:
            return
        await self._records.save_retained(record)
        if known is not None:
            self._retained[record.id] = (record, known[1])
            return
        self._keep(record)
        for name, (earlier, _) in list(self._retained.items()):
            if _extends(record, earlier):
                await self._drop(name)

    def _keep(self, record: RetainedRecord) -> None:
        async def prepare() -> Modules:
            token_ids = np.frombuffer(record.token_ids, dtype="<i4").tolist()
            return [(record.id, (Piece(token_ids=tuple(token_ids), position=0),))]

        modules = StoredModules(
            id=record.id, salt=record.tenant, prepare=prepare, sources=record.file_ids
        )
        self._retained[record.id] = (record, modules)
        self._keeper.keep(modules)
        self._expiry.reschedule()

    async def _expire(self, name: str) -> None:
        async with self._changing:
            known = self._retained.get(name)
            if known is not None and known[0].expires_at <= time.time():
                await self._drop(name)

    async def _drop(self, name: str) -> None:
        record, modules = self._retained[name]
        await self._records.remove_retained(record.id)  # first: where it fails, all is as it was
        del self._retained[name]
        await self._keeper.drop(modules)

    def _token_ids(self, segments: Sequence[Segment]) -> bytes:
        """Returns the tokens as little-endian int32, as the files of documents have them."""
        return b"".join(
            self._folder.tokens_path(segment.document_id).read_bytes()
            if segment.document_id is not None
            else np.array(segment.token_ids, dtype="<i4").tobytes()
            for segment in segments
        )


def _file_ids(segments: Sequence[Segment]) -> list[str]:
    return [each.document_id for each in segments if each.document_id is not None]


def _plain(segments: Sequence[Segment]) -> bool:
    return all(s.module_id is None and s.link_tokens is None for s in segments)


def _extends(later: RetainedRecord, earlier: RetainedRecord) -> bool:
    """Tells whether the later prompt begins with all blocks of the earlier, and stays as long."""
    blocks_bytes = len(earlier.token_ids) // BLOCK_BYTES * BLOCK_BYTES
    return (
        later.id != earlier.id
        and later.tenant == earlier.tenant
        and later.expires_at >= earlier.expires_at
        and len(later.token_ids) >= len(earlier.token_ids)
        and later.token_ids.startswith(earlier.token_ids[:blocks_bytes])
    )
