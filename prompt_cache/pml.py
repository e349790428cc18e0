"""Reads PML, the markup of Prompt Cache: a schema as XML, from a source that is not trusted.

A DOCTYPE is refused, so no entity can be declared and nothing outside is ever referred to; so is a
processing instruction. Size, depth and number of elements are bounded.

White space is layout: the indentation of lines is dropped, text between modules is trimmed, and
ends with a line break, so that each module begins on a line of its own. `xml:space="preserve"` on
an element keeps what is in it as it is.
"""

import re
from dataclasses import dataclass, field
from typing import NoReturn
from xml.parsers import expat

from prompt_cache.errors import SchemaError
from prompt_cache.schema import (
    MAX_BYTES,
    MAX_DEPTH,
    MAX_ELEMENTS,
    ROLES,
    Element,
    Schema,
    schema_of,
)

SPACE = "xml:space"
_LINE_BREAK = re.compile(r"[ \t]*\n[ \t]*")


def read_pml(text: str) -> Schema:
    """Return the schema. Raises SchemaError for what is no well-formed XML, or no schema."""
    return schema_of(_Parser().parse(text))


@dataclass(slots=True)
class _Open:
    """An element that has not ended yet. `preserve`: its white space is kept."""

    element: Element
    preserve: bool
    text: list[str] = field(default_factory=list)


class _Parser:
    """Turns one text into elements; for one call of `parse`."""

    def __init__(self) -> None:
        self._expat = expat.ParserCreate("utf-8")
        self._expat.buffer_text = True
        self._expat.StartElementHandler = self._start
        self._expat.EndElementHandler = self._end
        self._expat.CharacterDataHandler = self._text
        self._expat.StartDoctypeDeclHandler = self._doctype
        self._expat.ProcessingInstructionHandler = self._instruction
        self._stack: list[_Open] = []
        self._root: Element | None = None
        self._elements = 0

    def parse(self, text: str) -> Element:
        """Return the root element. Raises SchemaError."""
        try:
            data = text.encode()
        except UnicodeEncodeError as error:
            raise SchemaError(
                "the markup holds half of a surrogate pair, which is no character; remove it"
            ) from error
        if len(data) > MAX_BYTES:
            raise SchemaError(
                f"the markup has {len(data):,} bytes, the limit is {MAX_BYTES:,}; upload long text "
                "to /v1/files and name the file in the prompt"
            )
        try:
            self._expat.Parse(data, True)
        except expat.ExpatError as error:
            reason = expat.ErrorString(error.code)
            raise SchemaError(
                f"line {error.lineno}, column {error.offset + 1}: {reason}; the markup is XML: "
                "elements are closed, and < and & in text are written &lt; and &amp;"
            ) from error
        assert self._root is not None
        return self._root

    @property
    def _where(self) -> str:
        return f"line {self._expat.CurrentLineNumber}"

    def _start(self, tag: str, attributes: dict[str, str]) -> None:
        parent = self._stack[-1] if self._stack else None
        preserve = parent is not None and parent.preserve
        space = attributes.pop(SPACE, None)
        element = Element(tag, dict(attributes), self._where)
        if space is not None:
            if space not in ("preserve", "default"):
                raise element.fault(f"{SPACE} is 'preserve' or 'default', not {space!r}")
            preserve = space == "preserve"
        self._elements += 1
        if self._elements > MAX_ELEMENTS:
            raise element.fault(f"it is element {self._elements:,}, the limit is {MAX_ELEMENTS:,}")
        if len(self._stack) >= MAX_DEPTH:
            raise element.fault(f"elements are nested {MAX_DEPTH} deep at most; flatten the schema")
        if parent is not None:
            _take_text(parent)
            parent.element.children.append(element)
        self._stack.append(_Open(element, preserve))

    def _end(self, _tag: str) -> None:
        ended = self._stack.pop()
        _take_text(ended)
        if not ended.preserve:
            _trim(ended.element)
        if not self._stack:
            self._root = ended.element

    def _text(self, text: str) -> None:
        self._stack[-1].text.append(text)

    def _doctype(self, *_declaration: object) -> NoReturn:
        raise SchemaError(f"{self._where}: a schema has no DOCTYPE and no entities; remove it")

    def _instruction(self, target: str, _data: str) -> NoReturn:
        raise SchemaError(
            f"{self._where}: a schema has no processing instructions; remove <?{target} ...?>"
        )


def _take_text(opened: _Open) -> None:
    """Make what was read since the last child into a child: expat gives text in parts."""
    if opened.text:
        opened.element.children.append("".join(opened.text))
        opened.text.clear()


def _trim(element: Element) -> None:
    """Drop the layout from the text directly in the element.

    "\\n  Go for <parameter/> days.\\n  <module/>\\n" is "Go for <parameter/> days.\\n<module/>".
    """
    trimmed: list[str | Element] = []
    run: list[str | Element] = []

    def end_run(*, last: bool) -> None:
        if run and isinstance(run[0], str):
            run[0] = run[0].lstrip()
        if run and isinstance(run[-1], str):
            run[-1] = run[-1].rstrip()
        kept = [child for child in run if child != ""]
        # What comes after a message's last text is up to the chat template
        ends_line = bool(kept) and not (last and element.tag in ROLES)
        trimmed.extend([*kept, "\n"] if ends_line else kept)
        run.clear()

    for child in element.children:
        if isinstance(child, str):
            run.append(_LINE_BREAK.sub("\n", child))
        elif child.tag == "parameter":
            run.append(child)
        else:
            end_run(last=False)
            trimmed.append(child)
    end_run(last=True)
    element.children = trimmed
