"""A conversation becomes segments: literal tokens, and documents that are only named.

The chat template is rendered with an unguessable marker in place of each file. The text between
the markers is tokenized here; a document's tokens come from the store, so a question costs its own
tokens and not its document's. Each piece is tokenized on its own, hence the tokens before a file
do not depend on what follows it, and the file stays a prefix that later questions find.

Worked example: a message with a file and "Who?" renders as `<|user|>longctx5f..n00000000\\n\\nWho?`
and splits into the text `<|user|>`, the file, and the text `\\n\\nWho?`.

Message text that spells a special token is replaced by a marker too, and is then encoded as text.
Read `ChatPrompts.render` first.
"""

import contextlib
import json
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, TypeAlias

from longctx.errors import InvalidRequest
from longctx.request import Segment
from longctx.text.tokenizer import Tokenizer
from longctx.text.tool_calls import ToolCall
from longctx.text.tool_forms import Tool

_ROLE = re.compile(r"[A-Za-z][A-Za-z_-]*")  # a role is written into the template as it is
_NUMBER_DIGITS = 8  # of a marker, after its key


@dataclass(frozen=True, slots=True)
class FilePart:
    """A document inside a message; `title` is for templates that show one.

    `link_tokens` is handed on to the `Segment`.
    """

    document_id: str
    title: str
    link_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Placeholder:
    """A gap at the beginning of a message, for text that the caller has in tokens already."""

    number: int


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    `content` is in the caller's order; the rendered message has the placeholders first, then the
    files, then the text.
    """

    role: str
    content: tuple[str | FilePart | Placeholder, ...]
    tool_calls: tuple[ToolCall, ...] = ()  # an assistant's
    tool_call_id: str = ""  # a tool's: which call it answers


class Ending(Enum):
    """How a rendered conversation ends."""

    ANSWER = "answer"  # with what comes before the assistant's next message
    CLOSED = "closed"  # after its last message
    OPEN = "open"  # within its last message, which is to be continued


# A rendered prompt is a sequence of these, in reading order.
PromptPiece: TypeAlias = tuple[int, ...] | FilePart | Placeholder


@dataclass(frozen=True, slots=True)
class _Marker:
    replaced: str | FilePart | Placeholder
    label: str  # in an error message
    required: bool  # to appear exactly once


@dataclass(slots=True)
class _Markers:
    """The parts that were taken out of one conversation, each by the marker that replaces it."""

    # A client cannot guess the key, so no text can pass for a marker. It has only letters and
    # digits: nothing that a template trims or escapes.
    key: str = field(default_factory=lambda: f"longctx{secrets.token_hex(16)}n")
    taken: list[_Marker] = field(default_factory=list)

    def add(
        self, replaced: str | FilePart | Placeholder, label: str, *, required: bool = True
    ) -> str:
        """Take a part out of the conversation; returns the marker to render in its place.

        `label` names the part in error messages; a `required` part must appear exactly once.
        """
        self.taken.append(_Marker(replaced, label, required))
        return f"{self.key}{len(self.taken) - 1:0{_NUMBER_DIGITS}d}"

    def split(self, rendered: str) -> list[str | _Marker]:
        """Split into text and markers, in reading order.

        Raises InvalidRequest when the template lost or repeated a required marker, or cut one.
        """
        pieces: list[str | _Marker] = []
        counts = [0] * len(self.taken)
        # Not by a regular expression: to compile one for each key takes as long as to render.
        before, *marked = rendered.split(self.key)
        if before:
            pieces.append(before)
        for piece in marked:
            digits, text = piece[:_NUMBER_DIGITS], piece[_NUMBER_DIGITS:]
            if len(digits) < _NUMBER_DIGITS or not digits.isdecimal():
                raise _refused("cuts a part of the conversation short")
            counts[int(digits)] += 1
            pieces.append(self.taken[int(digits)])
            if text:
                pieces.append(text)
        for marker, count in zip(self.taken, counts, strict=True):
            if marker.required and count != 1:
                fault = "leaves out" if count == 0 else f"repeats {count} times"
                raise _refused(f"{fault} {marker.label}")
        return pieces


_Shape: TypeAlias = tuple[tuple[tuple[str, bool], ...], str | None, Ending]
MOST_SHAPES = 1024


def _shape(messages: Sequence[Message], date: str | None, ending: Ending) -> _Shape | None:
    """Tell all that a template sees of a conversation whose texts are replaced by markers.

    None where it has more than texts.
    """
    if any(message.tool_calls or message.tool_call_id for message in messages):
        return None
    if not all(isinstance(part, str) for message in messages for part in message.content):
        return None
    # Whether there is text, once parts are joined
    turns = tuple((each.role, len(each.content) > 1 or any(each.content)) for each in messages)
    return turns, date, ending


class ChatPrompts:
    """Renders conversations with one model's chat template; safe to use from several threads."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._form = tokenizer.tool_form
        self._kept: set[_Shape] = set()  # shapes of which the template was seen to lose nothing

    def render(
        self,
        messages: Sequence[Message],
        *,
        date: str | None = None,
        ending: Ending = Ending.ANSWER,
        tools: Sequence[Tool] = (),
    ) -> tuple[Segment, ...]:
        """Render the prompt, which asks for the assistant's next message, as segments.

        The messages may not have placeholders. Raises InvalidRequest as `pieces` does.
        """
        return segments_of(self.pieces(messages, date=date, ending=ending, tools=tools))

    def pieces(
        self,
        messages: Sequence[Message],
        *,
        date: str | None = None,
        ending: Ending = Ending.ANSWER,
        tools: Sequence[Tool] = (),
    ) -> tuple[PromptPiece, ...]:
        """Render the same prompt as token runs, files and placeholders, in reading order.

        `date` (YYYY-MM-DD) is the template's today. Where the template refuses a conversation in
        which one role speaks several times in a row, those messages are joined into one; where it
        refuses one with several calls in a message, each call stands in one of its own. Raises
        InvalidRequest when the template refuses the conversation all the same, loses or repeats a
        part of it, or when the model has none.
        """
        try:
            return self._checked_pieces(messages, date, ending, tools)
        except InvalidRequest:
            for changed in (_joined(messages), _one_call_each(messages)):
                if len(changed) != len(messages):
                    with contextlib.suppress(InvalidRequest):
                        return self._checked_pieces(changed, date, ending, tools)
            raise

    def _checked_pieces(
        self,
        messages: Sequence[Message],
        date: str | None,
        ending: Ending,
        tools: Sequence[Tool],
    ) -> tuple[PromptPiece, ...]:
        for message in messages:
            if not _ROLE.fullmatch(message.role):
                raise InvalidRequest(
                    f"role {message.role!r} is not a name; use system, user or assistant",
                    param="messages",
                )
        # Render once with a marker for every text, only to see that the template loses nothing,
        # then with ordinary text in place: templates may look at it, and its tokens join those
        # of the text beside it.
        shape = None if tools else _shape(messages, date, ending)
        if shape is None or shape not in self._kept:
            self._pieces(messages, date, ending, tools, replace_all=True)
            if shape is not None and len(self._kept) < MOST_SHAPES:
                self._kept.add(shape)
        return self._in_tokens(self._pieces(messages, date, ending, tools, replace_all=False))

    def frames(
        self, roles: Sequence[str], *, continued: bool, date: str | None = None
    ) -> tuple[tuple[int, ...], ...]:
        """Find the tokens that the template puts before each of a conversation's first messages.

        `continued` adds those before the user's message that follows.
        """
        opening = [Message(role, (Placeholder(number),)) for number, role in enumerate(roles)]
        question = Message("user", (Placeholder(len(roles)), "?") if continued else ("?",))
        follows = [question] if continued or not roles or roles[-1] != "user" else []
        return frames_of(self.pieces([*opening, *follows], date=date))[0]

    def document_prefix(
        self, system: str | None, *, title: str = "", date: str | None = None
    ) -> tuple[int, ...]:
        """Find the tokens before the first document of a conversation that begins with its file.

        Such a conversation has the system prompt, if any, then a user message whose first part is
        the file.
        `title` matters only where the template shows titles.
        """
        opening = [] if system is None else [Message("system", (system,))]
        question = Message("user", (FilePart("", title), "?"))
        first = self.render([*opening, question], date=date)[0]
        return first.token_ids  # empty where the document itself comes first

    def _pieces(
        self,
        messages: Sequence[Message],
        date: str | None,
        ending: Ending,
        tools: Sequence[Tool],
        *,
        replace_all: bool,
    ) -> list[str | _Marker]:
        markers = _Markers()
        tokenizer = self._tokenizer
        in_place = not tokenizer.takes_documents
        conversation: list[dict[str, Any]] = []
        for number, message in enumerate(messages, start=1):
            label = f"the {message.role} message (number {number})"
            placeholders = "".join(
                markers.add(part, f"the schema's text in {label}")
                for part in message.content
                if isinstance(part, Placeholder)
            )
            parts = [
                markers.add(part, f"file {part.document_id} in {label}")
                for part in message.content
                if isinstance(part, FilePart) and in_place
            ]
            text = "\n".join(part for part in message.content if isinstance(part, str))
            calls = [self._call(call, markers) for call in message.tool_calls]
            if calls and self._form is not None and not self._form.shows_calls:
                parts.append(self._written(calls))
                calls = []
            if ending is Ending.OPEN and number == len(messages):
                # All of it, also the space around it that templates trim: the answer goes on there.
                parts.append(markers.add(text, label))
            elif text or not (calls or parts or placeholders):
                # Templates look for control tokens of their own in what the model said, such as
                # `</think>`.
                answered = message.role == "assistant"
                spells = tokenizer.spells_special if answered else tokenizer.spells_control
                hidden = replace_all or spells(text)
                parts.append(_replaced(text, markers, label) if hidden else text)
            conversation.append(
                {"role": message.role, "content": placeholders + "\n\n".join(parts)}
                | ({"tool_calls": calls} if calls else {})
                | self._answered(message, markers)
            )
        documents = None if in_place else self._documents(messages, markers)
        answers = ending is Ending.ANSWER
        rendered = tokenizer.render(
            conversation,
            documents=documents,
            tools=[self._hidden(tool.described, markers) for tool in tools] or None,
            date=date,
            add_generation_prompt=answers,
        )
        pieces = markers.split(rendered)
        if ending is Ending.OPEN:
            last = max(number for number, piece in enumerate(pieces) if not isinstance(piece, str))
            del pieces[last + 1 :]
        return pieces

    def _call(self, call: ToolCall, markers: _Markers) -> dict[str, Any]:
        arguments = self._hidden(json.loads(call.arguments), markers)
        function = {"name": self._hidden(call.name, markers), "arguments": arguments}
        return {**self._told_id("id", call.id, markers), "type": "function", "function": function}

    def _answered(self, message: Message, markers: _Markers) -> dict[str, Any]:
        return self._told_id("tool_call_id", message.tool_call_id, markers)

    def _told_id(self, key: str, call_id: str, markers: _Markers) -> dict[str, Any]:
        if not call_id:
            return {}
        told = call_id if self._form is None else self._form.told_id(call_id)
        return {key: self._hidden(told, markers)}

    def _written(self, calls: Sequence[Mapping[str, Any]]) -> str:
        """Write calls as text, for a template that leaves them out."""
        assert self._form is not None
        functions = [call["function"] for call in calls]
        return self._form.written([(each["name"], each["arguments"]) for each in functions])

    def _hidden(self, value: Any, markers: _Markers) -> Any:
        """Replace strings that spell control tokens, anywhere in what a template writes as JSON."""
        if isinstance(value, dict):
            return {
                self._hidden(name, markers): self._hidden(inner, markers)
                for name, inner in value.items()
            }
        if isinstance(value, list):
            return [self._hidden(inner, markers) for inner in value]
        if isinstance(value, str) and self._tokenizer.spells_control(value):
            written = json.dumps(value, ensure_ascii=False)[1:-1]
            return markers.add(written, "a text of a tool", required=False)
        return value

    def _documents(
        self, messages: Iterable[Message], markers: _Markers
    ) -> list[dict[str, str]] | None:
        """List each file once, in order of appearance, for templates that put files in."""
        files: dict[str, FilePart] = {}
        for message in messages:
            for part in message.content:
                if isinstance(part, FilePart):
                    files.setdefault(part.document_id, part)
        return [
            {
                "title": self._title(part, markers),
                "text": markers.add(part, f"file {part.document_id}"),
            }
            for part in files.values()
        ] or None

    def _title(self, part: FilePart, markers: _Markers) -> str:
        if not self._tokenizer.spells_control(part.title):
            return part.title
        return markers.add(part.title, f"the title of file {part.document_id}", required=False)

    def _in_tokens(self, pieces: Iterable[str | _Marker]) -> tuple[PromptPiece, ...]:
        result: list[PromptPiece] = []
        ids: list[int] = []
        continues = False
        for piece in pieces:
            if isinstance(piece, str):
                ids += self._tokenizer.encode_template(piece, continues=continues)
            elif isinstance(piece.replaced, str):
                ids += self._tokenizer.encode(piece.replaced, continues=continues)
            else:
                if ids:
                    result.append(tuple(ids))
                    ids = []
                result.append(piece.replaced)
            continues = True
        if ids:
            result.append(tuple(ids))
        return tuple(result)


def _refused(fault: str) -> InvalidRequest:
    return InvalidRequest(
        f"the model's chat template {fault}; send the conversation in a form that the template "
        "takes, or the whole prompt to /v1/completions",
        param="messages",
    )


def segments_of(pieces: Iterable[PromptPiece]) -> tuple[Segment, ...]:
    """Turn pieces without placeholders into the segments of a request."""
    segments = []
    for piece in pieces:
        assert not isinstance(piece, Placeholder), "a placeholder is the caller's to fill"
        if isinstance(piece, FilePart):
            link_tokens = piece.link_tokens
            segments.append(Segment(document_id=piece.document_id, link_tokens=link_tokens))
        else:
            segments.append(Segment(token_ids=piece))
    return tuple(segments)


def frames_of(
    pieces: Sequence[PromptPiece],
) -> tuple[tuple[tuple[int, ...], ...], tuple[PromptPiece, ...]]:
    """Split pieces into the tokens before each placeholder, and all that follows the last one.

    Raises InvalidRequest where a file comes before a placeholder.
    """
    frames: list[tuple[int, ...]] = []
    before: tuple[int, ...] = ()
    begin = 0
    for number, piece in enumerate(pieces):
        if isinstance(piece, Placeholder):
            frames.append(before)
            before, begin = (), number + 1
        elif isinstance(piece, FilePart):
            if any(isinstance(later, Placeholder) for later in pieces[number:]):
                raise InvalidRequest(
                    "this model's chat template puts files before everything else, so they cannot "
                    "be used together with a schema; put the text into a module",
                    param="messages",
                )
        else:
            before = piece
    return tuple(frames), tuple(pieces[begin:])


def _joined(messages: Sequence[Message]) -> list[Message]:
    """Join the messages that one role speaks in a row."""
    joined: list[Message] = []
    for message in messages:
        calls = message.role == "tool" or message.tool_calls
        if joined and joined[-1].role == message.role and not calls and not joined[-1].tool_calls:
            message = Message(message.role, (*joined.pop().content, *message.content))
        joined.append(message)
    return joined


def _one_call_each(messages: Sequence[Message]) -> list[Message]:
    """Part messages with several calls, each call followed by the answer to it."""
    parted: list[Message] = []
    waiting: list[Message] = []  # the further calls of the last such message
    for message in messages:
        if message.role == "tool":
            about = next((one for one in waiting if _asks(one, message)), None)
            if about is not None:
                waiting.remove(about)
                parted.append(about)
        else:
            parted += waiting
            first, *rest = message.tool_calls or (None,)
            waiting = [Message(message.role, (), (call,)) for call in rest if call is not None]
            if waiting and first is not None:
                message = replace(message, tool_calls=(first,))
        parted.append(message)
    return parted + waiting


def _asks(message: Message, answer: Message) -> bool:
    return message.tool_calls[0].id == answer.tool_call_id


def _replaced(text: str, markers: _Markers, label: str) -> str:
    """Replace the text by a marker, but for the space around it: many templates trim that away."""
    core = text.strip()
    if not core:
        return text
    begin = text.index(core)
    return text[:begin] + markers.add(core, label) + text[begin + len(core) :]
