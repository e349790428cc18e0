"""`/v1/files`: OpenAI's file API; an object `longctx` in each file says how far it has come.

A file is read and computed in the background as soon as it is uploaded, under the system prompt
given with it, so that the first question already finds it.
"""

import datetime
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response

from api.background.store_dir import StoreDir
from api.files.document_library import Entry, Library
from api.files.document_store import Document
from api.files.multipart import Form
from api.files.upload import Draft
from api.http.auth import tenant_of
from api.http.bodies import Wire
from api.http.errors import ApiError
from api.http.openapi import Body

PURPOSES = ("user_data", "assistants")
FIELDS = {
    "purpose": {"type": "string", "enum": PURPOSES, "default": PURPOSES[0]},
    "system": {"type": "string"},
}
UPLOAD_BODY = Body(
    content={
        "multipart/form-data": {
            "type": "object",
            "properties": {"file": {"type": "string", "format": "binary"}, **FIELDS},
            "required": ["file"],
            "additionalProperties": False,
        }
    }
)
# What the rest of OpenAI's API expects of a file's state.
STATUS = {"queued": "uploaded", "processing": "uploaded", "ready": "processed", "error": "error"}


class ListQuery(Wire):
    purpose: str | None = None
    order: Literal["asc", "desc"] = "desc"
    after: str | None = None
    limit: Annotated[int, Field(ge=1, le=10_000, strict=False)] = 10_000


class Files:
    def __init__(
        self,
        library: Library,
        folder: StoreDir,
        forget: Sequence[Callable[[str], Awaitable[None]]],
        *,
        max_upload_bytes: int,
    ) -> None:
        """`forget`: what else is to be told the id of a file that was deleted."""
        self.library = library
        self.folder = folder
        self.forget = forget
        self.max_upload_bytes = max_upload_bytes

    async def create(self, request: Request) -> Response:
        """Stores an uploaded text and has it computed in the background."""
        with Draft(self.folder.new_draft(), limit_bytes=self.max_upload_bytes) as draft:
            form = Form(draft, allowed=frozenset(FIELDS))
            await form.receive(request)
            purpose = form.fields.get("purpose", PURPOSES[0])
            if purpose not in PURPOSES:
                raise ApiError(
                    400,
                    f"purpose {purpose!r} is not supported; use {' or '.join(PURPOSES)}",
                    param="purpose",
                )
            assert form.filename is not None
            document = new_document(
                draft,
                tenant=tenant_of(request),
                filename=form.filename,
                purpose=purpose,
                system=form.fields.get("system"),
            )
            entry = await self.library.add(document, draft.path)
        return JSONResponse(self._body(entry))

    async def list(self, request: Request) -> Response:
        """Lists the caller's files, page by page."""
        query = ListQuery.model_validate(dict(request.query_params))
        tenant = tenant_of(request)
        if query.after is not None:
            self.library.find(tenant, query.after, param="after")
        found = await self.library.page(
            tenant,
            purpose=query.purpose,
            order=query.order,
            after=query.after,
            limit=query.limit + 1,
        )
        page = [self._body(entry) for entry in found[: query.limit]]
        return JSONResponse(
            {
                "object": "list",
                "data": page,
                "has_more": len(found) > query.limit,
                "first_id": page[0]["id"] if page else None,
                "last_id": page[-1]["id"] if page else None,
            }
        )

    async def retrieve(self, request: Request) -> Response:
        """Returns a file's object, which tells how far its computation is."""
        return JSONResponse(self._body(self._find(request)))

    async def content(self, request: Request) -> Response:
        """Returns the text of a file as it was uploaded."""
        entry = self._find(request)
        return FileResponse(
            self.library.text_path(entry),
            media_type="text/plain",
            filename=entry.document.filename,
        )

    async def delete(self, request: Request) -> Response:
        """Deletes a file, with its KV blocks in every tier."""
        entry = self._find(request)
        await self.library.remove(entry)
        for forget in self.forget:
            await forget(entry.document.id)
        return JSONResponse({"id": entry.document.id, "object": "file", "deleted": True})

    def _find(self, request: Request) -> Entry:
        return self.library.find(tenant_of(request), request.path_params["file_id"])

    def _body(self, entry: Entry) -> dict[str, Any]:
        document = entry.document
        state = self.library.state(entry)
        return {
            "id": document.id,
            "object": "file",
            "bytes": document.bytes,
            "created_at": document.created_at,
            "filename": document.filename,
            "purpose": document.purpose,
            "status": STATUS[state],
            "status_details": entry.error,
            "longctx": {
                "state": state,
                "error": entry.error,
                "tokens": document.tokens,
                "prefilled_tokens": self.library.prefilled_tokens(entry),
                "durable_tokens": self.library.durable_tokens(entry),
                "kv_bytes": self.library.kv_bytes(entry),
                "eta_seconds": self.library.eta_seconds(entry),
                "prefix": {
                    "system": document.system,
                    "date": document.date,
                    "tokens": len(entry.prefix),
                    "last_difference": entry.differed,
                },
            },
        }


def new_document(
    draft: Draft, *, tenant: str, filename: str, purpose: str, system: str | None
) -> Document:
    """What is known of a file that has just been received."""
    return Document(
        id=f"file-{uuid.uuid4().hex}",
        tenant=tenant,
        filename=filename,
        purpose=purpose,
        bytes=draft.size,
        created_at=int(time.time()),
        sha256=draft.sha256,
        system=system,
        date=datetime.date.today().isoformat(),
    )
