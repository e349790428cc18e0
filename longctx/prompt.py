"""A conversation becomes segments: literal tokens, and documents that are only named.

The chat template is rendered with an unguessable mark in place of each file. What stands between
the marks is tokenized here; a document's tokens come from the store, so a question costs its own
tokens and not its document's. Each piece is tokenized on its own, hence the tokens before a file
do not depend on what follows it, and the file stays a prefix that later questions find.

Text of a message that spells a special token becomes a mark too, and is then encoded as text.
Read `ChatPrompts.render` first.
"""

import re
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from longctx.errors import InvalidRequest
from longctx.request import Segment
from longctx.tokenizer import Tokenizer

_ROLE = re.compile(r"[A-Za-z][A-Za-z_-]*")  # a role is written into the template as it is


@dataclass(frozen=True, slots=True)
class FilePart:
    """A document inside a message; some templates show its title."""

    document_id: str
    title: str


@dataclass(frozen=True, slots=True)
class Message:
    """`content` in the caller's order; files are put before the text of their message."""

    role: str
    content: tuple[str | FilePart, ...]


@dataclass(frozen=True, slots=True)
class _Mark:
    stands_for: str | FilePart
    label: str  # in an error message
    required: bool  # to appear exactly once


@dataclass(slots=True)
class _Marks:
    """What was taken out of one conversation, by the mark that stands in its place."""

    # A client cannot guess the key, so no text can pass for a mark. Only letters and digits:
    # nothing that a template trims or escapes.
    key: str = field(default_factory=lambda: f"longctx{secrets.token_hex(16)}n")
    taken: list[_Mark] = field(default_factory=list)

    def add(self, stands_for: str | FilePart, label: str, *, required: bool = True) -> str:
        self.taken.append(_Mark(stands_for, label, required))
        return f"{self.key}{len(self.taken) - 1:08d}"

    def split(self, rendered: str) -> list[str | _Mark]:
        """Text and marks in reading order. Raises InvalidRequest when one is lost or repeated."""
        pieces: list[str | _Mark] = []
        counts = [0] * len(self.taken)
        for i, piece in enumerate(re.split(f"{self.key}([0-9]{{8}})", rendered)):
            if i % 2:
                counts[int(piece)] += 1
                pieces.append(self.taken[int(piece)])
            elif piece:
                pieces.append(piece)
        for mark, count in zip(self.taken, counts, strict=True):
            if mark.required and count != 1:
                fault = "leaves out" if count == 0 else f"repeats {count} times"
                raise InvalidRequest(
                    f"the model's chat template {fault} {mark.label}; send the conversation in a "
                    "form that the template takes, or the whole prompt to /v1/completions",
                    param="messages",
                )
        return pieces


class ChatPrompts:
    """Prompts of one model's chat template."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def render(
        self, messages: Sequence[Message], *, date: str | None = None
    ) -> tuple[Segment, ...]:
        """The prompt that asks for the assistant's next message.

        `date` (YYYY-MM-DD) is the template's today. Raises InvalidRequest when the template
        refuses the conversation, loses or repeats a part of it, or when the model has none.
        """
        for message in messages:
            if not _ROLE.fullmatch(message.role):
                raise InvalidRequest(
                    f"role {message.role!r} is not a name; use system, user or assistant",
                    param="messages",
                )
        # Once with every text marked, only to see that the template loses nothing, then with
        # ordinary text in place: templates may look at it, and its tokens join its neighbours'
        self._pieces(messages, date, mark_all=True)
        return self._segments(self._pieces(messages, date, mark_all=False))

    def document_prefix(
        self, system: str | None, *, title: str = "", date: str | None = None
    ) -> tuple[int, ...]:
        """The tokens before the first document of a conversation that begins with its file.

        That is: the system prompt, if any, then a user message whose first part is the file.
        `title` matters only where the template shows titles.
        """
        opening = [] if system is None else [Message("system", (system,))]
        question = Message("user", (FilePart("", title), "?"))
        first = self.render([*opening, question], date=date)[0]
        return first.token_ids  # empty where the document itself comes first

    def _pieces(
        self, messages: Sequence[Message], date: str | None, *, mark_all: bool
    ) -> list[str | _Mark]:
        marks = _Marks()
        tokenizer = self._tokenizer
        in_place = not tokenizer.takes_documents
        conversation = []
        for number, message in enumerate(messages, start=1):
            label = f"the {message.role} message (number {number})"
            parts = [
                marks.add(part, f"file {part.document_id} in {label}")
                for part in message.content
                if isinstance(part, FilePart) and in_place
            ]
            text = "\n".join(part for part in message.content if isinstance(part, str))
            if text or not parts:
                # Templates look for their own marks in what the model said, such as `</think>`
                answered = message.role == "assistant"
                spells = tokenizer.spells_special if answered else tokenizer.spells_control
                marked = mark_all or spells(text)
                parts.append(_marked(text, marks, label) if marked else text)
            conversation.append({"role": message.role, "content": "\n\n".join(parts)})
        documents = None if in_place else self._documents(messages, marks)
        rendered = tokenizer.render(conversation, documents=documents, date=date)
        return marks.split(rendered)

    def _documents(self, messages: Iterable[Message], marks: _Marks) -> list[dict[str, str]] | None:
        """Each file once, in order of appearance, for templates that place files themselves."""
        files: dict[str, FilePart] = {}
        for message in messages:
            for part in message.content:
                if isinstance(part, FilePart):
                    files.setdefault(part.document_id, part)
        return [
            {"title": self._title(part, marks), "text": marks.add(part, f"file {part.document_id}")}
            for part in files.values()
        ] or None

    def _title(self, part: FilePart, marks: _Marks) -> str:
        if not self._tokenizer.spells_control(part.title):
            return part.title
        return marks.add(part.title, f"the title of file {part.document_id}", required=False)

    def _segments(self, pieces: Iterable[str | _Mark]) -> tuple[Segment, ...]:
        segments: list[Segment] = []
        ids: list[int] = []
        continues = False
        for piece in pieces:
            if isinstance(piece, str):
                ids += self._tokenizer.encode_marked(piece, continues=continues)
            elif isinstance(piece.stands_for, str):
                ids += self._tokenizer.encode(piece.stands_for, continues=continues)
            else:
                if ids:
                    segments.append(Segment(token_ids=tuple(ids)))
                    ids = []
                segments.append(Segment(document_id=piece.stands_for.document_id))
            continues = True
        if ids:
            segments.append(Segment(token_ids=tuple(ids)))
        return tuple(segments)


def _marked(text: str, marks: _Marks, label: str) -> str:
    """A mark for the text; space around it stays outside, since many templates trim it away."""
    core = text.strip()
    if not core:
        return text
    begin = text.index(core)
    return text[:begin] + marks.add(core, label) + text[begin + len(core) :]
