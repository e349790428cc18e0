"""Tells how a document that is no UTF-8 text was read: its format, its encoding, its borders."""

from dataclasses import dataclass
from pathlib import Path

import msgspec

from longctx.documents.read_text import ReadText, Section


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """Holds what is kept beside the text of a document; offsets count its characters."""

    format: str
    encoding: str | None
    characters: int
    sections: tuple[Section, ...]
    skipped: tuple[str, ...]

    @classmethod
    def of(cls, document: ReadText) -> "Reading":
        return cls(
            format=document.format,
            encoding=document.encoding,
            characters=len(document.text),
            sections=document.sections,
            skipped=document.skipped,
        )


def load_reading(path: Path) -> Reading | None:
    """Returns what was written at `path`; None for a document that was UTF-8 text as it came."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Reading)
    except FileNotFoundError:
        return None
