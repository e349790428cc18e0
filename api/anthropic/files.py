"""`/v1/files` for clients that send `anthropic-version`: the same files, in Anthropic's shape."""

import datetime
import functools
import mimetypes
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from api.files.document import Document
from api.files.routes import FileRoutes
from api.http.auth import tenant_of
from api.http.errors import ApiError, invalid_body
from api.http.message_bodies import RequestBody
from api.http.openapi import Endpoint
from api.http.refusals import speaks_anthropic

LEAST_SECONDS = 3600
MOST_SECONDS = 7_776_000
TERM = "expires_in_seconds"
SECONDS = TypeAdapter(Annotated[int, Field(ge=LEAST_SECONDS, le=MOST_SECONDS)])


class AnthropicListQuery(RequestBody):
    limit: Annotated[int, Field(ge=1, le=1000, strict=False)] = 20
    page: str | None = None
    after_id: str | None = None  # earlier clients'
    ids: list[str] | None = None


def by_client(openai: Endpoint, anthropic: Endpoint) -> Endpoint:
    """Makes an endpoint that answers each client in the shape of its own API."""

    @functools.wraps(openai)
    async def endpoint(request: Request) -> Response:
        return await (anthropic if speaks_anthropic(request) else openai)(request)

    return endpoint


class AnthropicFileRoutes:
    """The endpoints of `/v1/files` whose answers differ. Each tenant sees only its own files."""

    def __init__(self, files: FileRoutes) -> None:
        self.files = files

    async def create(self, request: Request) -> Response:
        """Stores an uploaded text and has it computed in the background."""
        document = await self.files.receive(request, (TERM, "system"), _seconds)
        return JSONResponse(self._body(document))

    async def list(self, request: Request) -> Response:
        """Lists the caller's files, the newest first, page by page or by their ids."""
        given = request.query_params
        parameters: dict[str, Any] = {name: given[name] for name in given if name != "ids[]"}
        if ids := [*given.getlist("ids"), *given.getlist("ids[]")]:
            parameters["ids"] = ids
        try:
            query = AnthropicListQuery.model_validate(parameters)
        except ValidationError as error:
            raise invalid_body(error, parameters) from None
        tenant, library = tenant_of(request), self.files.library
        after = query.after_id if query.page is None else query.page
        if after is not None:
            library.find(tenant, after, param="after_id" if query.page is None else "page")
        if query.ids is None:
            found = await library.page(
                tenant, purpose=None, order="desc", after=after, limit=query.limit + 1
            )
        else:
            wanted = frozenset(query.ids)
            every = [each for each in library.documents() if each.record.tenant == tenant]
            found = [each for each in every if each.id in wanted][: query.limit]
        page = [self._body(document) for document in found[: query.limit]]
        more = len(found) > query.limit
        return JSONResponse(
            {
                "data": page,
                "has_more": more,
                "next_page": page[-1]["id"] if more else None,
                "first_id": page[0]["id"] if page else None,
                "last_id": page[-1]["id"] if page else None,
            }
        )

    async def retrieve(self, request: Request) -> Response:
        """Returns a file's metadata; its object `longctx` tells how far its computation is."""
        return JSONResponse(self._body(self._find(request)))

    async def delete(self, request: Request) -> Response:
        """Deletes a file, with all that stems from it in every tier; `longctx` is the receipt."""
        document = self._find(request)
        receipt = await self.files.library.remove(document)
        told = {"id": document.id, "type": "file_deleted", "longctx": receipt.body()}
        return JSONResponse(told)

    def _find(self, request: Request) -> Document:
        return self.files.library.find(tenant_of(request), request.path_params["file_id"])

    def _body(self, document: Document) -> dict[str, Any]:
        record = document.record
        return {
            "id": record.id,
            "type": "file",
            "filename": record.filename,
            "mime_type": mimetypes.guess_type(record.filename)[0] or "text/plain",
            "size_bytes": record.bytes,
            "created_at": _time(record.created_at),
            "expires_at": None if record.expires_at is None else _time(record.expires_at),
            "downloadable": True,
            "longctx": self.files.body(document)["longctx"],
        }


def _seconds(fields: Mapping[str, str]) -> int | None:
    """Returns after how long a file is to be deleted. Raises ApiError 400 for no such term."""
    if TERM not in fields:
        return None
    try:
        return SECONDS.validate_python(fields[TERM])
    except ValidationError as error:
        raise ApiError(
            400,
            f"{TERM} is {fields[TERM]!r}; send a whole number from {LEAST_SECONDS} to "
            f"{MOST_SECONDS}",
            param=TERM,
            code="invalid_value",
        ) from error


def _time(seconds: int) -> str:
    moment = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")
