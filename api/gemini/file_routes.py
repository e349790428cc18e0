"""`/v1beta/files`, and `/upload/v1beta/files`: Gemini's file API, with its resumable uploads.

The files are those of `/v1/files`; here they are called `files/ID`, without the prefix of our ids.
"""

import base64
import json
import mimetypes
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from api.files.document import Document
from api.files.resumable import ResumableUploads, UploadSession
from api.files.routes import PURPOSES, FileRoutes, new_record
from api.gemini.bodies import UploadRequest
from api.gemini.paging import page_of
from api.gemini.questions import document_id
from api.gemini.times import written
from api.http.auth import OPEN_BEGINNING, tenant_of
from api.http.errors import ApiError
from api.http.openapi import JSON, Body
from api.http.read_body import read_json
from api.http.sse import JSONObject

UPLOAD_BEGIN_BODY = Body(content={JSON: UploadRequest}, required=False)
UPLOAD_PIECE = Body(
    content={"application/octet-stream": {"type": "string", "format": "binary"}}, required=False
)
PAGE_FILES = 10
MOST_PAGE_FILES = 100
PREFIX = "X-Goog-Upload-"
STATES = {"queued": "PROCESSING", "processing": "PROCESSING", "ready": "ACTIVE", "error": "FAILED"}
TYPES = {"pdf": "application/pdf", "epub": "application/epub+zip", "html": "text/html"}
ENDED = {f"{PREFIX}Status": "final"}  # clients try again where this is missing


class GeminiFileRoutes:
    """The endpoints of files. Each tenant sees only its own."""

    def __init__(self, files: FileRoutes, uploads: ResumableUploads) -> None:
        self.files = files
        self.uploads = uploads

    async def begin(self, request: Request) -> Response:
        """Begins an upload; its address is in the header `X-Goog-Upload-URL`."""
        headers = request.headers
        protocol = headers.get(f"{PREFIX}Protocol", "")
        command = headers.get(f"{PREFIX}Command", "")
        if protocol.lower() != "resumable" or command.lower() != "start":
            raise ApiError(
                400,
                "an upload begins with 'X-Goog-Upload-Protocol: resumable' and "
                "'X-Goog-Upload-Command: start'; other ways to upload are not taken",
                code="unsupported_value",
            )
        wanted = await read_json(request, UploadRequest, if_empty=b"{}")
        declared = headers.get(f"{PREFIX}Header-Content-Length")
        filename = wanted.file.display_name or headers.get(f"{PREFIX}File-Name") or "file"
        session = self.uploads.begin(
            tenant_of(request),
            filename,
            None if declared is None else _number(declared, f"{PREFIX}Header-Content-Length"),
        )
        url = f"{request.base_url}{OPEN_BEGINNING.removeprefix('/')}{session.id}"
        return JSONResponse({}, headers={f"{PREFIX}URL": url, f"{PREFIX}Status": "active"})

    async def go_on(self, request: Request) -> Response:
        """Takes the next piece of an upload, or ends it: with `finalize` it becomes a file."""
        session = self.uploads.find(request.path_params["upload_id"])
        commands = {
            each.strip().lower() for each in request.headers.get(f"{PREFIX}Command", "").split(",")
        }
        if not commands or not commands <= {"upload", "finalize", "query", "cancel"}:
            raise ApiError(
                400,
                "X-Goog-Upload-Command must be upload, 'upload, finalize', finalize, query or "
                "cancel",
                headers=ENDED,
            )
        async with session.lock:
            if "cancel" in commands:
                self.uploads.end(session)
                return JSONResponse({}, headers={f"{PREFIX}Status": "cancelled"})
            try:
                if "upload" in commands:
                    offset = request.headers.get(f"{PREFIX}Offset", "0")
                    await self.uploads.append(
                        session, _number(offset, f"{PREFIX}Offset"), request.stream()
                    )
                if "finalize" in commands:
                    document = await self._finish(session)
                    body = {"file": self._resource(request, document)}
                    return JSONResponse(body, headers=ENDED)
            except ApiError as error:
                error.headers = {**(error.headers or {}), **ENDED}
                raise
        received = {f"{PREFIX}Size-Received": str(session.received_bytes)}
        return JSONResponse({}, headers={f"{PREFIX}Status": "active", **received})

    async def list(self, request: Request) -> Response:
        """Lists the caller's files, the youngest first, page by page."""
        tenant = tenant_of(request)
        found = [each for each in self.files.library.documents() if each.record.tenant == tenant]
        page, token = page_of(
            request,
            found,
            lambda document: (float(document.record.created_at), document.id),
            default=PAGE_FILES,
            most=MOST_PAGE_FILES,
        )
        body: JSONObject = {"files": [self._resource(request, document) for document in page]}
        return JSONResponse(body if token is None else {**body, "nextPageToken": token})

    async def retrieve(self, request: Request) -> Response:
        """Returns a file's object: it is ACTIVE once it is computed, and can be asked about before
        that."""
        return JSONResponse(self._resource(request, self._find(request)))

    async def delete(self, request: Request) -> Response:
        """Deletes a file, with all that stems from it in every tier."""
        await self.files.library.remove(self._find(request))
        return JSONResponse({})

    async def _finish(self, session: UploadSession) -> Document:
        upload = await self.uploads.finish(session)
        record = new_record(
            upload,
            tenant=session.tenant,
            filename=session.filename,
            purpose=PURPOSES[0],
            system=None,
        )
        try:
            return await self.files.library.add(record, upload.path)
        finally:
            self.uploads.end(session)

    def _find(self, request: Request) -> Document:
        name = request.path_params["name"]
        document = document_id(name)
        try:
            return self.files.library.find(tenant_of(request), document, param="name")
        except ApiError as error:
            raise ApiError(
                404,
                f"there is no files/{name}; GET /v1beta/files lists those there are",
                param="name",
                code=error.code,
            ) from None

    def _resource(self, request: Request, document: Document) -> dict[str, Any]:
        record = document.record
        name = f"files/{record.id.removeprefix('file-')}"
        told: JSONObject = {
            "name": name,
            "displayName": record.filename,
            "mimeType": _media_type(document),
            "sizeBytes": str(record.bytes),
            "createTime": written(record.created_at),
            "updateTime": written(record.created_at),
            "sha256Hash": base64.b64encode(bytes.fromhex(record.sha256)).decode(),
            "uri": f"{request.base_url}v1beta/{name}",
            "state": STATES[self.files.library.state(document)],
            "source": "UPLOADED",
        }
        if record.expires_at is not None:
            told["expirationTime"] = written(record.expires_at)
        if document.error is not None:
            told["error"] = {"code": 3, "message": document.error}  # 3: INVALID_ARGUMENT
        return told


def _media_type(document: Document) -> str:
    """Tells how the file was read, or before that what its name says."""
    kind = None if document.reading is None else TYPES.get(document.reading.format)
    return kind or mimetypes.guess_type(document.record.filename)[0] or "text/plain"


def _number(text: str, header: str) -> int:
    if text.isascii() and text.isdigit() and len(text) <= 15:
        return int(text)
    raise ApiError(400, f"{header} is {json.dumps(text[:64])}; it must be a whole number")
