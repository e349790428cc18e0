"""Receives a file: writes it to disk, and checks on its way that it is text.

Accepted is UTF-8 text of any kind, Markdown among it, with or without a byte order mark.
"""

import codecs
import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from api.http.errors import ApiError, full_disk

ACCEPTED = "accepted are UTF-8 text and Markdown"

# What people send although it is no text, by its first bytes.
FORMATS = {
    b"%PDF-": "a PDF file",
    b"PK\x03\x04": "a ZIP archive or an Office document",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
    b"\xd0\xcf\x11\xe0": "an old Office document",
    b"{\\rtf": "an RTF document",
    b"\x1f\x8b": "gzip-compressed",
    b"\x89PNG": "an image",
    b"\xff\xd8\xff": "an image",
}


class Upload:
    """Receives one file: `write` is called as often as needed, then `finish`.

    It is used as a context, which in the end removes the file unless it was moved away. `write` and
    `finish` wait for the disk, so on a server a thread calls them, one call at a time.
    """

    def __init__(self, path: Path, *, limit_bytes: int) -> None:
        self.path = path
        self.size_bytes = 0
        self._limit_bytes = limit_bytes
        self._file = path.open("xb")
        self._hash = hashlib.sha256()
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._has_text = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            with suppress(OSError):  # what is still to be written does not matter any more
                self._file.close()
        finally:
            self.path.unlink(missing_ok=True)

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def write(self, data: bytes) -> None:
        """Appends `data`. Raises ApiError for what is not text, too much of it, or a full disk."""
        if self.size_bytes == 0:
            for magic, name in FORMATS.items():
                if data.startswith(magic):
                    raise _refusal(f"the file is {name}")
        if self.size_bytes + len(data) > self._limit_bytes:
            raise ApiError(
                413,
                f"the file is larger than {self._limit_bytes >> 20} MiB; split it or start the "
                "server with a larger --max-upload-mib",
                param="file",
            )
        self._check(data, final=False)
        self.size_bytes += len(data)
        self._hash.update(data)
        with self._room():
            self._file.write(data)

    def finish(self) -> None:
        """Makes it durable. Raises ApiError for a file that is empty or ends inside a character,
        and for a full disk."""
        self._check(b"", final=True)
        if not self._has_text:
            raise _refusal("the file is empty")
        with self._room():
            self._file.flush()
            os.fsync(self._file.fileno())

    @contextmanager
    def _room(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise full_disk(self.path.parent) from error
            raise

    def _check(self, data: bytes, *, final: bool) -> None:
        held, _ = (
            self._decoder.getstate()
        )  # the first bytes of a character that `data` goes on with
        try:
            text = self._decoder.decode(data, final)
        except UnicodeDecodeError as error:
            at = self.size_bytes - len(held) + error.start
            raise _refusal(f"the file is not UTF-8: {error.reason} at byte {at}") from error
        if (position := data.find(b"\0")) >= 0:
            raise _refusal(f"the file is binary: a zero at byte {self.size_bytes + position}")
        self._has_text = self._has_text or bool(text.strip("\ufeff \t\r\n\v\f"))


def _refusal(what: str) -> ApiError:
    return ApiError(400, f"{what}; {ACCEPTED}", param="file", code="unsupported_file")
