"""The secret that ranks and head share: a line of text in a private file."""

import contextlib
import os
import secrets
import tempfile
from pathlib import Path

from longctx.errors import LongctxError

SECRET_BYTES = 32


def make_secret(file: Path) -> bytes:
    """Return the secret in the file, which is created if there is none. Raises LongctxError."""
    if not file.exists():
        try:
            _create(file)
        except OSError as error:
            raise LongctxError(f"cannot keep a secret in {file}: {error.strerror}") from error
    return read_secret(file)


def _create(file: Path) -> None:
    """Create the file atomically; on a race the first writer wins."""
    with tempfile.NamedTemporaryFile("w", dir=file.parent, prefix=f"{file.name}.") as temporary:
        temporary.write(secrets.token_hex(SECRET_BYTES) + "\n")
        temporary.flush()
        os.fsync(temporary.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(temporary.name, file)


def read_secret(file: Path) -> bytes:
    """Return the secret in the file. Raises LongctxError where it is missing or too short."""
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
