"""What the ranks of one group know and nobody else does: a line of text in a private file."""

import os
import secrets
from pathlib import Path

from longctx.errors import LongctxError

SECRET_BYTES = 32


def make_secret(file: Path) -> bytes:
    """The secret in the file, which is made if it is not there. Raises LongctxError."""
    try:
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as new:
            new.write(secrets.token_hex(SECRET_BYTES) + "\n")
    except FileExistsError:
        pass
    except OSError as error:
        raise LongctxError(f"cannot keep a secret in {file}: {error.strerror}") from error
    return read_secret(file)


def read_secret(file: Path) -> bytes:
    """Raises LongctxError."""
    try:
        secret = file.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise LongctxError(f"cannot read the ring's secret from {file}: {error}") from error
    if len(secret) < SECRET_BYTES:
        raise LongctxError(
            f"{file} holds {len(secret)} characters, a secret has at least {SECRET_BYTES}; copy "
            "the head's file"
        )
    return secret.encode()
