"""The folder of everything durable, owned by one server at a time.

secret               what tenants are derived from; private
documents.sqlite     what is known about each file (`files/document_store.py`)
prompts.sqlite       schemas, named and retained prompts (`stored_prompts/records.py`)
responses.sqlite     stored responses (`stored_responses/records.py`)
documents/ID.txt     a file as uploaded
documents/ID.read    the text of one that is no UTF-8 text itself, such as a PDF
documents/ID.reading how that was read: format, encoding, pages and sections
documents/ID.tokens  its token ids, little-endian int32
documents/*partial   one of these while it is written
bench/               results that the page shows, where `longctx bench` was told to write here
models               checksums of models, and what codecs cost them
"""

import fcntl
import os
import secrets
from pathlib import Path

from longctx.errors import LongctxError

KEPT = {".txt", ".read", ".reading", ".tokens"}  # of documents that are known


def read_path(upload: Path) -> Path:
    """Returns where the text of an upload lies that is no UTF-8 text itself."""
    return upload.with_suffix(".read")


def reading_path(upload: Path) -> Path:
    """Returns where it is told how such an upload was read."""
    return upload.with_suffix(".reading")


class StoreDir:
    """Names the paths in the folder, and holds its lock until `close`."""

    def __init__(self, path: Path) -> None:
        """Makes and locks the folder. Raises LongctxError when it cannot or another server has."""
        self.path = path
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            (path / "documents").mkdir(mode=0o700, exist_ok=True)
            self._lock = (path / "lock").open("w")
        except OSError as error:
            raise LongctxError(
                f"cannot use {path} as store: {error.strerror}; choose another --store-dir"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process
        except OSError as error:
            self._lock.close()
            raise LongctxError(
                f"{path} is in use by another server; stop it or choose another --store-dir"
            ) from error

    def close(self) -> None:
        self._lock.close()

    @property
    def database(self) -> Path:
        return self.path / "documents.sqlite"

    @property
    def prompts_database(self) -> Path:
        return self.path / "prompts.sqlite"

    @property
    def responses_database(self) -> Path:
        return self.path / "responses.sqlite"

    @property
    def bench(self) -> Path:
        return self.path / "bench"

    @property
    def models(self) -> Path:
        return self.path / "models"

    def text_path(self, document_id: str) -> Path:
        return self.path / "documents" / f"{document_id}.txt"

    def tokens_path(self, document_id: str) -> Path:
        return self.path / "documents" / f"{document_id}.tokens"

    def read_path(self, document_id: str) -> Path:
        return read_path(self.text_path(document_id))

    def reading_path(self, document_id: str) -> Path:
        return reading_path(self.text_path(document_id))

    def new_upload_path(self) -> Path:
        """Returns a new path for an upload until it is complete, on the same file system."""
        return self.path / "documents" / f"{secrets.token_hex(16)}.partial"

    def secret(self) -> bytes:
        """Returns the 32 random bytes of this store, which are made on first use."""
        path = self.path / "secret"
        if not path.exists():
            partial = self.path / "secret.new"
            descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(secrets.token_bytes(32))
                file.flush()
                os.fsync(descriptor)
            partial.rename(path)
        return path.read_bytes()

    def remove_text(self, document_id: str) -> None:
        for path in (self.text_path, self.read_path, self.reading_path):
            path(document_id).unlink(missing_ok=True)

    def remove_document(self, document_id: str) -> None:
        self.remove_text(document_id)
        self.tokens_path(document_id).unlink(missing_ok=True)

    def remove_orphans(self, known: frozenset[str]) -> None:
        """Deletes what a crash left behind: incomplete files, and those of no known document."""
        for path in (self.path / "documents").iterdir():
            if path.stem not in known or path.suffix not in KEPT:
                path.unlink()
