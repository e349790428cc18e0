"""`/v1/prompt_cache/schemas`: prompt schemas, stored once, for conversations that begin with their
modules. The body that stores one is the schema itself, as PML or as JSON."""

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from api.http.auth import tenant_of
from api.http.bodies import read_body
from api.http.errors import ApiError
from api.http.openapi import JSON, Body
from api.stored_prompts.module_keeper import ModuleKeeper
from api.stored_prompts.schema_library import SchemaLibrary, StoredSchema
from longctx.process.client import EngineClient
from longctx.request import ModuleState
from prompt_cache.layout import PlacedModule, PlacedScaffold, SchemaLayout
from prompt_cache.read import read_schema
from prompt_cache.schema_json import schema_object

SCHEMA_BODY = Body(content={"application/xml": {"type": "string"}, JSON: {"type": "object"}})


class SchemaRoutes:
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
        entry = await self.library.add(tenant_of(request), read_schema(text))
        return JSONResponse(await self._described(entry))

    async def list(self, request: Request) -> Response:
        """Lists the caller's schemas."""
        entries = self.library.of_tenant(tenant_of(request))
        return JSONResponse({"object": "list", "data": [self._summary(entry) for entry in entries]})

    async def retrieve(self, request: Request) -> Response:
        """Returns a schema, with each module's place, tokens and state."""
        entry = self.library.find(tenant_of(request), request.path_params["name"])
        return JSONResponse(await self._described(entry))

    async def delete(self, request: Request) -> Response:
        """Deletes a schema, with what was computed of its modules."""
        entry = self.library.find(tenant_of(request), request.path_params["name"])
        await self.library.remove(entry.record.tenant, entry.record.name)
        return JSONResponse(
            {
                "name": entry.record.name,
                "object": "prompt_cache.schema.deleted",
                "deleted": True,
            }
        )

    def _summary(self, entry: StoredSchema) -> dict[str, Any]:
        modules_of, layout = entry.modules, entry.layout
        tokens = 0 if layout is None else sum(part.tokens for part in _parts(layout))
        return {
            "object": "prompt_cache.schema",
            "name": entry.record.name,
            "created_at": entry.record.created_at,
            "state": "error" if modules_of is None else self.keeper.state(modules_of),
            "error": entry.error or (modules_of and modules_of.error),
            "positions": 0 if layout is None else layout.end,
            "tokens": tokens,
        }

    async def _described(self, entry: StoredSchema) -> dict[str, Any]:
        described = self._summary(entry)
        layout, modules_of = entry.layout, entry.modules
        modules = []
        if layout is not None and modules_of is not None:
            states = await self.engine.module_states(modules_of.module_ids)
            modules = [
                _module(part, states.get(entry.module_id(part.name))) for part in _parts(layout)
            ]
        return {
            **described,
            "bytes": sum(module["bytes"] for module in modules),
            "modules": modules,
            "schema": schema_object(entry.record.schema),
        }


def _parts(layout: SchemaLayout) -> list[PlacedModule | PlacedScaffold]:
    """What is computed once."""
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
