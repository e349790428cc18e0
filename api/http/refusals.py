"""Answers errors in the shape of the API that the client speaks.

That is OpenAI's, unless one of `DIALECTS` recognizes the request by its path or its headers.
"""

from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.responses import JSONResponse, Response

from api.http.errors import ApiError, api_error
from api.http.sse import JSONObject
from longctx.errors import LongctxError
from prompt_cache.errors import SchemaError

CLIENT_CLOSED_REQUEST = 499  # nobody reads it; it keeps logs truthful
ANTHROPIC_KINDS: dict[int, str] = {
    HTTPStatus.UNAUTHORIZED: "authentication_error",
    HTTPStatus.FORBIDDEN: "permission_error",
    HTTPStatus.NOT_FOUND: "not_found_error",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "request_too_large",
    HTTPStatus.TOO_MANY_REQUESTS: "rate_limit_error",
    HTTPStatus.SERVICE_UNAVAILABLE: "overloaded_error",
}


@dataclass(frozen=True, slots=True)
class Dialect:
    """An API other than OpenAI's: whether a request is of it, and the body of an error."""

    speaks: Callable[[HTTPConnection], bool]
    body: Callable[[ApiError], JSONObject]


def speaks_anthropic(connection: HTTPConnection) -> bool:
    """Tells whether a request is of Anthropic's API, whose clients name its version."""
    path = connection.scope["path"]
    return path.startswith("/v1/messages") or "anthropic-version" in connection.headers


def anthropic_body(error: ApiError) -> JSONObject:
    """Writes an error as Anthropic does; `param` is beside what its clients know."""
    other = "api_error" if error.status >= 500 else "invalid_request_error"
    kind = ANTHROPIC_KINDS.get(error.status, other)
    told = {"type": kind, "message": error.message, "param": error.param}
    return {"type": "error", "error": told}


DIALECTS = (Dialect(speaks_anthropic, anthropic_body),)


def refusal(connection: HTTPConnection, error: ApiError) -> Response:
    """Returns the answer to a request that ends with this error."""
    write = next((each.body for each in DIALECTS if each.speaks(connection)), None)
    body = error.body if write is None else write(error)
    return JSONResponse(body, error.status, error.headers)


async def answer_error(request: Request, error: Exception) -> Response:
    if isinstance(error, ClientDisconnect):
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    return refusal(request, api_error(error))


# The last is for what nobody expected: it is answered here and then logged by the server.
HANDLERS: dict[int | type[Exception], Callable[[Request, Any], Coroutine[Any, Any, Response]]] = {
    kind: answer_error
    for kind in (
        ApiError,
        LongctxError,
        SchemaError,
        ValidationError,
        HTTPException,
        ClientDisconnect,
        Exception,
    )
}
