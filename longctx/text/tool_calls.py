"""Calls of tools, as models write them into their answers: `<tool_call>{...}</tool_call>`.

So Hermes, Qwen and SmolLM models write them: JSON with a name and arguments, one call in each pair
of tags or a list of several. `ToolCallReader` finds them in an answer, as it comes; `tool_grammar`
makes a model write none but valid ones.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from longctx.text.grammar import ANY_OBJECT, check_schema, compiled_schema

OPENING, CLOSING = "<tool_call>", "</tool_call>"


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


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the model asks for; `arguments` is JSON text."""

    name: str
    arguments: str


def tool_grammar(tools: Sequence[Tool], *, required: bool, several: bool, param: str) -> str:
    """Return the grammar of answers that call these tools, with arguments that fit their schemas.

    `required`: the answer is nothing but a call, else it may also be text, with calls after it.
    `several`: there may be more than one call. Raises InvalidRequest for a schema that is too
    large, at `param`.
    """
    calls = 'call ("\\n" call)*' if several else "call"
    rules = [f"start: {calls}" if required else f"start: TEXT ({calls})?"]
    rules.append(f"TEXT: /(?s:.*)/ & ~/(?s:.*){OPENING}(?s:.*)/")
    names = " | ".join(f"tool_{number}" for number in range(len(tools)))
    rules.append(f'call: "{OPENING}\\n" ({names}) "\\n{CLOSING}"')
    for number, tool in enumerate(tools):
        check_schema(tool.parameters, param=param)
        fixed = required or tool.strict
        schema = compiled_schema(tool.parameters if fixed else ANY_OBJECT, strict=tool.strict)
        begin = json.dumps(f'{{"name": {json.dumps(tool.name)}, "arguments": ')
        rules.append(f'tool_{number}: {begin} arguments_{number} "}}"')
        rules.append(f"arguments_{number}: %json {json.dumps(schema)}")
    return "\n".join(rules)


class ToolCallReader:
    """Parts one answer into text and calls, as it comes: `push` each piece, then `finish`.

    What may become a call is kept back until it is one. What looks like one and is none is text.
    """

    def __init__(self) -> None:
        self.calls = 0  # found so far
        self._held = ""

    def push(self, text: str) -> tuple[str, list[ToolCall]]:
        """Return the text and the calls that are certain now."""
        self._held += text
        said: list[str] = []
        found: list[ToolCall] = []
        while (begin := self._held.find(OPENING)) >= 0:
            end = self._held.find(CLOSING, begin)
            if end < 0:
                break
            calls = _read(self._held[begin + len(OPENING) : end])
            end += len(CLOSING)
            said.append(self._held[: begin if calls else end])
            found += calls
            self.calls += len(calls)
            self._held = self._held[end:]
        keep = len(self._held) - begin if begin >= 0 else _begun(self._held)
        cut = len(self._held) - keep
        said.append(self._held[:cut])
        self._held = self._held[cut:]
        return self._visible("".join(said)), found

    def finish(self) -> tuple[str, list[ToolCall]]:
        """Return what was kept back: a call that was not closed, or text."""
        held, self._held = self._held, ""
        calls = _read(held.removeprefix(OPENING)) if held.startswith(OPENING) else []
        self.calls += len(calls)
        return ("" if calls else self._visible(held)), calls

    def _visible(self, text: str) -> str:
        """Drop the space between calls and after them."""
        return text if text.strip() or not self.calls else ""


def _begun(text: str) -> int:
    """Measure the longest end of the text that begins a call, in characters."""
    sizes = range(min(len(OPENING) - 1, len(text)), 0, -1)
    return next((size for size in sizes if OPENING.startswith(text[-size:])), 0)


def _read(text: str) -> list[ToolCall]:
    """Read one call or a list of them; none where the text is something else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return []
    entries = value if isinstance(value, list) else [value]
    calls = []
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            return []
        arguments = entry.get("arguments", entry.get("parameters", {}))
        if isinstance(arguments, str):  # some models write JSON into JSON
            calls.append(ToolCall(entry["name"], arguments))
        else:
            calls.append(ToolCall(entry["name"], json.dumps(arguments, ensure_ascii=False)))
    return calls
