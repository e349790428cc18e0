"""Finds the files that messages refer to: by id, or inside the message as base64.

A file inside a message is kept like an upload, so the next message with the same one finds it
computed.
"""

import asyncio
import base64
import binascii

from api.background.store_dir import StoreDir
from api.files.document import Document
from api.files.document_library import DocumentLibrary
from api.files.routes import PURPOSES, new_record
from api.files.upload import Upload, plain_name
from api.http.errors import ApiError
from api.http.message_bodies import FileReference

PIECE_CHARACTERS = 1 << 18  # of base64 that are decoded at once; a multiple of 4


class Attachments:
    """Finds documents in the library, and adds those that came inside a message."""

    def __init__(
        self, library: DocumentLibrary, folder: StoreDir, *, max_upload_bytes: int
    ) -> None:
        self.library = library
        self.folder = folder
        self.max_upload_bytes = max_upload_bytes

    async def find(self, tenant: str, reference: FileReference) -> Document:
        """Raises ApiError: 404 for an unknown id, 400 for data that is not text."""
        if reference.file_id is not None:
            return self.library.find(tenant, reference.file_id, param="messages")
        return (await self.keep(tenant, reference))[0]

    async def keep(self, tenant: str, reference: FileReference) -> tuple[Document, bool]:
        """Returns the document of data that came along, and whether it was not known before."""
        assert reference.file_data is not None
        data = await asyncio.to_thread(decode_data, reference.file_data)
        filename = plain_name(reference.filename or "")
        with Upload(self.folder.new_upload_path(), limit_bytes=self.max_upload_bytes) as upload:
            await asyncio.to_thread(upload.write, data)
            await asyncio.to_thread(upload.finish)
            known = self.library.find_same(tenant, upload.sha256, filename)
            if known is not None:
                return known, False
            record = new_record(
                upload, tenant=tenant, filename=filename, purpose=PURPOSES[0], system=None
            )
            return await self.library.add(record, upload.path), True


def decode_data(file_data: str) -> bytes:
    """Returns the bytes of a data URL or of plain base64. Raises ApiError for other text.

    In pieces: Python decodes each without letting another thread run, 16 MB in 40 ms.
    """
    head, comma, rest = file_data.partition(",")
    encoded = rest if comma and head.startswith("data:") else file_data
    data = bytearray()
    try:
        for start in range(0, len(encoded), PIECE_CHARACTERS):
            piece = encoded[start : start + PIECE_CHARACTERS]
            if piece.endswith("=") and start + PIECE_CHARACTERS < len(encoded):
                raise binascii.Error("Excess data after padding")
            data += base64.b64decode(piece, validate=True)
    except ValueError as error:  # of binascii; a plain one for what is not even ASCII
        raise ApiError(
            400,
            f"file_data is not base64: {error}; send a data URL such as data:text/plain;base64,...",
            param="messages",
        ) from error
    return bytes(data)
