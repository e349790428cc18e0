"""`/v1/prompt_cache/prompts`: named prompts that conversations begin with, computed when they are
stored and kept until they expire."""

import datetime
import re
import time
from collections.abc import Iterable
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from api.http.auth import tenant_of
from api.http.message_bodies import RequestBody
from api.http.read_body import read_json
from api.stored_prompts.module_keeper import ModuleKeeper
from api.stored_prompts.prompt_library import PromptLibrary, StoredPrompt
from api.stored_prompts.records import PromptRecord
from longctx.process.client import EngineClient
from longctx.request import ModuleState

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_TTL = re.compile(r"([1-9][0-9]{0,8})([smhd])")
_UNIT_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def _prompt_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(
            "must have 1 to 64 letters, digits, '_', '-' and '.', and begin with a letter or digit"
        )
    return name


def _seconds(value: Any) -> Any:
    if isinstance(value, str) and (found := _TTL.fullmatch(value)):
        value = int(found[1]) * _UNIT_SECONDS[found[2]]
    if value is not None and (type(value) is not int or not 0 < value < 1 << 40):
        raise ValueError('must be seconds from 1 on, or such as "30m", "24h" or "7d"')
    return value


class PromptRequest(RequestBody):
    """A prompt to be stored, which conversations can begin with."""

    name: Annotated[str, AfterValidator(_prompt_name)]
    system: str | None = None
    file_ids: tuple[str, ...] = ()
    ttl: Annotated[
        int | None,
        BeforeValidator(_seconds),
        Field(description='kept so long: seconds, or such as "30m", "24h", "7d"'),
    ] = None  # until deleted

    @model_validator(mode="after")
    def _has_content(self) -> Self:
        if not self.system and not self.file_ids:
            raise ValueError("either system or file_ids is required, or both")
        if len(set(self.file_ids)) < len(self.file_ids):
            raise ValueError("file_ids names a file twice; name it once")
        return self


class PromptRoutes:
    """The endpoints of `/v1/prompt_cache/prompts`. Each tenant has names of its own."""

    def __init__(self, library: PromptLibrary, engine: EngineClient, keeper: ModuleKeeper) -> None:
        self.library = library
        self.engine = engine
        self.keeper = keeper

    async def create(self, request: Request) -> Response:
        """Stores a system prompt with files under a name, and has it computed."""
        wanted = await read_json(request, PromptRequest)
        now = int(time.time())
        stored = await self.library.add(
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
        return JSONResponse(self._described(stored, await self._states((stored,))))

    async def list(self, request: Request) -> Response:
        """Lists the caller's stored prompts."""
        found = tuple(self.library.of_tenant(tenant_of(request)))
        states = await self._states(found)
        return JSONResponse(
            {"object": "list", "data": [self._described(stored, states) for stored in found]}
        )

    async def retrieve(self, request: Request) -> Response:
        """Returns a stored prompt, with the state of its computation."""
        stored = self.library.find(tenant_of(request), request.path_params["name"])
        return JSONResponse(self._described(stored, await self._states((stored,))))

    async def delete(self, request: Request) -> Response:
        """Deletes a stored prompt; its files stay. `longctx` is a receipt, as that of a file."""
        stored = self.library.find(tenant_of(request), request.path_params["name"])
        receipt = await self.library.remove(stored.record.tenant, stored.record.name)
        return JSONResponse(
            {
                "name": stored.record.name,
                "object": "prompt_cache.prompt.deleted",
                "deleted": True,
                "longctx": receipt.body(),
            }
        )

    async def _states(self, found: Iterable[StoredPrompt]) -> dict[str, ModuleState]:
        return await self.engine.module_states([stored.modules.id for stored in found])

    def _described(self, stored: StoredPrompt, states: dict[str, ModuleState]) -> dict[str, Any]:
        record, modules = stored.record, stored.modules
        state = states.get(modules.id)
        return {
            "object": "prompt_cache.prompt",
            "name": record.name,
            "created_at": record.created_at,
            "expires_at": record.expires_at,
            "system": record.system,
            "file_ids": list(record.file_ids),
            "state": self.keeper.state(modules),
            "error": modules.error,
            "tokens": stored.tokens,
            "bytes": 0 if state is None else state.kv_bytes,
            "tier": "none" if state is None else state.tier,
            "hits": stored.uses,
            "durable_tokens": 0 if state is None else state.durable_tokens,
        }
