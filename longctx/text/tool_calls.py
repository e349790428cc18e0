"""Calls of tools, found in what a model writes, as it comes.

How a model writes them is its `ToolForm` (`tool_forms.py`). A call is certain once its name is
known and its arguments begin; from then on the arguments are told piece by piece, as they are
written. What may become a call is kept back until it is one; what looks like one and is none is
text. Read `ToolCallReader._answer` first.
"""

import json
import re
from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from longctx.text.tool_forms import CLOSING, OPENING, PYTHON_TAG, TOOL_CALLS, ToolForm, Writing

MAX_NAME_CHARACTERS = 256
NAME_KEYS = ("name", "function")
ARGUMENT_KEYS = ("arguments", "parameters")
_QUOTED = re.compile(r'[^"\\]+')
_UNQUOTED = re.compile(r'[^"{}\[\]<]+')
_SCALAR = re.compile(r"[^\s,\]}<]+")
_NAME = re.compile(r"[A-Za-z0-9_.\-]+")
_SPACE = re.compile(r"\s+")
_BETWEEN = re.compile(r"[\s;]+")  # two calls that no tags enclose


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the model asks for; `arguments` is JSON text.

    `id` is what the answer to it names, where there is one.
    """

    name: str
    arguments: str
    id: str = ""


@dataclass(frozen=True, slots=True)
class Said:
    """Is text of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegun:
    """Begins a call, whose arguments follow in pieces."""

    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """Is a piece of the arguments of the call that was begun last."""

    text: str


Event: TypeAlias = Said | CallBegun | CallArguments
# Steps of the reader: each `yield` waits for more text.
Steps: TypeAlias = Generator[None, None, bool]


class ToolCallReader:
    """Parts one answer into text and calls, as it comes: `push` each piece, then `finish`.

    Space beside calls is dropped.
    """

    def __init__(self, form: ToolForm, names: Collection[str] = ()) -> None:
        """`names`: those of the tools. Where no tag tells a call from other JSON, they do."""
        self.calls = 0  # found so far
        self._names = frozenset(names)
        self._untagged = form.writing is Writing.LLAMA
        self._opening = {Writing.LLAMA: PYTHON_TAG, Writing.MISTRAL: TOOL_CALLS}.get(
            form.writing, TOOL_CALLS if form.writing is Writing.MISTRAL_LIST else OPENING
        )
        self._text = ""  # what is not yet decided on
        self._at = 0  # how much of it is read
        self._ended = False
        self._space = ""  # told once text follows
        self._found = 0  # calls behind the opening that is being read
        self._events: list[Event] = []
        self._steps = self._answer()
        next(self._steps)

    def push(self, text: str) -> list[Event]:
        """Return what is certain now, in the order in which it was written."""
        if text:
            self._text += text
            next(self._steps)
        return self._taken()

    def finish(self) -> list[Event]:
        """Return what was kept back."""
        if not self._ended:
            self._ended = True
            next(self._steps, None)
            if self._space and not self.calls:
                self._tell(Said(self._space))
        return self._taken()

    def _taken(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def _answer(self) -> Generator[None, None, None]:
        may_begin = self._untagged  # a call without a tag may begin here
        while (yield from self._to_opening(may_begin)):
            self._found = 0
            opened = self._at
            yield from self._calls()
            if not self._found:  # it opens nothing: what comes after it is looked at again
                self._at = opened
                self._say()
            may_begin = self._untagged and self._found > 0

    def _to_opening(self, may_begin: bool) -> Steps:
        """Tell the text up to where calls may begin, and go behind that; false at the end."""
        if may_begin:
            yield from self._skip(_BETWEEN if self.calls else _SPACE)
            if (yield from self._peek()) == "{" or (yield from self._starts(self._opening)):
                if self._text[self._at] == "{":
                    return True
                self._at += len(self._opening)
                return True
            self._say()
        while True:
            begin = self._text.find(self._opening)
            if begin >= 0:
                self._at = begin
                self._say()
                self._at = len(self._opening)
                return True
            self._at = len(self._text) - (0 if self._ended else self._begun())
            self._say()
            if self._ended:
                return False
            yield

    def _calls(self) -> Steps:
        """Read the calls behind an opening; `_found` says how many there were."""
        named = self._opening == TOOL_CALLS
        yield from self._skip(_SPACE)
        if named and (yield from self._peek()) not in ("[", "{"):
            yield from self._named()
        elif (yield from self._starts("[")):
            self._at += 1
            yield from self._skip(_SPACE)
            while (yield from self._object()):
                self._drop()
                yield from self._skip(_SPACE)
                if (yield from self._starts("]")):
                    self._at += 1
                    break
                if (yield from self._starts(",")):
                    self._at += 1
                    yield from self._skip(_SPACE)
        else:
            while (yield from self._object()):
                self._drop()
                yield from self._skip(_BETWEEN if self._untagged else _SPACE)
            if self._found:
                self._at = 0  # what lies between calls is text where none follows
        if self._found and self._opening == OPENING:
            yield from self._skip(_SPACE)
            if (yield from self._starts(CLOSING)):
                self._at += len(CLOSING)
        if self._found:
            self._drop()
        return True

    def _named(self) -> Steps:
        """Read `name{...}`, where marks may lie between the two."""
        begin = self._at
        while (character := (yield from self._peek())) and (
            found := _NAME.match(self._text, self._at)
        ):
            self._at = found.end()
            if self._at - begin > MAX_NAME_CHARACTERS:
                return False
        name = self._text[begin : self._at]
        if not name or character not in ("{", "[", " "):
            return False
        if (yield from self._starts("[CALL_ID]")):
            self._at += len("[CALL_ID]")
            while (yield from self._peek()) and (found := _NAME.match(self._text, self._at)):
                self._at = found.end()
        if (yield from self._starts("[ARGS]")):
            self._at += len("[ARGS]")
        yield from self._skip(_SPACE)
        if (yield from self._peek()) != "{":
            return False
        self._begin(name)
        return (yield from self._arguments())

    def _object(self) -> Steps:
        """Read one call as an object; goes back where there is none."""
        if (yield from self._peek()) != "{":
            return False
        begin, before = self._at, self._found
        yield from self._entries()
        if self._found == before:
            self._at = begin
        return self._found > before

    def _entries(self) -> Steps:
        before = self._found
        name: str | None = None
        arguments: str | None = None  # where they come before the name
        self._at += 1
        while True:
            yield from self._skip(_SPACE)
            if (yield from self._starts("}")):
                break
            key = yield from self._string()
            if key is None or (self._untagged and key not in (*NAME_KEYS, *ARGUMENT_KEYS, "type")):
                return False
            yield from self._skip(_SPACE)
            if not (yield from self._starts(":")):
                return False
            self._at += 1
            yield from self._skip(_SPACE)
            if key in NAME_KEYS and name is None and (yield from self._peek()) == '"':
                name = yield from self._string()
                if not name or not self._may_be_called(name):
                    return False
            elif key in ARGUMENT_KEYS and name is not None and self._found == before:
                self._begin(name)
                if not (yield from self._arguments()):
                    return False
            else:
                value = yield from self._value()
                if value is None:
                    return False
                if key in ARGUMENT_KEYS and arguments is None:
                    arguments = value
            yield from self._skip(_SPACE)
            if (yield from self._starts(",")):
                self._at += 1
            elif not (yield from self._starts("}")):
                return False
        self._at += 1
        if self._found == before and name is not None:
            self._begin(name)
            self._tell(CallArguments(_as_arguments(arguments)))
        return True

    def _arguments(self) -> Steps:
        """Tell the arguments as they come; false where they are cut short or no JSON."""
        if (yield from self._peek()) in ("{", "["):
            return (yield from self._nested(told=True))
        value = yield from self._value()
        if value is not None:
            self._tell(CallArguments(_as_arguments(value)))
        return value is not None

    def _value(self) -> Generator[None, None, str | None]:
        """Read a JSON value; none where there is none, or no end of it."""
        begin = self._at
        kind = yield from self._peek()
        if kind in ("{", "["):
            return self._text[begin : self._at] if (yield from self._nested(told=False)) else None
        if kind == '"':
            whole = (yield from self._string()) is not None
            return self._text[begin : self._at] if whole else None
        while (yield from self._peek()) and (found := _SCALAR.match(self._text, self._at)):
            self._at = found.end()
        return self._text[begin : self._at] or None

    def _nested(self, *, told: bool) -> Steps:
        """Go behind an object or a list; false where it is cut short, or what is no JSON comes."""
        if told:
            self._drop()
        depth, quoted = 0, False
        while character := (yield from self._peek(told=told)):
            run = (_QUOTED if quoted else _UNQUOTED).match(self._text, self._at)
            if run is not None:
                self._at = run.end()
                continue
            if character == "\\":
                escaped = yield from self._peek(1, told=told)
                self._at += 2 if escaped else 1
                continue
            if character == "<":
                break
            self._at += 1
            if character == '"':
                quoted = not quoted
            else:
                depth += 1 if character in "{[" else -1
            if not depth and not quoted:
                self._tell_arguments(told)
                return True
        self._tell_arguments(told)
        return False

    def _string(self) -> Generator[None, None, str | None]:
        """Read a JSON string; none where there is none, or no end of it."""
        begin = self._at
        if (yield from self._peek()) != '"':
            return None
        self._at += 1
        while (character := (yield from self._peek())) != '"':
            run = _QUOTED.match(self._text, self._at)
            if run is not None:
                self._at = run.end()
            elif not character or not (yield from self._peek(1)):
                return None
            else:
                self._at += 2
        self._at += 1
        return _decoded(self._text[begin : self._at])

    def _peek(self, ahead: int = 0, *, told: bool = False) -> Generator[None, None, str]:
        """Return the next character; none at the end. Arguments are told before they are waited
        for."""
        while self._at + ahead >= len(self._text) and not self._ended:
            self._tell_arguments(told)
            yield
        return self._text[self._at + ahead : self._at + ahead + 1]

    def _starts(self, word: str) -> Steps:
        """Whether the word comes next."""
        while True:
            next_text = self._text[self._at : self._at + len(word)]
            if next_text == word:
                return True
            if self._ended or not word.startswith(next_text):
                return False
            yield

    def _skip(self, run: re.Pattern[str]) -> Steps:
        while (yield from self._peek()) and (found := run.match(self._text, self._at)):
            self._at = found.end()
        return True

    def _begun(self) -> int:
        """Measure the longest end of the text that begins an opening, in characters."""
        sizes = range(min(len(self._opening) - 1, len(self._text)), 0, -1)
        return next((size for size in sizes if self._opening.startswith(self._text[-size:])), 0)

    def _may_be_called(self, name: str) -> bool:
        if len(name) > MAX_NAME_CHARACTERS:
            return False
        tagged = not self._untagged or self._text.lstrip(" \t\r\n;").startswith(self._opening)
        return tagged or name in self._names

    def _begin(self, name: str) -> None:
        self.calls += 1
        self._found += 1
        self._space = ""
        self._tell(CallBegun(name))

    def _say(self) -> None:
        """Tell what is read as text, but for the space at its end, and drop it."""
        text = self._space + self._text[: self._at]
        self._drop()
        said = text.rstrip()
        self._space = text[len(said) :]
        if said:
            self._tell(Said(said))

    def _tell_arguments(self, told: bool) -> None:
        if told and self._at:
            self._tell(CallArguments(self._text[: self._at]))
            self._drop()

    def _drop(self) -> None:
        """Forget what is read."""
        self._text, self._at = self._text[self._at :], 0

    def _tell(self, event: Event) -> None:
        last = self._events[-1] if self._events else None
        if isinstance(last, Said | CallArguments) and type(last) is type(event):
            self._events[-1] = replace(last, text=last.text + event.text)
        else:
            self._events.append(event)


def joined(events: Sequence[Event]) -> tuple[str, list[ToolCall]]:
    """Put the events of an answer together: its text, and its calls."""
    text = ""
    calls: list[ToolCall] = []
    for event in events:
        match event:
            case Said():
                text += event.text
            case CallBegun():
                calls.append(ToolCall(event.name, ""))
            case CallArguments():
                calls[-1] = replace(calls[-1], arguments=calls[-1].arguments + event.text)
    return text, calls


def _as_arguments(value: str | None) -> str:
    """Return a JSON value as arguments: some models write JSON into JSON, or nothing."""
    if value is None or value == "null":
        return "{}"
    return (_decoded(value) or "{}") if value.startswith('"') else value


def _decoded(literal: str) -> str | None:
    """Return the text of a JSON string, halves of surrogate pairs replaced."""
    try:
        text = str(json.loads(literal, strict=False))
    except ValueError:
        return None
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
