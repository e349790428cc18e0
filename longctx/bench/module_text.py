"""A text that is cut into modules, each computed by itself, and prompts that are made of them."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from longctx.request import Segment
from longctx.text.chat_template import ChatPrompts, FilePart, Message
from prompt_cache.level import Level


@dataclass(frozen=True, slots=True)
class TextModule:
    """A module of one piece that is open in an engine."""

    name: str
    tokens: int


def assembled(parts: Sequence[TextModule], level: Level, position: int) -> Iterator[Segment]:
    """Put modules one after another, wherever they were encoded."""
    for part in parts:
        yield Segment(module_id=part.name, position=position, link_tokens=level.link_tokens)
        position += part.tokens


def asking(
    prompts: ChatPrompts, parts: Sequence[TextModule], level: Level, question: str
) -> tuple[Segment, ...]:
    """Make the prompt of a question on modules, which stand where a file would."""
    message = Message("user", (FilePart("", "document"), question))
    segments: list[Segment] = []
    for segment in prompts.render([message]):
        if segment.document_id is None:
            segments.append(segment)
        else:
            before = sum(len(each.token_ids) for each in segments)
            segments += assembled(parts, level, before)
    return tuple(segments)


def cut_text(text: str, parts: int) -> list[str]:
    """Cut a text into pieces of about the same length.

    They are whole paragraphs; where a text has none, whole sentences.
    """
    end_of = re.compile(r"\n\n" if "\n\n" in text else r"(?<=[.!?])\s|\n")
    pieces = []
    for left in range(parts, 1, -1):
        end = end_of.search(text, len(text) // left)
        stop = len(text) if end is None else end.end()
        pieces.append(text[:stop])
        text = text[stop:]
    return [piece for piece in (*pieces, text) if piece]
