"""Request bodies in `/openapi.json`: routes read them themselves, so FastAPI cannot know them."""

from typing import Any

from fastapi import FastAPI
from pydantic.json_schema import models_json_schema

from api.http.bodies import ChatRequest, CompletionRequest, FlushRequest, TokenizeRequest, Wire

BODIES: tuple[type[Wire], ...] = (ChatRequest, CompletionRequest, TokenizeRequest, FlushRequest)
REFERENCE = "#/components/schemas/{model}"


def body_of(kind: type[Wire]) -> dict[str, Any]:
    """What a route with this body passes as `openapi_extra`."""
    schema = {"$ref": REFERENCE.format(model=kind.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def describe_bodies(app: FastAPI) -> None:
    """Adds the schemas that `body_of` refers to."""
    own = app.openapi

    def openapi() -> dict[str, Any]:
        description = own()
        _, schemas = models_json_schema(
            [(kind, "validation") for kind in BODIES], ref_template=REFERENCE
        )
        components = description.setdefault("components", {})
        components.setdefault("schemas", {}).update(schemas["$defs"])
        return description

    app.openapi = openapi  # type: ignore[method-assign]
