"""The route table's entries, and what `/openapi.json` says of them.

Endpoints take a bare request and read it themselves, so FastAPI cannot see which body they expect.
Each route states it, and the description is derived from the routes alone.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, TypeAlias

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute
from starlette.routing import Route as StarletteRoute
from starlette.types import Receive, Scope, Send

JSON = "application/json"
EVENTS = "text/event-stream"
TEXT = "text/plain"
ANYTHING = "*/*"
REFERENCE = "#/components/schemas/{model}"
PARAMETER = re.compile(r"{(\w+)(?::\w+)?}")  # in a path: {file_id}, {name:path}

Endpoint: TypeAlias = Callable[[Request], Coroutine[Any, Any, Response]]
JSONSchema: TypeAlias = Mapping[str, Any]

# What all APIs have in common: each has its own shape of an error.
REFUSAL: JSONSchema = {"type": "object", "required": ["error"]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Body:
    """Describes a request body: for each media type, a model or a plain JSON schema."""

    content: Mapping[str, type[BaseModel] | JSONSchema]
    required: bool = True

    def models(self) -> list[type[BaseModel]]:
        return [kind for kind in self.content.values() if isinstance(kind, type)]


@dataclass(frozen=True, slots=True)
class Route:
    """Binds an endpoint to a method and a path. A model as `body` is a required JSON body."""

    method: str
    path: str
    endpoint: Endpoint
    body: type[BaseModel] | Body | None = None
    answers: tuple[str, ...] = (JSON,)  # the media types of a success; one that is streamed has its

    @property
    def described_body(self) -> Body | None:
        return Body(content={JSON: self.body}) if isinstance(self.body, type) else self.body

    def operation(self) -> dict[str, Any]:
        """Makes the parts of its OpenAPI operation that the endpoint's signature does not show."""
        described: dict[str, Any] = {"responses": self._responses()}
        if names := PARAMETER.findall(self.path):
            described["parameters"] = [
                {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
                for name in names
            ]
        if (body := self.described_body) is not None:
            described["requestBody"] = {
                "required": body.required,
                "content": {
                    media_type: {"schema": _schema(kind)}
                    for media_type, kind in body.content.items()
                },
            }
        return described

    def _responses(self) -> dict[str, Any]:
        streamed = isinstance(self.body, type) and "stream" in self.body.model_fields
        kinds = (*self.answers, EVENTS) if streamed else self.answers
        refusal = {"content": {JSON: {"schema": REFUSAL}}}
        return {
            "200": {"description": "Success", "content": {kind: {} for kind in kinds}},
            "4XX": {"description": "Refused: the message says why", **refusal},
            "503": {"description": "Not now; the engine is being restarted", "content": {JSON: {}}},
        }


class OtherMethods:
    """ASGI application for the methods of a path that no route has.

    A router alone would name in `Allow` only the methods of the first route with that path.
    """

    def __init__(self, path: str, methods: Iterable[str]) -> None:
        self.path = path  # where metrics look for it
        self.allow = ", ".join(sorted({*methods, "OPTIONS"}))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["route"] = self
        headers = {"Allow": self.allow}
        if scope["method"] != "OPTIONS":
            raise HTTPException(HTTPStatus.METHOD_NOT_ALLOWED, headers=headers)
        await Response(status_code=HTTPStatus.NO_CONTENT, headers=headers)(scope, receive, send)


class Answering:
    """ASGI application of one route: its endpoint's response is sent as it is."""

    def __init__(self, path: str, endpoint: Endpoint) -> None:
        self.path = path  # where metrics look for it
        self.endpoint = endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["route"] = self
        response = await self.endpoint(Request(scope, receive, send))
        await response(scope, receive, send)


def serve_routes(routes: Sequence[Route]) -> list[BaseRoute]:
    """Returns what a Starlette application routes by, `/openapi.json` and its pages included.

    FastAPI describes the routes and does not answer them: its way to an endpoint looks for
    dependencies and parameters, of which there are none, and takes longer than all the rest.
    What answers GET answers HEAD; every path answers OPTIONS, and other methods with 405, both with
    all of its methods in `Allow`.
    """
    served: list[BaseRoute] = [
        StarletteRoute(
            route.path,
            Answering(route.path, route.endpoint),
            # The server below sends no body to HEAD.
            methods=["GET", "HEAD"] if route.method == "GET" else [route.method],
        )
        for route in routes
    ]
    # FastAPI's own pages.
    served += [page for page in describe(routes).router.routes if type(page) is StarletteRoute]
    methods: defaultdict[str, set[str]] = defaultdict(set)
    for known in served:
        if isinstance(known, StarletteRoute):
            methods[known.path].update(known.methods or ())
    others = [StarletteRoute(path, OtherMethods(path, names)) for path, names in methods.items()]
    return [*served, *others]


def describe(routes: Sequence[Route]) -> FastAPI:
    """Returns an application whose `/openapi.json` describes the routes and all their bodies."""
    app = FastAPI(title="longctx")
    for route in routes:
        app.add_api_route(
            route.path,
            route.endpoint,
            methods=[route.method],
            openapi_extra=route.operation(),
            response_class=Response,
        )
    bodies = [body for route in routes if (body := route.described_body) is not None]
    models = list(dict.fromkeys(model for body in bodies for model in body.models()))
    describe_routes = app.openapi

    def openapi() -> dict[str, Any]:
        description = describe_routes()
        _, schemas = models_json_schema(
            [(model, "validation") for model in models], ref_template=REFERENCE
        )
        components = description.setdefault("components", {})
        components.setdefault("schemas", {}).update(schemas.get("$defs", {}))
        return description

    app.openapi = openapi  # type: ignore[method-assign]
    return app


def _schema(kind: type[BaseModel] | JSONSchema) -> JSONSchema:
    if isinstance(kind, type):
        return {"$ref": REFERENCE.format(model=kind.__name__)}
    return kind
