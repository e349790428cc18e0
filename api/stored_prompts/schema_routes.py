"""`/v1/prompt_cache/schemas`: prompt schemas, stored once, for conversations that begin with their
modules.

The body that stores one is the schema itself, as PML or as JSON.
"""

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from api.http.auth import tenant_of
from api.http.errors import ApiError
from api.http.openapi import JSON, Body
from api.http.read_body import read_body
from api.stored_prompts.module_keeper import ModuleKeeper
from api.stored_prompts.schema_library import SchemaLibrary, StoredSchema
from longctx.process.client import EngineClient
from longctx.request import ModuleState
from prompt_cache.layout import PlacedModule, PlacedScaffold, SchemaLayout
from prompt_cache.read import read_schema
from prompt_cache.schema_json import schema_object

SCHEMA_BODY = Body(content={"application/xml": {"type": "string"}, JSON: {"type": "object"}})


class SchemaRoutes:
    """The endpoints of `/v1/prompt_cache/schemas`. Each tenant has names of its own."""

    def __init__(self, library: SchemaLibrary, engine: EngineClient, keeper: ModuleKeeper) -> None:
        self.library = library
        self.engine = engine
        self.keeper = keeper

    async def create(self, request: Request) -> Response:
        """Stores a prompt schema, as PML (XML) or JSON, and has its modules computed."""
        body = await read_body(request)
        try:
            text = body.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ApiError(
                400, f"the schema is not UTF-8: {error.reason} at byte {error.start}"
            ) from error
        if not text.strip():
            raise ApiError(400, "the body is empty; send the schema itself, as PML (XML) or JSON")
        stored = await self.library.add(tenant_of(request), read_schema(text))
        return JSONResponse(await self._described(stored))

    async def list(self, request: Request) -> Response:
        """Lists the caller's schemas."""
        found = self.library.of_tenant(tenant_of(request))
        return JSONResponse({"object": "list", "data": [self._summary(stored) for stored in found]})

    async def retrieve(self, request: Request) -> Response:
        """Returns a schema, with each module's place, tokens and state."""
        stored = self.library.find(tenant_of(request), request.path_params["name"])
        return JSONResponse(await self._described(stored))

    async def delete(self, request: Request) -> Response:
        """Deletes a schema, with all that stems from it; `longctx` is a receipt, as a file's."""
        stored = self.library.find(tenant_of(request), request.path_params["name"])
        receipt = await self.library.remove(stored.record.tenant, stored.record.name)
        return JSONResponse(
            {
                "name": stored.record.name,
                "object": "prompt_cache.schema.deleted",
                "deleted": True,
                "longctx": receipt.body(),
            }
        )

    def _summary(self, stored: StoredSchema) -> dict[str, Any]:
        kept, layout = stored.modules, stored.layout
        tokens = 0 if layout is None else sum(part.tokens for part in _parts(layout))
        return {
            "object": "prompt_cache.schema",
            "name": stored.record.name,
            "created_at": stored.record.created_at,
            "state": "error" if kept is None else self.keeper.state(kept),
            "error": stored.error or (kept and kept.error),
            "positions": 0 if layout is None else layout.end,
            "tokens": tokens,
        }

    async def _described(self, stored: StoredSchema) -> dict[str, Any]:
        described = self._summary(stored)
        layout, kept = stored.layout, stored.modules
        modules = []
        if layout is not None and kept is not None:
            states = await self.engine.module_states(kept.module_ids)
            modules = [
                _module(part, states.get(stored.module_id(part.name))) for part in _parts(layout)
            ]
        return {
            **described,
            "bytes": sum(module["bytes"] for module in modules),
            "modules": modules,
            "schema": schema_object(stored.record.schema),
        }


def _parts(layout: SchemaLayout) -> list[PlacedModule | PlacedScaffold]:
    """Returns the parts of a schema that are computed once."""
    return [*layout.modules(), *layout.scaffolds()]


def _module(part: PlacedModule | PlacedScaffold, state: ModuleState | None) -> dict[str, Any]:
    described: dict[str, Any] = {
        "name": part.name,
        "position": part.position,
        "end": part.end,
        "tokens": part.tokens,
        "bytes": 0 if state is None else state.kv_bytes,
        "tier": "none" if state is None else state.tier,
        "hits": 0 if state is None else state.hits,
        "durable_tokens": 0 if state is None else state.durable_tokens,
    }
    match part:
        case PlacedScaffold(members=members):
            described["members"] = [member.name for member in members]
        case PlacedModule(parameters=parameters, anonymous=anonymous):
            described["always_present"] = anonymous
            described["parameters"] = [
                {
                    "name": parameter.name,
                    "length": parameter.length,
                    "required": parameter.default is None,
                }
                for parameter in parameters
            ]
    return described
