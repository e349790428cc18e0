"""Prompts that were asked to be kept: OpenAI's `prompt_cache_retention` and `prompt_cache_options`.

The prompt of a conversation is found again through its block keys as long as its blocks are
somewhere. What is retained is, besides, a module at position 0: on disk whatever its length, and
kept until its time is over, through restarts. Asking for it again begins its time anew.
"""

import asyncio
import hashlib
import time
from collections.abc import Sequence

import numpy as np

from api.expiry import Expiry
from api.keeper import Keeper, Kept, Modules
from api.prompt_records import PromptRecords, RetainedRecord
from api.store_dir import StoreDir
from longctx.request import Piece, Segment

LEAST_TOKENS = 64  # less fills no block


class Retention:
    def __init__(self, records: PromptRecords, folder: StoreDir, keeper: Keeper) -> None:
        self._records = records
        self._folder = folder
        self._keeper = keeper
        self._retained: dict[str, tuple[RetainedRecord, Kept]] = {}
        self._expiry = Expiry(
            lambda: ((record.expires_at, name) for name, (record, _) in self._retained.items()),
            self._let_go,
        )

    async def open(self) -> None:
        """Takes up what was retained before."""
        for record in await self._records.retained():
            self._keep(record)
        self._expiry.start()

    async def close(self) -> None:
        await self._expiry.close()

    async def retain(self, tenant: str, segments: Sequence[Segment], seconds: int) -> None:
        """Keep a prompt of literal text and documents; of others, the modules are kept anyway."""
        plain = all(s.module_id is None and s.link_tokens is None for s in segments)
        token_ids = await asyncio.to_thread(self._token_ids, segments) if plain else b""
        if len(token_ids) < 4 * LEAST_TOKENS:
            return
        name = hashlib.blake2b(tenant.encode() + b"\0" + token_ids, digest_size=16).hexdigest()
        expires_at = int(time.time()) + seconds
        known = self._retained.get(name)
        if known is not None and known[0].expires_at >= expires_at:
            return
        record = RetainedRecord(
            id=f"retained-{name}", tenant=tenant, expires_at=expires_at, token_ids=token_ids
        )
        await self._records.save_retained(record)
        if known is None:
            self._keep(record)
        else:
            self._retained[name] = (record, known[1])

    def _keep(self, record: RetainedRecord) -> None:
        async def prepare() -> Modules:
            token_ids = np.frombuffer(record.token_ids, dtype="<i4").tolist()
            return [(record.id, (Piece(token_ids=tuple(token_ids), position=0),))]

        kept = Kept(id=record.id, salt=record.tenant, prepare=prepare)
        self._retained[record.id.removeprefix("retained-")] = (record, kept)
        self._keeper.keep(kept)
        self._expiry.changed()

    async def _let_go(self, name: str) -> None:
        record, kept = self._retained[name]
        await self._records.remove_retained(record.id)  # first: where it fails, all is as it was
        del self._retained[name]
        await self._keeper.drop(kept)

    def _token_ids(self, segments: Sequence[Segment]) -> bytes:
        """Little-endian int32, as documents have them."""
        return b"".join(
            self._folder.tokens_path(segment.document_id).read_bytes()
            if segment.document_id is not None
            else np.array(segment.token_ids, dtype="<i4").tobytes()
            for segment in segments
        )
