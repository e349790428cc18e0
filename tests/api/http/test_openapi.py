"""`/openapi.json` names the body of every route that takes one, and no name in it dangles."""

import re
from collections.abc import Iterator
from typing import Any
from unittest.mock import MagicMock

import pytest
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.testclient import TestClient

from api.app import make_asgi
from api.config import ServerConfig
from api.http.openapi import Route, describe
from api.routes import routes


@pytest.fixture(scope="module")
def services() -> MagicMock:
    """Endpoints are made of them, and none is called."""
    return MagicMock(config=ServerConfig())


@pytest.fixture(scope="module")
def description(services: MagicMock) -> dict[str, Any]:
    return TestClient(make_asgi(services)).get("/openapi.json").json()  # type: ignore[no-any-return]


def references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(found := node.get("$ref"), str):
            yield found
        for value in node.values():
            yield from references(value)
    elif isinstance(node, list):
        for value in node:
            yield from references(value)


def test_every_reference_leads_somewhere(description: dict[str, Any]) -> None:
    found = set(references(description))
    assert len(found) > 10
    for reference in found:
        node: Any = description
        for step in reference.removeprefix("#/").split("/"):
            assert step in node, f"{reference} dangles"
            node = node[step]


def test_every_route_is_described(services: MagicMock, description: dict[str, Any]) -> None:
    described = {
        (method.upper(), path) for path, item in description["paths"].items() for method in item
    }
    assert described == {
        (route.method, route.path.replace(":path", "")) for route in routes(services)
    }


def test_every_post_names_its_body(description: dict[str, Any]) -> None:
    posts = {path: item["post"] for path, item in description["paths"].items() if "post" in item}
    assert len(posts) > 5
    for path, operation in posts.items():
        for media_type, content in operation["requestBody"]["content"].items():
            assert content["schema"], (path, media_type)
    stored = posts["/v1/prompt_cache/prompts"]["requestBody"]["content"]["application/json"]
    assert stored["schema"]["$ref"].endswith("/PromptRequest")
    assert posts["/v1/prompt_cache/prompts"]["requestBody"]["required"]
    assert not posts["/v1/cache/flush"]["requestBody"]["required"]


def test_every_parameter_of_a_path_is_described(description: dict[str, Any]) -> None:
    for path, item in description["paths"].items():
        for operation in item.values():
            names = [parameter["name"] for parameter in operation.get("parameters", ())]
            assert names == re.findall(r"{(\w+)}", path)


def test_a_new_route_brings_its_body_into_the_description() -> None:
    class Wish(BaseModel):
        text: str

    async def endpoint(request: Request) -> Response:
        return JSONResponse({})

    description = describe([Route("POST", "/v1/wishes", endpoint, Wish)]).openapi()
    assert list(references(description)) == ["#/components/schemas/Wish"]
    assert description["components"]["schemas"]["Wish"]["required"] == ["text"]
