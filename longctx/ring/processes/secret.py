"""What the ranks of one group know and nobody else does: a line of text in a private file."""

import contextlib
import os
import secrets
import tempfile
from pathlib import Path

from longctx.errors import LongctxError

SECRET_BYTES = 32


def make_secret(file: Path) -> bytes:
    """The secret in the file, which is made if it is not there. Raises LongctxError."""
    if not file.exists():
        try:
            _make(file)
        except OSError as error:
            raise LongctxError(f"cannot keep a secret in {file}: {error.strerror}") from error
    return read_secret(file)


def _make(file: Path) -> None:
    """Whole or not at all, whenever this process ends; who is second keeps the first one's."""
    with tempfile.NamedTemporaryFile("w", dir=file.parent, prefix=f"{file.name}.") as draft:
        draft.write(secrets.token_hex(SECRET_BYTES) + "\n")
        draft.flush()
        os.fsync(draft.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(draft.name, file)


def read_secret(file: Path) -> bytes:
    """Raises LongctxError."""
    try:
        secret = file.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise LongctxError(f"cannot read the ring's secret from {file}: {error}") from error
    if len(secret) < SECRET_BYTES:
        raise LongctxError(
            f"{file} holds {len(secret)} characters, a secret has at least {SECRET_BYTES}; copy "
            "the head's file, or delete it there and start the head again"
        )
    return secret.encode()
