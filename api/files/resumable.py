"""Uploads that come in pieces over several requests, each of which may break off.

What has arrived of one is kept for an hour after its last piece. A restart of the server ends all.
"""

import asyncio
import secrets
import time
from collections.abc import AsyncIterable
from contextlib import suppress
from dataclasses import dataclass, field

from api.background.expiry import Expiry
from api.background.store_dir import StoreDir
from api.files.upload import Upload
from api.http.errors import ApiError

IDLE_SECONDS = 3600.0
MOST_UPLOADS = 64  # of a tenant at a time


@dataclass(slots=True, eq=False)
class UploadSession:
    """Holds what has arrived of one file. One request at a time goes on with it."""

    id: str
    tenant: str
    filename: str
    size_bytes: int | None  # as declared
    upload: Upload
    received_bytes: int = 0
    deadline: float = 0.0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class ResumableUploads:
    """Knows all uploads under way. Every method is called on the event loop; `open` comes first,
    `close` last."""

    def __init__(self, folder: StoreDir, *, max_upload_bytes: int) -> None:
        self._folder = folder
        self._max_upload_bytes = max_upload_bytes
        self._sessions: dict[str, UploadSession] = {}
        self._expiry = Expiry(
            lambda: [(each.deadline, each) for each in self._sessions.values()], self._expire
        )

    def open(self) -> None:
        self._expiry.start()

    async def close(self) -> None:
        await self._expiry.close()
        for session in list(self._sessions.values()):
            self.end(session)

    def begin(self, tenant: str, filename: str, size_bytes: int | None) -> UploadSession:
        """Makes a session under an id that cannot be guessed. Raises ApiError: 413 for a file that
        is declared too large, 429 for too many sessions."""
        if size_bytes is not None and size_bytes > self._max_upload_bytes:
            raise ApiError(
                413,
                f"the file has {size_bytes} bytes, the limit is {self._max_upload_bytes}; split it "
                "or start the server with a larger --max-upload-mib",
                param="file",
            )
        if sum(each.tenant == tenant for each in self._sessions.values()) >= MOST_UPLOADS:
            raise ApiError(
                429,
                f"{MOST_UPLOADS} uploads are under way; finish or cancel one",
                code="overloaded",
                headers={"Retry-After": "1"},
            )
        upload = Upload(self._folder.new_upload_path(), limit_bytes=self._max_upload_bytes)
        session = UploadSession(secrets.token_urlsafe(24), tenant, filename, size_bytes, upload)
        self._sessions[session.id] = session
        self._touch(session)
        self._expiry.reschedule()
        return session

    def find(self, session_id: str) -> UploadSession:
        """Raises ApiError 404 where there is no such upload any more."""
        session = self._sessions.get(session_id)
        if session is None:
            raise ApiError(404, "there is no such upload any more; begin a new one")
        return session

    async def append(self, session: UploadSession, offset: int, data: AsyncIterable[bytes]) -> None:
        """Adds what comes, which begins at `offset`. The caller holds the session's lock.

        Raises ApiError: 400 for a gap or an overlap, after which the upload can go on; and for what
        is no document or too large, which ends it.
        """
        if offset != session.received_bytes:
            raise ApiError(
                400,
                f"the piece begins at byte {offset}, and {session.received_bytes} have arrived; "
                "go on there",
                code="invalid_value",
            )
        try:
            async for chunk in data:
                await asyncio.to_thread(session.upload.write, chunk)
                session.received_bytes += len(chunk)
                self._touch(session)
        except ApiError:
            self.end(session)
            raise

    async def finish(self, session: UploadSession) -> Upload:
        """Returns the upload, durable; the caller ends the session once it has moved the file.

        Raises ApiError where it is incomplete, and for an empty file, which ends it.
        """
        declared, received = session.size_bytes, session.received_bytes
        if declared is not None and received != declared:
            raise ApiError(
                400,
                f"the upload ends after {received} bytes, and {declared} were declared; go on at "
                f"byte {received}",
                code="invalid_value",
            )
        try:
            await asyncio.to_thread(session.upload.finish)
        except ApiError:
            self.end(session)
            raise
        return session.upload

    def end(self, session: UploadSession) -> None:
        """Forgets the session, and removes what of its file was not moved away."""
        self._sessions.pop(session.id, None)
        with suppress(OSError):
            session.upload.__exit__(None, None, None)

    def _touch(self, session: UploadSession) -> None:
        session.deadline = time.time() + IDLE_SECONDS

    async def _expire(self, session: UploadSession) -> None:
        if session.deadline <= time.time() and not session.lock.locked():
            self.end(session)
