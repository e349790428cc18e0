"""Reads a document of any known format into text; `format_of` says which it is.

A reader runs in a process of its own where the document comes from somebody else
(`api/files/tokenizer_process.py`): it may take long, want all memory, or end its process.
"""

import codecs
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from longctx.documents import archive, markup, pdf
from longctx.documents.encodings import decode, marked_encoding
from longctx.documents.read_text import ReadText, TextWriter, Unreadable

KNOWN = "text, Markdown, CSV, HTML, PDF, Word (.docx), EPUB, and trees of files (.zip, .tar.gz)"
HEAD_BYTES = 4096  # that are enough to tell a format
MAX_CHARACTERS = 256 << 20

# Files that are no text and hold none, by their first bytes.
REFUSED = {
    b"\xd0\xcf\x11\xe0": "an old Office document; save it as .docx or PDF",
    b"{\\rtf": "an RTF document; save it as .docx or PDF",
    b"\x89PNG": "an image; longctx reads text",
    b"\xff\xd8\xff": "an image; longctx reads text",
    b"GIF8": "an image; longctx reads text",
    b"\x7fELF": "a program",
    b"GGUF": "a model",
    b"BZh": "compressed by bzip2; use .zip or .tar.gz",
    b"7z\xbc\xaf": "a 7z archive; use .zip or .tar.gz",
    b"Rar!": "a RAR archive; use .zip or .tar.gz",
}


def format_of(head: bytes, filename: str) -> str:
    """Tell the format of a document by its first bytes and its name: `text` where none other is.

    Raises Unreadable for a format that is known and not read.
    """
    for magic, name in REFUSED.items():
        if head.startswith(magic):
            raise Unreadable(f"the file is {name}")
    suffix = PurePosixPath(filename.lower()).suffix
    if b"%PDF-" in head[:1024]:
        return "pdf"
    if head.startswith(b"PK\x03\x04"):
        if suffix in (".xlsx", ".pptx", ".odt", ".ods", ".odp"):
            raise Unreadable(f"the file is {suffix}, which is not read; save it as PDF or .docx")
        if b"mimetypeapplication/epub+zip" in head[:100] or suffix == ".epub":
            return "epub"
        return "docx" if suffix == ".docx" or b"word/" in head else "zip"
    if head.startswith(b"\x1f\x8b") or head[257:262] == b"ustar":
        return "tar"
    begin = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if suffix in (".html", ".htm", ".xhtml") or begin.startswith((b"<!doctype html", b"<html")):
        return "html"
    return "text"


def read_document(path: Path, filename: str) -> ReadText:
    """Read a whole document. Raises Unreadable, and OSError where the file cannot be read."""
    return read_bytes(path.read_bytes(), filename)


def read_bytes(data: bytes, filename: str, *, inside: bool = False) -> ReadText:
    """Read a document in memory; `inside` an archive, no further archive is opened."""
    format = format_of(data[:HEAD_BYTES], filename)
    if inside and format in ("zip", "tar"):
        raise Unreadable("an archive inside an archive is not opened; upload it by itself")
    try:
        return _READERS[format](data, MAX_CHARACTERS)
    except (Unreadable, MemoryError):
        raise
    except Exception as error:  # whatever a library meets in a file that somebody made
        what = str(error) or type(error).__name__
        raise Unreadable(f"the file is broken, for a {format}: {what}") from error


def _read_inside(data: bytes, filename: str) -> ReadText:
    return read_bytes(data, filename, inside=True)


def _read_zip(data: bytes, limit_characters: int) -> ReadText:
    return archive.read_zip(data, _read_inside, limit_characters=limit_characters)


def _read_tar(data: bytes, limit_characters: int) -> ReadText:
    return archive.read_tar(data, _read_inside, limit_characters=limit_characters)


def _read_plain(data: bytes, limit_characters: int) -> ReadText:
    text, encoding = decode(data)
    if not text.strip("\ufeff \t\r\n\v\f"):
        raise Unreadable("the file is empty")
    writer = TextWriter(limit_characters=limit_characters)
    writer.add(text)
    return writer.finished("text", encoding=encoding)


_READERS: dict[str, Callable[[bytes, int], ReadText]] = {
    "pdf": pdf.read_pdf,
    "html": markup.read_html,
    "docx": markup.read_docx,
    "epub": markup.read_epub,
    "zip": _read_zip,
    "tar": _read_tar,
    "text": _read_plain,
}


def is_plain_text(path: Path, filename: str) -> bool:
    """Whether a file is UTF-8 text as it is, so that it need not be read as a whole."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with path.open("rb") as file:
        data = file.read(HEAD_BYTES)
        if format_of(data, filename) != "text" or marked_encoding(data) not in (None, "utf-8-sig"):
            return False
        try:
            while data:
                decoder.decode(data)
                data = file.read(1 << 20)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return False
    return True
