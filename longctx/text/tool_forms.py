"""How models write calls of tools, told from their chat templates.

| writing | models | an answer that calls |
|---|---|---|
| `TAGGED` | Hermes, Qwen, SmolLM3 | `<tool_call>{"name": "f", "arguments": {}}</tool_call>` |
| `TAGGED_LIST` | SmolLM2 | `<tool_call>[{"name": "f", "arguments": {}}]</tool_call>` |
| `LLAMA` | Llama 3 | `{"name": "f", "parameters": {}}`, some after `<|python_tag|>` |
| `MISTRAL_LIST` | Mistral | `[TOOL_CALLS] [{"name": "f", "arguments": {}}]` |
| `MISTRAL` | Mistral since 2025 | `[TOOL_CALLS]f{}`, some with `[ARGS]` after the name |

Answers are read in any of these ways that share a tag (`tool_calls.py`); a grammar makes a model
write as its template shows.
"""

import hashlib
import json
import re
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from longctx.text.grammar import ANY_OBJECT, check_schema, compiled_schema

OPENING, CLOSING = "<tool_call>", "</tool_call>"
PYTHON_TAG = "<|python_tag|>"
TOOL_CALLS, CALL_ID, ARGS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
MARKERS = (OPENING, CLOSING, PYTHON_TAG, TOOL_CALLS, CALL_ID, ARGS)
# Templates that write `<tool_call>` and something else than JSON into it.
_NO_JSON = ("<function=", "<arg_key>")
_LIST = re.compile(r"\[TOOL_CALLS\](\s?)\[(?!ARGS\]|CALL_ID\])")
_LLAMA = re.compile(r'\{\\?"name\\?": .*\\?"parameters\\?": ', re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A function that the model may ask for; `parameters` is the JSON schema of its arguments."""

    name: str
    description: str | None
    parameters: Mapping[str, Any]
    strict: bool = False  # its arguments are always valid for that schema

    @property
    def described(self) -> dict[str, Any]:
        """The tool as chat templates take it."""
        function = {"name": self.name, "parameters": dict(self.parameters)}
        if self.description is not None:
            function["description"] = self.description
        return {"type": "function", "function": function}


class Writing(Enum):
    """Names how calls are written."""

    TAGGED = "tagged"
    TAGGED_LIST = "tagged list"
    LLAMA = "llama"
    MISTRAL_LIST = "mistral list"
    MISTRAL = "mistral"


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolForm:
    """Says how one model is told of tools, and how it writes its calls."""

    writing: Writing
    variable: str = "tools"  # the template's, that takes them
    shows_calls: bool = True  # the template writes the calls of earlier answers
    special: Mapping[str, int] = field(default_factory=dict)  # markers that are special tokens
    between: str = ""  # a marker and its list
    marks: tuple[str, ...] = ()  # between a name and its arguments

    @property
    def shown_tokens(self) -> tuple[int, ...]:
        """The special tokens that have to be read in answers."""
        return tuple(self.special.values())

    def call_id(self) -> str:
        """Make an id for a call, such as templates of its kind accept."""
        if self.writing in (Writing.MISTRAL, Writing.MISTRAL_LIST):
            return secrets.token_hex(5)[:9]
        return f"call_{secrets.token_hex(12)}"

    def told_id(self, call_id: str) -> str:
        """Return an id as the template takes it: Mistral's take nine letters and digits."""
        fits = re.fullmatch("[A-Za-z0-9]{9}", call_id)
        if fits or self.writing not in (Writing.MISTRAL, Writing.MISTRAL_LIST):
            return call_id
        return hashlib.sha256(call_id.encode("utf-8", "surrogatepass")).hexdigest()[:9]

    def written(self, calls: Sequence[tuple[str, Any]]) -> str:
        """Write calls, of names and arguments, for a template that does not do so itself."""
        told = [
            json.dumps({"name": name, "arguments": given}, ensure_ascii=False)
            for name, given in calls
        ]
        return "\n".join(f"{OPENING}\n{each}\n{CLOSING}" for each in told)

    def grammar(self, tools: Sequence[Tool], *, required: bool, several: bool, param: str) -> str:
        """Return the grammar of answers that call these tools, with arguments that fit.

        `required`: the answer is nothing but calls, else it may also be text, with calls after it.
        `several`: there may be more than one. Arguments fit their schemas where a call is required
        or its tool strict. Raises InvalidRequest for a schema that is too large, at `param`.
        """
        either = "TEXT | calls" if self.writing is Writing.LLAMA else "TEXT calls?"
        rules = [f"start: {'calls' if required else either}", f"TEXT: {self._text}"]
        rules.append(f"calls: {self._calls(several)}")
        rules.append(f"tool: {' | '.join(f'tool_{number}' for number in range(len(tools)))}")
        for number, tool in enumerate(tools):
            check_schema(tool.parameters, param=param)
            fixed = required or tool.strict
            schema = compiled_schema(tool.parameters if fixed else ANY_OBJECT, strict=tool.strict)
            begin, end = self._around(tool.name)
            rules.append(f"tool_{number}: {begin} arguments_{number} {end}")
            rules.append(f"arguments_{number}: %json {json.dumps(schema)}")
        return "\n".join(rules)

    def _calls(self, several: bool) -> str:
        match self.writing:
            case Writing.TAGGED:
                call = f'{self._word(OPENING)} "\\n" tool "\\n" {self._word(CLOSING)}'
                return f'{call} ("\\n" {call})*' if several else call
            case Writing.TAGGED_LIST:
                listed = 'tool (", " tool)*' if several else "tool"
                return f'{self._word(OPENING)} "[" {listed} "]" {self._word(CLOSING)}'
            case Writing.LLAMA:
                return 'tool ("; " tool)*' if several else "tool"
            case Writing.MISTRAL_LIST:
                listed = 'tool (", " tool)*' if several else "tool"
                return f'{self._word(TOOL_CALLS)} {json.dumps(self.between + "[")} {listed} "]"'
            case Writing.MISTRAL:
                return "tool+" if several else "tool"

    def _around(self, name: str) -> tuple[str, str]:
        """Return what comes before and after the arguments of a call, as grammar."""
        if self.writing is Writing.MISTRAL:
            marks = " ".join(
                f"{self._word(mark)} /[a-zA-Z0-9]{{9}}/" if mark == CALL_ID else self._word(mark)
                for mark in self.marks
            )
            return f"{self._word(TOOL_CALLS)} {json.dumps(name)} {marks}", ""
        key = "parameters" if self.writing is Writing.LLAMA else "arguments"
        return json.dumps(f'{{"name": {json.dumps(name)}, "{key}": '), '"}"'

    @property
    def _text(self) -> str:
        """The regular expression of answers that call nothing."""
        match self.writing:
            case Writing.LLAMA:
                called = r"\s*\{(?s:.*)/ & ~/(?s:.*)<\|python_tag\|>(?s:.*)"
            case Writing.MISTRAL | Writing.MISTRAL_LIST:
                called = r"(?s:.*)\[TOOL_CALLS\](?s:.*)"
            case _:
                called = f"(?s:.*){OPENING}(?s:.*)"
        return f"/(?s:.*)/ & ~/{called}/"

    def _word(self, marker: str) -> str:
        token_id = self.special.get(marker)
        return json.dumps(marker) if token_id is None else f"<[{token_id}]>"


def find_tool_form(
    template: str, variables: Collection[str], special: Mapping[str, int]
) -> ToolForm | None:
    """Tell from a chat template how its model calls tools; none where it does not, or otherwise.

    `variables` are those that the template reads, `special` the ids of special tokens by name.
    """
    variable = next((name for name in ("tools", "xml_tools") if name in variables), None)
    if variable is None:
        return None
    writing, between, marks = _writing(template)
    if writing is None:
        return None
    return ToolForm(
        writing=writing,
        variable=variable,
        shows_calls="tool_calls" in template,
        special={marker: special[marker] for marker in MARKERS if marker in special},
        between=between,
        marks=marks,
    )


def _writing(template: str) -> tuple[Writing | None, str, tuple[str, ...]]:
    if TOOL_CALLS in template:
        if listed := _LIST.search(template):
            return Writing.MISTRAL_LIST, listed[1], ()
        return Writing.MISTRAL, "", tuple(mark for mark in (CALL_ID, ARGS) if mark in template)
    if OPENING in template:
        if any(mark in template for mark in _NO_JSON):
            return None, "", ()
        return Writing.TAGGED_LIST if f"{OPENING}[" in template else Writing.TAGGED, "", ()
    if PYTHON_TAG in template or _LLAMA.search(template):
        return Writing.LLAMA, "", ()
    return None, "", ()
