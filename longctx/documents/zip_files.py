"""Reads one file of a ZIP archive, however large the archive says or does not say that it is."""

import zipfile
import zlib

from longctx.documents.read_text import Unreadable


def read_member(archive: zipfile.ZipFile, name: str, *, limit_bytes: int) -> bytes:
    """Return the bytes of a file in the archive.

    Raises Unreadable for one that is encrypted, damaged, or larger than the limit, before more is
    read; KeyError where there is none.
    """
    try:
        with archive.open(name) as file:
            data = file.read(limit_bytes + 1)
    except (RuntimeError, NotImplementedError) as error:  # so zipfile says that it is encrypted
        raise Unreadable(f"{name} in it cannot be read: {error}") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        raise Unreadable(f"{name} in it is damaged: {error}") from error
    if len(data) > limit_bytes:
        raise Unreadable(f"{name} in it is larger than {limit_bytes >> 20} MiB; upload it in parts")
    return data
