import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from api.config import ServerConfig
from api.http.auth import Authentication, read_keys, tenant_of
from longctx.errors import LongctxError

SECRET = b"s" * 32


def get(path: str, *keys: str, secret: bytes = SECRET, **headers: str) -> httpx.Response:
    async def answer(request: Request) -> Response:
        return PlainTextResponse(tenant_of(request))

    async def main() -> httpx.Response:
        app = Starlette(routes=[Route("/v1/models", answer), Route("/health", answer)])
        transport: Any = httpx.ASGITransport(Authentication(app, keys=keys, secret=secret))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.get(path, headers=headers)

    return asyncio.run(main())


def test_without_keys_everybody_is_one_tenant() -> None:
    assert get("/v1/models").text == get("/v1/models", Authorization="Bearer x").text == ""


@pytest.mark.parametrize(
    "authorization", ["", "Bearer", "Bearer wrong", "Basic right", "right", "Bearer rightx"]
)
def test_a_wrong_key_is_refused_in_openai_shape(authorization: str) -> None:
    answer = get("/v1/models", "right", Authorization=authorization)
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"


def test_a_key_may_come_in_a_header_of_its_own() -> None:
    tenant = get("/v1/models", "right", Authorization="Bearer right").text
    assert get("/v1/models", "right", **{"x-api-key": "right"}).text == tenant
    both = {"x-api-key": "right", "Authorization": "Bearer another"}
    assert get("/v1/models", "right", **both).text == tenant
    assert get("/v1/models", "right", **{"x-api-key": "wrong"}).status_code == 401


def test_clients_of_another_api_are_refused_in_its_shape() -> None:
    answer = get("/v1/models", "right", **{"anthropic-version": "2023-06-01"})
    assert answer.status_code == 401 and answer.json()["type"] == "error"
    assert answer.json()["error"]["type"] == "authentication_error"


def test_unknown_routes_are_refused_too() -> None:
    assert get("/nothing", "right").status_code == 401


def test_health_needs_no_key() -> None:
    assert get("/health", "right").status_code == 200


def test_each_key_is_a_tenant_that_depends_on_the_servers_secret() -> None:
    def tenant(key: str, secret: bytes = SECRET) -> str:
        return get("/v1/models", "a", "b", secret=secret, Authorization=f"Bearer {key}").text

    assert len({tenant("a"), tenant("b"), tenant("a", b"other"), ""}) == 4
    assert tenant("a") == tenant("a")


def test_keys_come_from_options_and_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("two\n\n  three \ntwo\n")
    config = ServerConfig(api_key=("one",), api_key_file=path)
    assert read_keys(config) == ("one", "two", "three")


def test_a_key_file_without_keys_does_not_open_the_server(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("\n")
    with pytest.raises(LongctxError, match="has no key in it"):
        read_keys(ServerConfig(api_key_file=path))
    with pytest.raises(LongctxError, match="cannot read"):
        read_keys(ServerConfig(api_key_file=tmp_path / "none"))
    with pytest.raises(ValueError, match="api_key is empty"):
        ServerConfig(api_key=("",))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_key_file_may_have_a_mark_and_two_bytes_a_character(
    tmp_path: Path, encoding: str
) -> None:
    path = tmp_path / "keys"
    path.write_bytes("one\r\ntwo\r\n".encode(encoding))
    assert read_keys(ServerConfig(api_key_file=path)) == ("one", "two")


@pytest.mark.parametrize("key", ["clé", "two words", "nul\0"])
def test_a_key_that_no_client_can_send_is_refused(tmp_path: Path, key: str) -> None:
    path = tmp_path / "keys"
    path.write_text(f"good\n{key}\n", encoding="utf-8")
    with pytest.raises(LongctxError, match="API key number 2 has a space or a character"):
        read_keys(ServerConfig(api_key_file=path))
    with pytest.raises(LongctxError, match="API key number 1"):
        read_keys(ServerConfig(api_key=(key,)))


def test_a_key_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_bytes(b"\x80\x81")
    with pytest.raises(LongctxError, match="cannot read the API keys"):
        read_keys(ServerConfig(api_key_file=path))
