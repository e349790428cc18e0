import asyncio
import errno

import httpx
import pytest
from fastapi import FastAPI

from api.http.errors import ApiError, api_error
from api.http.refusals import HANDLERS
from longctx.errors import (
    ContextTooLong,
    DocumentMissing,
    EngineDied,
    InvalidRequest,
    LongctxError,
    Overloaded,
)


@pytest.mark.parametrize(
    ("error", "status", "kind", "code"),
    [
        (InvalidRequest("no", param="n"), 400, "invalid_request_error", "invalid_value"),
        (ContextTooLong("no"), 400, "invalid_request_error", "context_length_exceeded"),
        (ApiError(404, "no", code="gone"), 404, "invalid_request_error", "gone"),
        (Overloaded("no"), 429, "rate_limit_error", "overloaded"),
        (LongctxError("no"), 500, "server_error", "engine_error"),
        (EngineDied("no"), 503, "server_error", "engine_died"),
        (DocumentMissing("no"), 503, "server_error", "engine_died"),
    ],
)
def test_each_error_has_its_status(error: Exception, status: int, kind: str, code: str) -> None:
    answered = api_error(error)
    assert answered.status == status
    assert answered.body["error"] == {
        "message": "no",
        "type": kind,
        "param": "n" if isinstance(error, InvalidRequest) and error.param else None,
        "code": code,
    }


def test_a_surprise_tells_the_client_nothing_of_our_insides() -> None:
    async def fail() -> None:
        raise KeyError("secret path")

    async def main() -> httpx.Response:
        app = FastAPI(exception_handlers=HANDLERS)
        app.add_api_route("/", fail)
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.get("/")

    answered = asyncio.run(main())
    assert (answered.status_code, answered.json()["error"]["type"]) == (500, "server_error")
    assert "secret" not in answered.text


def test_who_should_try_again_is_told_when() -> None:
    assert api_error(Overloaded("no")).headers == {"Retry-After": "1"}


def test_a_server_without_descriptors_is_busy_not_broken() -> None:
    answered = api_error(OSError(errno.EMFILE, "Too many open files", "/store/x.partial"))
    assert (answered.status, answered.code) == (503, "overloaded")
    assert "limit of open files" in answered.message and "/store" not in answered.message
