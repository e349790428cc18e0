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
from typing import TypeAlias

from longctx.errors import InvalidRequest
from longctx.request import Segment
from longctx.text.tokenizer import Tokenizer

_ROLE = re.compile(r"[A-Za-z][A-Za-z_-]*")  # a role is written into the template as it is


@dataclass(frozen=True, slots=True)
class FilePart:
    """A document inside a message; some templates show its title. `link_tokens`: `Segment`'s."""

    document_id: str
    title: str
    link_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Place:
    """Where a message has text that is already in tokens: at its beginning."""

    number: int


@dataclass(frozen=True, slots=True)
class Message:
    """`content` in the caller's order; places, then files, are put before the text."""

    role: str
    content: tuple[str | FilePart | Place, ...]


# Of a rendered prompt, in reading order
PromptPiece: TypeAlias = tuple[int, ...] | FilePart | Place


@dataclass(frozen=True, slots=True)
class _Mark:
    stands_for: str | FilePart | Place
    label: str  # in an error message
    required: bool  # to appear exactly once


@dataclass(slots=True)
class _Marks:
    """What was taken out of one conversation, by the mark that stands in its place."""

    # A client cannot guess the key, so no text can pass for a mark. Only letters and digits:
    # nothing that a template trims or escapes.
    key: str = field(default_factory=lambda: f"longctx{secrets.token_hex(16)}n")
    taken: list[_Mark] = field(default_factory=list)

    def add(self, stands_for: str | FilePart | Place, label: str, *, required: bool = True) -> str:
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
        """The prompt that asks for the assistant's next message; as `pieces`, without places."""
        return segments_of(self.pieces(messages, date=date))

    def pieces(
        self, messages: Sequence[Message], *, date: str | None = None
    ) -> tuple[PromptPiece, ...]:
        """The same, with the tokens between files and places.

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
        return self._in_tokens(self._pieces(messages, date, mark_all=False))

    def frames(
        self, roles: Sequence[str], *, continued: bool, date: str | None = None
    ) -> tuple[tuple[int, ...], ...]:
        """What the template puts before each of the messages that a conversation begins with.

        `continued`: and before the user's message after them.
        """
        opening = [Message(role, (Place(number),)) for number, role in enumerate(roles)]
        question = Message("user", (Place(len(roles)), "?") if continued else ("?",))
        follows = [question] if continued or not roles or roles[-1] != "user" else []
        return frames_of(self.pieces([*opening, *follows], date=date))[0]

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
            places = "".join(
                marks.add(part, f"the schema's text in {label}")
                for part in message.content
                if isinstance(part, Place)
            )
            parts = [
                marks.add(part, f"file {part.document_id} in {label}")
                for part in message.content
                if isinstance(part, FilePart) and in_place
            ]
            text = "\n".join(part for part in message.content if isinstance(part, str))
            if text or not (parts or places):
                # Templates look for their own marks in what the model said, such as `</think>`
                answered = message.role == "assistant"
                spells = tokenizer.spells_special if answered else tokenizer.spells_control
                marked = mark_all or spells(text)
                parts.append(_marked(text, marks, label) if marked else text)
            conversation.append({"role": message.role, "content": places + "\n\n".join(parts)})
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

    def _in_tokens(self, pieces: Iterable[str | _Mark]) -> tuple[PromptPiece, ...]:
        result: list[PromptPiece] = []
        ids: list[int] = []
        continues = False
        for piece in pieces:
            if isinstance(piece, str):
                ids += self._tokenizer.encode_marked(piece, continues=continues)
            elif isinstance(piece.stands_for, str):
                ids += self._tokenizer.encode(piece.stands_for, continues=continues)
            else:
                if ids:
                    result.append(tuple(ids))
                    ids = []
                result.append(piece.stands_for)
            continues = True
        if ids:
            result.append(tuple(ids))
        return tuple(result)


def segments_of(pieces: Iterable[PromptPiece]) -> tuple[Segment, ...]:
    segments = []
    for piece in pieces:
        assert not isinstance(piece, Place), "a place is the caller's to fill"
        if isinstance(piece, FilePart):
            link_tokens = piece.link_tokens
            segments.append(Segment(document_id=piece.document_id, link_tokens=link_tokens))
        else:
            segments.append(Segment(token_ids=piece))
    return tuple(segments)


def frames_of(
    pieces: Sequence[PromptPiece],
) -> tuple[tuple[tuple[int, ...], ...], tuple[PromptPiece, ...]]:
    """The tokens before each place, and all that comes after the last one.

    Raises InvalidRequest where a file stands before a place.
    """
    frames: list[tuple[int, ...]] = []
    before: tuple[int, ...] = ()
    begin = 0
    for number, piece in enumerate(pieces):
        if isinstance(piece, Place):
            frames.append(before)
            before, begin = (), number + 1
        elif isinstance(piece, FilePart):
            if any(isinstance(later, Place) for later in pieces[number:]):
                raise InvalidRequest(
                    "this model's chat template puts files before everything else, so they cannot "
                    "be used together with a schema; put the text into a module",
                    param="messages",
                )
        else:
            before = piece
    return tuple(frames), tuple(pieces[begin:])


def _marked(text: str, marks: _Marks, label: str) -> str:
    """A mark for the text; space around it stays outside, since many templates trim it away."""
    core = text.strip()
    if not core:
        return text
    begin = text.index(core)
    return text[:begin] + marks.add(core, label) + text[begin + len(core) :]
