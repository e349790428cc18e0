"""Text in any common encoding: by its byte order mark, as UTF-8, else by what it looks like."""

import codecs

from charset_normalizer import from_bytes

from longctx.documents.read_text import Unreadable

# UTF-32 first: its mark begins with that of UTF-16.
MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    codecs.BOM_UTF8: "utf-8-sig",
}
SAMPLE_BYTES = 1 << 20  # that an encoding is guessed from
ENOUGH_BYTES = 24  # beyond ASCII among them; of fewer a guess means nothing


def marked_encoding(data: bytes) -> str | None:
    """Return the encoding that a byte order mark names."""
    return next((name for mark, name in MARKS.items() if data.startswith(mark)), None)


def _is_damaged_utf8(data: bytes) -> bool:
    """Whether most of what is not ASCII in it is UTF-8, which text of no other encoding is."""
    text = data.decode("utf-8", "replace")
    bad = text.count("\ufffd")
    return sum(not character.isascii() for character in text) - bad > 4 * bad


def decode(data: bytes) -> tuple[str, str]:
    """Return text and the name of its encoding. Raises Unreadable for what is no text."""
    marked = marked_encoding(data)
    if marked is not None:
        try:
            return data.decode(marked), marked.removesuffix("-sig")
        except UnicodeDecodeError as error:
            raise Unreadable(f"it is not {marked}, as it says: {error.reason}") from error
    if b"\0" in data:
        raise Unreadable(f"it is binary: a zero at byte {data.index(0)}")
    try:
        return data.decode("utf-8"), "utf-8"
    except UnicodeDecodeError as error:
        if _is_damaged_utf8(data):
            raise Unreadable(
                f"it is damaged UTF-8: {error.reason} at byte {error.start}"
            ) from error
    encoding = _guessed_encoding(data[:SAMPLE_BYTES])
    try:
        return data.decode(encoding), encoding
    except UnicodeDecodeError as error:
        raise Unreadable(
            f"it is not UTF-8, nor {encoding} at byte {error.start}; save it as UTF-8"
        ) from error


def _guessed_encoding(sample: bytes) -> str:
    """Return what a text looks like; the most common one where there is too little to look at."""
    foreign = sum(byte >= 0x80 for byte in sample)
    best = from_bytes(sample).best() if foreign >= ENOUGH_BYTES else None
    return "cp1252" if best is None else best.encoding
