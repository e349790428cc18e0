"""What reading a document gives: its text, and where its pages, sections and files begin."""

from dataclasses import dataclass

from longctx.errors import InvalidRequest


class Unreadable(InvalidRequest):
    """Raised for a document that has no text to be had; the message says why, and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """Names what begins at a character of the text: a page, a heading, a file of an archive."""

    offset: int
    label: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadText:
    """Holds the text of a document with its borders, in reading order.

    `encoding` is that of the bytes, where they are text. `skipped` names the files of an archive
    that are not text, each with the reason.
    """

    text: str
    format: str
    encoding: str | None = None
    sections: tuple[Section, ...] = ()
    skipped: tuple[str, ...] = ()


class TextWriter:
    """Joins the parts of a document, and notes where each begins. Raises Unreadable beyond a limit.

    A small file may expand to any size, so what is added is counted.
    """

    def __init__(self, *, limit_characters: int) -> None:
        self._limit_characters = limit_characters
        self._parts: list[str] = []
        self._sections: list[Section] = []
        self.characters = 0

    def begin(self, label: str) -> None:
        """Let a section of this name begin with what is added next."""
        self._sections.append(Section(offset=self.characters, label=label))

    def add(self, text: str) -> None:
        self.characters += len(text)
        if self.characters > self._limit_characters:
            raise Unreadable(
                f"it expands to more than {self._limit_characters:,} characters; upload it in parts"
            )
        self._parts.append(text)

    def finished(
        self, format: str, *, encoding: str | None = None, skipped: tuple[str, ...] = ()
    ) -> ReadText:
        return ReadText(
            text="".join(self._parts),
            format=format,
            encoding=encoding,
            sections=tuple(self._sections),
            skipped=skipped,
        )
