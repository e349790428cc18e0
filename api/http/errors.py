"""Gives every refusal OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`.

`api_error` turns whatever was raised into an `ApiError`; the status and the words are chosen here
and nowhere else, for plain answers and for streams alike.
"""

import errno
import logging
import sqlite3
from collections.abc import Callable, Coroutine
from http import HTTPStatus
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from longctx.errors import (
    ContextTooLong,
    DocumentMissing,
    EngineDied,
    InvalidRequest,
    LongctxError,
    Overloaded,
)
from prompt_cache.errors import SchemaError

logger = logging.getLogger("longctx.api")

CLIENT_CLOSED_REQUEST = 499  # nobody reads it; it keeps logs truthful


class ApiError(Exception):
    """Raised for an answer other than success, with the words that the client gets."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers

    @property
    def body(self) -> dict[str, Any]:
        if self.status == HTTPStatus.TOO_MANY_REQUESTS:
            kind = "rate_limit_error"
        elif self.status >= 500:
            kind = "server_error"
        else:
            kind = "invalid_request_error"
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> Response:
        return JSONResponse(self.body, self.status, self.headers)


def api_error(error: Exception) -> ApiError:
    """Returns what the client is told. A surprise is a bare 500; its details are logged."""
    match error:
        case ApiError():
            return error
        case ContextTooLong():
            return ApiError(400, str(error), param=error.param, code="context_length_exceeded")
        case SchemaError():
            return ApiError(400, str(error), param=error.param, code="invalid_value")
        case InvalidRequest():
            return ApiError(400, str(error), param=error.param, code="invalid_value")
        case Overloaded():
            return ApiError(429, str(error), code="overloaded", headers={"Retry-After": "1"})
        case EngineDied() | DocumentMissing():  # a new engine has not opened its documents yet
            return ApiError(503, str(error), code="engine_died", headers={"Retry-After": "2"})
        case LongctxError():
            return ApiError(500, str(error), code="engine_error")
        case ValidationError():
            return _invalid_body(error)
        case HTTPException():
            return _http_error(error)
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            return full_disk(error.filename)
        case sqlite3.OperationalError(sqlite_errorcode=sqlite3.SQLITE_FULL):
            return full_disk(None)
        case OSError(errno=errno.EMFILE | errno.ENFILE):
            return ApiError(
                503,
                "the server has as many files open as it may; try again, or start it with a "
                "higher limit of open files",
                code="overloaded",
                headers={"Retry-After": "1"},
            )
        case _:
            return ApiError(500, "the server failed; its log says why", code="internal_error")


def full_disk(folder: str | Path | None) -> ApiError:
    """Returns the refusal of what there is no room for; `folder`: where, if that is known."""
    return ApiError(
        507,
        f"the disk of {folder or '--store-dir'} is full, and nothing was stored; free some space, "
        "or start the server with another --store-dir",
        code="insufficient_storage",
    )


def _invalid_body(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_input=False)[0]
    # A union's branches appear in the path by their type's name; users know fields and positions.
    path = ".".join(str(part) for part in first["loc"] if _is_field(part)) or None
    match first["type"]:
        case "json_invalid":
            return ApiError(400, f"the body is not JSON: {first['msg']}", code="invalid_json")
        case "extra_forbidden":
            return ApiError(400, f"unknown parameter: {path}", param=path, code="unknown_parameter")
        case "missing":
            message, code = f"{path} is required", "missing_required_parameter"
        case "value_error":
            reason = first["msg"].removeprefix("Value error, ")
            message, code = (f"{path} {reason}" if path else reason), "unsupported_value"
        case _:
            message, code = f"{path or 'the body'}: {first['msg']}", "invalid_value"
    return ApiError(400, message, param=path, code=code)


def _is_field(part: int | str) -> bool:
    return isinstance(part, int) or (part.replace("_", "").isalpha() and part.islower())


def _http_error(error: HTTPException) -> ApiError:
    headers = dict(error.headers) if error.headers else None
    match error.status_code:
        case 404:
            message = "there is no such route; the API is under /v1"
        case 405:
            message = f"this method is not allowed here; allowed: {(headers or {}).get('Allow')}"
        case _:
            message = str(error.detail)
    return ApiError(error.status_code, message, headers=headers)


async def answer_error(request: Request, error: Exception) -> Response:
    if isinstance(error, ClientDisconnect):
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    return api_error(error).response()


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
