"""Reads request bodies, up to a limit, into the types of `bodies.py`."""

import asyncio
from collections.abc import AsyncIterator
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.requests import Request

from api.http.errors import ApiError, invalid_body

# JSON is parsed in one go on the event loop, at about 300 MB/s.
MAX_JSON_BYTES = 16 << 20
# Of a refused body this much is still read, while it comes: a client that is busy sending sees no
# answer, and one that waits for an answer sends nothing.
MAX_DISCARDED_BYTES = 256 << 20
DISCARD_SECONDS = 1.0

BodyType = TypeVar("BodyType", bound=BaseModel)


async def read_json(
    request: Request, body_type: type[BodyType], *, if_empty: bytes = b""
) -> BodyType:
    """Reads the body as `body_type`; `if_empty` stands for an empty body.

    Raises ApiError 413 above MAX_JSON_BYTES, and 400 for a body that is none.
    """
    return parse(await read_body(request) or if_empty, body_type)


def parse(body: bytes | bytearray, body_type: type[BodyType]) -> BodyType:
    """Returns JSON as `body_type`. Raises ApiError 400 that names what is wrong."""
    try:
        return body_type.model_validate_json(body)
    except ValidationError as error:
        try:
            sent = from_json(body)
        except ValueError:
            sent = None
        raise invalid_body(error, sent) from None


async def read_body(request: Request) -> bytearray:
    """Reads the whole body. Raises ApiError 413 above MAX_JSON_BYTES."""
    too_large = ApiError(
        413,
        f"the body is larger than {MAX_JSON_BYTES >> 20} MiB; "
        "upload long text to /v1/files and refer to it by file_id",
    )
    if announced_bytes(request) > MAX_JSON_BYTES:
        raise too_large  # what is still sent is dropped by the server below
    body = bytearray()
    stream = request.stream()
    async for chunk in stream:
        body += chunk
        if len(body) > MAX_JSON_BYTES:
            await discard(stream)
            raise too_large
    return body


def announced_bytes(request: Request) -> int:
    """Returns how long the client says that the body is; 0 where it does not say so."""
    return int(request.headers.get("content-length", 0))


async def discard(stream: AsyncIterator[bytes]) -> None:
    """Reads the rest of a body that is refused, but no more than MAX_DISCARDED_BYTES of it, and
    only as long as it comes."""
    discarded = 0
    while discarded <= MAX_DISCARDED_BYTES:
        try:
            async with asyncio.timeout(DISCARD_SECONDS):
                discarded += len(await anext(stream))
        except (StopAsyncIteration, TimeoutError):
            return
