"""Receives a file: writes it to disk, and refuses at once what its first bytes say is no document.

Whether a text can be had from it is found out later, in a process of its own
(`tokenizer_process.py`).
"""

import errno
import hashlib
import os
import re
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Self

from api.http.errors import ApiError, full_disk
from longctx.documents.encodings import marked_encoding
from longctx.documents.read_text import Unreadable
from longctx.documents.reader import KNOWN, format_of

HEAD_BYTES = 512  # tell every format
MAX_NAME_CHARACTERS = 255  # of a file


class Upload:
    """Receives one file: `write` is called as often as needed, then `finish`.

    It is used as a context, which in the end removes the file unless it was moved away. `write` and
    `finish` wait for the disk, so on a server a thread calls them, one call at a time.
    """

    def __init__(self, path: Path, *, limit_bytes: int) -> None:
        self.path = path
        self.size_bytes = 0
        self.limit_bytes = limit_bytes
        self._file = path.open("xb")
        self._hash = hashlib.sha256()
        self._head = b""  # of which the format is told
        self._has_text = False
        self._zeros_allowed = False

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
        """Appends `data`. Raises ApiError for what is no document, too large, or a full disk."""
        self._head += data
        if len(self._head) >= HEAD_BYTES:
            self._write(self._head)
            self._head = b""

    def too_large(self) -> ApiError:
        """Returns the refusal of a file over the limit."""
        return ApiError(
            413,
            f"the file is larger than {self.limit_bytes >> 20} MiB; split it or start the "
            "server with a larger --max-upload-mib",
            param="file",
        )

    def finish(self) -> None:
        """Makes it durable. Raises ApiError for a file that is empty, and for a full disk."""
        self._write(self._head)
        if not self._has_text:
            raise _refusal("the file is empty")
        with self._room():
            self._file.flush()
            os.fsync(self._file.fileno())

    def _write(self, data: bytes) -> None:
        if self.size_bytes == 0:
            self._check_format(data)
        if not self._zeros_allowed and (position := data.find(b"\0")) >= 0:
            raise _refusal(f"the file is binary: a zero at byte {self.size_bytes + position}")
        if self.size_bytes + len(data) > self.limit_bytes:
            raise self.too_large()
        self._has_text = self._has_text or bool(data.strip(b"\xef\xbb\xbf \t\r\n\v\f"))
        self.size_bytes += len(data)
        self._hash.update(data)
        with self._room():
            self._file.write(data)

    @contextmanager
    def _room(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise full_disk(self.path.parent) from error
            raise

    def _check_format(self, head: bytes) -> None:
        try:
            format = format_of(head, "")
        except Unreadable as error:
            raise _refusal(str(error)) from error
        self._zeros_allowed = format != "text" or marked_encoding(head) is not None


def plain_name(name: str) -> str:
    """Returns the last part of a path, without control characters, `file` where nothing is left.

    Of a name that is too long its ending stays.
    """
    last = re.split(r"[/\\]", name)[-1]
    last = "".join(sign for sign in last if unicodedata.category(sign) not in ("Cc", "Cf", "Cs"))
    if len(last) > MAX_NAME_CHARACTERS:
        suffix = PurePosixPath(last).suffix[:16]
        last = last[: MAX_NAME_CHARACTERS - len(suffix)] + suffix
    return "file" if last.strip() in ("", ".", "..") else last


def _refusal(what: str) -> ApiError:
    return ApiError(400, f"{what}; accepted are {KNOWN}", param="file", code="unsupported_file")
