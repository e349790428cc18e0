"""`/v1/prompt_cache/prompts`: named prompts, what conversations begin with, computed at once and
kept until they expire."""

import datetime
import time
from collections.abc import Iterable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from api.auth import tenant_of
from api.keeper import Keeper
from api.prompt_library import PromptEntry, PromptLibrary
from api.prompt_records import PromptRecord
from api.wire import PromptRequest, read_json
from longctx.client import EngineClient
from longctx.request import ModuleState


class Prompts:
    def __init__(self, library: PromptLibrary, engine: EngineClient, keeper: Keeper) -> None:
        self.library = library
        self.engine = engine
        self.keeper = keeper

    async def create(self, request: Request) -> Response:
        wanted = await read_json(request, PromptRequest)
        now = int(time.time())
        entry = await self.library.add(
            PromptRecord(
                tenant=tenant_of(request),
                name=wanted.name,
                created_at=now,
                expires_at=None if wanted.ttl is None else now + wanted.ttl,
                date=datetime.date.today().isoformat(),
                system=wanted.system or None,
                file_ids=tuple(wanted.file_ids),
            )
        )
        return JSONResponse(self._described(entry, await self._states((entry,))))

    async def list(self, request: Request) -> Response:
        entries = tuple(self.library.of_tenant(tenant_of(request)))
        states = await self._states(entries)
        return JSONResponse(
            {"object": "list", "data": [self._described(entry, states) for entry in entries]}
        )

    async def retrieve(self, request: Request) -> Response:
        entry = self.library.find(tenant_of(request), request.path_params["name"])
        return JSONResponse(self._described(entry, await self._states((entry,))))

    async def delete(self, request: Request) -> Response:
        entry = self.library.find(tenant_of(request), request.path_params["name"])
        await self.library.remove(entry)
        return JSONResponse(
            {"name": entry.record.name, "object": "prompt_cache.prompt.deleted", "deleted": True}
        )

    async def _states(self, entries: Iterable[PromptEntry]) -> dict[str, ModuleState]:
        return await self.engine.module_states([entry.kept.id for entry in entries])

    def _described(self, entry: PromptEntry, states: dict[str, ModuleState]) -> dict[str, Any]:
        record, kept = entry.record, entry.kept
        state = states.get(kept.id)
        return {
            "object": "prompt_cache.prompt",
            "name": record.name,
            "created_at": record.created_at,
            "expires_at": record.expires_at,
            "system": record.system,
            "file_ids": list(record.file_ids),
            "state": self.keeper.state(kept),
            "error": kept.error,
            "tokens": entry.tokens,
            "bytes": 0 if state is None else state.kv_bytes,
            "tier": "none" if state is None else state.tier,
            "hits": entry.uses,
            "durable_tokens": 0 if state is None else state.durable_tokens,
        }
