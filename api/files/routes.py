"""`/v1/files`: OpenAI's file API; an object `longctx` in each says how far the file is.

A file is tokenized and computed in the background as soon as it is uploaded, under the system
prompt given with it, so that the first question already finds it.
"""

import datetime
import mimetypes
import time
import uuid
from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response

from api.background.store_dir import StoreDir
from api.files import lifetime
from api.files.document import Document
from api.files.document_library import DocumentLibrary
from api.files.document_store import FILE_PREFIX, DocumentRecord
from api.files.multipart import MultipartReader
from api.files.reading import Reading
from api.files.upload import Upload
from api.http.auth import tenant_of
from api.http.errors import ApiError, invalid_body
from api.http.message_bodies import RequestBody
from api.http.openapi import Body

PURPOSES = ("user_data", "assistants")
FIELDS = {
    "purpose": {"type": "string", "enum": PURPOSES, "default": PURPOSES[0]},
    "system": {"type": "string"},
    **lifetime.FIELDS,
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
# The words that clients of OpenAI's API know for a file's state.
STATUS = {"queued": "uploaded", "processing": "uploaded", "ready": "processed", "error": "error"}


class ListQuery(RequestBody):
    purpose: str | None = None
    order: Literal["asc", "desc"] = "desc"
    after: str | None = None
    limit: Annotated[int, Field(ge=1, le=10_000, strict=False)] = 10_000


class FileRoutes:
    """The endpoints of `/v1/files`. Each tenant sees only its own files."""

    def __init__(
        self,
        library: DocumentLibrary,
        folder: StoreDir,
        *,
        max_upload_bytes: int,
    ) -> None:
        self.library = library
        self.folder = folder
        self.max_upload_bytes = max_upload_bytes

    async def create(self, request: Request) -> Response:
        """Stores an uploaded text and has it computed in the background."""
        document = await self.receive(request, FIELDS, lifetime.seconds_of)
        return JSONResponse(self.body(document))

    async def receive(
        self,
        request: Request,
        allowed: Collection[str],
        seconds_of: Callable[[Mapping[str, str]], int | None],
    ) -> Document:
        """Stores the file of a form, whose other fields may have the names `allowed`.

        `seconds_of` reads from these how long the file lives. Raises ApiError for a form or a file
        that is refused.
        """
        with Upload(self.folder.new_upload_path(), limit_bytes=self.max_upload_bytes) as upload:
            form = MultipartReader(upload, allowed=frozenset(allowed))
            await form.receive(request)
            purpose = form.fields.get("purpose", PURPOSES[0])
            if purpose not in PURPOSES:
                raise ApiError(
                    400,
                    f"purpose {purpose!r} is not supported; use {' or '.join(PURPOSES)}",
                    param="purpose",
                )
            assert form.filename is not None
            record = new_record(
                upload,
                tenant=tenant_of(request),
                filename=form.filename,
                purpose=purpose,
                system=form.fields.get("system"),
                seconds=seconds_of(form.fields),
            )
            return await self.library.add(record, upload.path)

    async def list(self, request: Request) -> Response:
        """Lists the caller's files, page by page."""
        parameters = dict(request.query_params)
        try:
            query = ListQuery.model_validate(parameters)
        except ValidationError as error:
            raise invalid_body(error, parameters) from None
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
        page = [self.body(document) for document in found[: query.limit]]
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
        return JSONResponse(self.body(self._find(request)))

    async def content(self, request: Request) -> Response:
        """Returns a file as it was uploaded."""
        document = self._find(request)
        filename = document.record.filename
        return FileResponse(
            self.library.upload_path(document),
            media_type=mimetypes.guess_type(filename)[0] or "text/plain",
            filename=filename,
        )

    async def text(self, request: Request) -> Response:
        """Returns the text of a file as the model reads it; 409 until it was read."""
        document = self._find_read(request)
        return FileResponse(self.library.text_path(document), media_type="text/plain")

    async def sections(self, request: Request) -> Response:
        """Lists where pages, headings and files begin in the text, by its characters."""
        reading = self._find_read(request).reading
        sections = () if reading is None else reading.sections
        return JSONResponse(
            {
                "object": "list",
                "data": [{"offset": each.offset, "label": each.label} for each in sections],
            }
        )

    async def delete(self, request: Request) -> Response:
        """Deletes a file, with all that stems from it in every tier; `longctx` is the receipt.

        Its `erased` has blocks and bytes by tier. `waiting_for` is empty once nothing is left: else
        it counts the requests that were asked before and go on, transfers and deletions under way,
        blocks that could not be deleted, or says that the engine is being restarted.
        """
        document = self._find(request)
        receipt = await self.library.remove(document)
        return JSONResponse(
            {"id": document.id, "object": "file", "deleted": True, "longctx": receipt.body()}
        )

    def _find(self, request: Request) -> Document:
        return self.library.find(tenant_of(request), request.path_params["file_id"])

    def _find_read(self, request: Request) -> Document:
        document = self._find(request)
        if document.record.tokens is None:
            why = document.error or "it is not read yet; GET the file to see how far it is"
            raise ApiError(409, f"file {document.id} has no text: {why}", code="file_not_read")
        return document

    def body(self, document: Document) -> dict[str, Any]:
        """Makes a file's object, as OpenAI's clients get it."""
        record = document.record
        state = self.library.state(document)
        return {
            "id": record.id,
            "object": "file",
            "bytes": record.bytes,
            "created_at": record.created_at,
            "expires_at": record.expires_at,
            "filename": record.filename,
            "purpose": record.purpose,
            "status": STATUS[state],
            "status_details": document.error,
            "longctx": {
                "state": state,
                "error": document.error,
                **_reading(document.reading),
                "tokens": record.tokens,
                "prefilled_tokens": self.library.prefilled_tokens(document),
                "durable_tokens": self.library.durable_tokens(document),
                "kv_bytes": self.library.kv_bytes(document),
                "eta_seconds": self.library.eta_seconds(document),
                "prefix": {
                    "system": record.system,
                    "date": record.date,
                    "tokens": len(document.prefix),
                    "last_difference": document.prefix_difference,
                },
            },
        }


def _reading(reading: Reading | None) -> dict[str, Any]:
    """Tells how a document was read: one that was UTF-8 text as it came needed no reading."""
    if reading is None:
        return {"format": "text", "encoding": "utf-8", "sections": 0, "skipped": []}
    return {
        "format": reading.format,
        "encoding": reading.encoding,
        "sections": len(reading.sections),
        "skipped": list(reading.skipped),
    }


def new_record(
    upload: Upload,
    *,
    tenant: str,
    filename: str,
    purpose: str,
    system: str | None,
    seconds: int | None = None,
) -> DocumentRecord:
    """Makes the record of a file that has just been received, and lives for so many seconds."""
    now = int(time.time())
    return DocumentRecord(
        id=f"{FILE_PREFIX}{uuid.uuid4().hex}",
        tenant=tenant,
        filename=filename,
        purpose=purpose,
        bytes=upload.size_bytes,
        created_at=now,
        sha256=upload.sha256,
        system=system,
        date=datetime.date.today().isoformat(),
        expires_at=None if seconds is None else now + seconds,
    )
