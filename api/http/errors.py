"""Says what a client is told of each error: the status and the words.

`api_error` turns whatever was raised into an `ApiError`, for plain answers and for streams alike.
Its `body` is OpenAI's: `{"error": {"message", "type", "param", "code"}}`; for clients of other APIs
`refusals.py` writes it in theirs.
"""

import errno
import logging
import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from starlette.exceptions import HTTPException

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
            return invalid_body(error, None)
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


def renamed(error: ApiError, names: Mapping[str, str]) -> ApiError:
    """Returns an error in the words of another API, which has other `names` for parameters."""
    param, message = error.param, error.message
    for name, there in names.items():
        if param is not None and (param == name or param.startswith((f"{name}.", f"{name}["))):
            param = there + param.removeprefix(name)
            break
    for name, there in names.items():
        if "_" in name:  # no word of a sentence
            message = message.replace(name, there)
    return ApiError(error.status, message, param=param, code=error.code, headers=error.headers)


@contextmanager
def in_words_of(names: Mapping[str, str]) -> Iterator[None]:
    """Raises what fails within as an ApiError in the words of another API; see `renamed`."""
    try:
        yield
    except LongctxError as error:
        raise renamed(api_error(error), names) from error
    except ApiError as error:
        raise renamed(error, names) from error


def full_disk(folder: str | Path | None) -> ApiError:
    """Returns the refusal of what there is no room for; `folder`: where, if that is known."""
    where = _shown(folder) if folder else "--store-dir"
    return ApiError(
        507,
        f"the disk of {where} is full, and nothing was stored; free some space, or start the "
        "server with another --store-dir",
        code="insufficient_storage",
    )


def _shown(path: str | Path) -> str:
    """Returns a path as JSON can hold it: one that is not UTF-8 is shown with marks in it."""
    return os.fsencode(path).decode("utf-8", "replace")


def invalid_body(error: ValidationError, body: Any) -> ApiError:
    """Returns the refusal of a body, with the way to its first fault: `messages[0].content`.

    `body`: as the client sent it, parsed; None where it has no fields or could not be parsed.
    """
    first = error.errors(include_url=False, include_input=False)[0]
    path = _path(first["loc"], body, missing=first["type"] == "missing")
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
            # What is wrong between fields is said of the whole body, beginning with the first one.
            field = reason.partition(" ")[0]
            if path is None and isinstance(body, dict) and field in body:
                path = field
        case _:
            message, code = f"{path or 'the body'}: {first['msg']}", "invalid_value"
    return ApiError(400, message, param=path, code=code)


def _path(location: Sequence[int | str], body: Any, *, missing: bool) -> str | None:
    """Returns the way through `body` in the client's own names.

    `location` names the branches of unions, too, which the client has never heard of, and some are
    called like a field. What leads furthest is the way; at its end may be what is missing.
    """
    path = "".join(_steps(location, body, missing=missing))
    return path.removeprefix(".") or None


def _steps(location: Sequence[int | str], node: Any, *, missing: bool) -> list[str]:
    if not location:
        return []
    part, rest = location[0], location[1:]
    without = _steps(rest, node, missing=missing)
    if isinstance(part, int):
        if not isinstance(node, list) or part >= len(node):
            return without
        return [f"[{part}]", *_steps(rest, node[part], missing=missing)]
    if not isinstance(node, dict) or not (part in node or (missing and not rest)):
        return without
    within = [f".{part}", *_steps(rest, node.get(part), missing=missing)]
    return within if len(within) > len(without) else without


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
