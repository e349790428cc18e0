"""Reads a multipart form as it streams in: text fields to memory, the file to an `Upload`."""

import asyncio

from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from api.files.upload import Upload, plain_name
from api.http.errors import ApiError
from api.http.read_body import announced_bytes, discard

MAX_FIELD_BYTES = 1 << 20
MAX_HEADER_BYTES = 64 << 10  # of a part, names included
WRITE_BYTES = 1 << 20


class MultipartReader:
    """Reads one form: after `receive`, `fields` and `filename` are set, the upload is finished."""

    def __init__(self, upload: Upload, *, allowed: frozenset[str]) -> None:
        """`allowed` are the names of the text fields that the form may have."""
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        self._upload = upload
        self._allowed = allowed
        self._complete = False
        self._header = [b"", b""]  # name and value, while they arrive
        self._header_bytes = 0  # of the part, so far
        self._disposition = b""
        self._field = ""  # the part that is being read
        self._in_file = False
        self._text = bytearray()
        self._unwritten = bytearray()

    async def receive(self, request: Request) -> None:
        """Reads the form. Raises ApiError for another body, and for a file that is refused."""
        kind, options = parse_options_header(request.headers.get("content-type", ""))
        boundary = options.get(b"boundary")
        if kind != b"multipart/form-data" or boundary is None:
            raise ApiError(400, "the body must be multipart/form-data with a field 'file'")
        fields_bytes = MAX_FIELD_BYTES * (len(self._allowed) + 1)
        if announced_bytes(request) > self._upload.limit_bytes + fields_bytes:
            raise self._upload.too_large()  # what is still sent is dropped by the server below
        parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._on_part_begin,
                "on_header_field": self._on_header_field,
                "on_header_value": self._on_header_value,
                "on_header_end": self._on_header_end,
                "on_headers_finished": self._on_headers_finished,
                "on_part_data": self._on_part_data,
                "on_part_end": self._on_part_end,
                "on_end": self._on_end,
            },
        )
        stream = request.stream()
        try:
            async for chunk in stream:
                parser.write(chunk)
                if len(self._unwritten) >= WRITE_BYTES:
                    await self._write_out()
            await self._write_out()
            if not self._complete:
                raise ApiError(400, "the form ends before its last boundary; send it again")
            if self.filename is None:
                raise ApiError(400, "the form has no file in a field 'file'", param="file")
            await asyncio.to_thread(self._upload.finish)
        except ApiError:
            await discard(stream)
            raise
        except ValueError as error:  # the multipart parser's
            await discard(stream)
            raise ApiError(400, f"the form is malformed: {error}") from error

    async def _write_out(self) -> None:
        if self._unwritten:
            data = bytes(self._unwritten)
            self._unwritten.clear()
            await asyncio.to_thread(self._upload.write, data)

    def _on_part_begin(self) -> None:
        self._header_bytes = 0
        self._disposition = b""
        self._text.clear()

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header[0] += data[start:end]
        self._count_header(end - start)

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header[1] += data[start:end]
        self._count_header(end - start)

    def _count_header(self, more_bytes: int) -> None:
        self._header_bytes += more_bytes
        if self._header_bytes > MAX_HEADER_BYTES:
            limit = MAX_HEADER_BYTES >> 10
            raise ApiError(400, f"the headers of a part of the form are over {limit} KiB")

    def _on_header_end(self) -> None:
        name, value = self._header
        if name.lower() == b"content-disposition":
            self._disposition = value
        self._header = [b"", b""]

    def _on_headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._field = options.get(b"name", b"").decode(errors="replace")
        filename = options.get(b"filename")
        self._in_file = filename is not None
        if filename is not None:
            if self._field != "file" or self.filename is not None:
                raise ApiError(400, "the form must have one file, in its field 'file'")
            self.filename = plain_name(filename.decode(errors="replace"))
        elif self._field not in self._allowed:
            names = ", ".join(sorted(self._allowed))
            raise ApiError(
                400,
                f"unknown field {self._field!r}; beside file there are: {names}",
                param=self._field,
                code="unknown_parameter",
            )

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._in_file:
            self._unwritten += data[start:end]
            return
        self._text += data[start:end]
        if len(self._text) > MAX_FIELD_BYTES:
            limit = MAX_FIELD_BYTES >> 20
            raise ApiError(413, f"{self._field} is over {limit} MiB", param=self._field)

    def _on_part_end(self) -> None:
        if self._in_file:
            return
        try:
            self.fields[self._field] = self._text.decode()
        except UnicodeDecodeError as error:
            raise ApiError(400, f"{self._field} is not UTF-8", param=self._field) from error

    def _on_end(self) -> None:
        self._complete = True
