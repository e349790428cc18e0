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

GOOGLE_STATUS: dict[int, str] = {
    HTTPStatus.UNAUTHORIZED: "UNAUTHENTICATED",
    HTTPStatus.FORBIDDEN: "PERMISSION_DENIED",
    HTTPStatus.NOT_FOUND: "NOT_FOUND",
    HTTPStatus.METHOD_NOT_ALLOWED: "UNIMPLEMENTED",
    HTTPStatus.CONFLICT: "ABORTED",
    HTTPStatus.TOO_MANY_REQUESTS: "RESOURCE_EXHAUSTED",
    HTTPStatus.SERVICE_UNAVAILABLE: "UNAVAILABLE",
    HTTPStatus.INSUFFICIENT_STORAGE: "RESOURCE_EXHAUSTED",
}
# What Gemini calls the fields of a question that OpenAI calls something else.
GEMINI_FIELDS = {
    "messages": "contents",
    "max_tokens": "generationConfig.maxOutputTokens",
    "temperature": "generationConfig.temperature",
    "top_p": "generationConfig.topP",
    "top_k": "generationConfig.topK",
    "stop": "generationConfig.stopSequences",
    "n": "generationConfig.candidateCount",
    "seed": "generationConfig.seed",
    "logprobs": "generationConfig.logprobs",
    "presence_penalty": "generationConfig.presencePenalty",
    "frequency_penalty": "generationConfig.frequencyPenalty",
    "response_format": "generationConfig.responseMimeType",
    "response_format.json_schema.schema": "generationConfig.responseSchema",
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


def speaks_gemini(connection: HTTPConnection) -> bool:
    """Tells whether a request is of Gemini's API, by the version in its path."""
    path: str = connection.scope["path"]
    return path.startswith(("/v1beta/", "/upload/v1beta/"))


def gemini_body(error: ApiError) -> JSONObject:
    """Writes an error as Google does: `details` name the field at fault, and our code."""
    details: list[JSONObject] = []
    if error.code is not None:
        info = {"reason": error.code.upper(), "domain": "longctx", "metadata": {}}
        details.append({"@type": "type.googleapis.com/google.rpc.ErrorInfo", **info})
    if error.param is not None:
        field = GEMINI_FIELDS.get(error.param, error.param)
        violations = [{"field": field, "description": error.message}]
        kind = "type.googleapis.com/google.rpc.BadRequest"
        details.append({"@type": kind, "fieldViolations": violations})
    other = "INTERNAL" if error.status >= 500 else "INVALID_ARGUMENT"
    told = {
        "code": error.status,
        "message": error.message,
        "status": GOOGLE_STATUS.get(error.status, other),
    }
    return {"error": {**told, "details": details} if details else told}


DIALECTS = (Dialect(speaks_anthropic, anthropic_body), Dialect(speaks_gemini, gemini_body))


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
