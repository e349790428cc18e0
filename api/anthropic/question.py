"""Turns messages of Anthropic's shape into the conversation that chats take."""

import base64
import json
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from pydantic import ValidationError

from api.anthropic.blocks import (
    AnthropicMessage,
    AnthropicTool,
    Base64Source,
    CacheControl,
    DocumentBlock,
    FileSource,
    PlainTextSource,
    TextBlock,
    ToolResultBlock,
    ToolUseBlock,
)
from api.anthropic.bodies import CountTokensRequest, MessagesRequest
from api.http.bodies import ChatRequest
from api.http.errors import ApiError, invalid_body, renamed
from api.http.format_bodies import JSONSchemaFormat, NamedSchema
from api.http.message_bodies import FileContent, FileReference, Message, TextPart
from api.http.tool_bodies import (
    CalledFunction,
    FunctionDefinition,
    NamedFunction,
    NamedTool,
    ToolCallBody,
    ToolDefinition,
)

# What a chat's parameters are called here.
NAMES = {
    "stop": "stop_sequences",
    "response_format": "output_config.format",
    "prompt_cache_retention": "cache_control",
    "prompt_cache_options.ttl": "its ttl of 1h",
    "parallel_tool_calls": "tool_choice.disable_parallel_tool_use",
}
Part: TypeAlias = TextPart | FileContent
FindFile: TypeAlias = Callable[[FileReference], Awaitable[str]]


@dataclass(slots=True)
class Question:
    """Holds the messages of a chat, and for each mark the messages until there."""

    messages: list[Message] = field(default_factory=list)
    marks: list[tuple[list[Message], CacheControl]] = field(default_factory=list)

    def mark(self, until: Iterable[Message], control: CacheControl | None) -> None:
        if control is not None:
            self.marks.append(([*self.messages, *until], control))


class Translator:
    """Makes one `Question`. `find_file` keeps a file that came inside a block, and returns its
    id."""

    def __init__(self, find_file: FindFile) -> None:
        self._find_file = find_file

    async def question(self, wanted: CountTokensRequest) -> Question:
        """Raises ApiError for what cannot be a conversation."""
        question = Question()
        system: list[TextPart] = []
        for block in wanted.system_blocks:
            system.append(TextPart(type="text", text=block.text))
            question.mark([_message("system", system)], block.cache_control)
        if system:
            question.messages.append(_message("system", system))
        for tool in wanted.tools or ():  # templates tell of tools beside the system's text
            if tool.cache_control is not None:
                question.marks.insert(0, (list(question.messages), tool.cache_control))
        for message in wanted.messages:
            await self._add(question, message)
        if wanted.cache_control is not None:
            question.mark([], wanted.cache_control)
        return question

    async def _add(self, question: Question, message: AnthropicMessage) -> None:
        """Adds a message: each result of a tool is one of its own, before the rest."""
        parts: list[Part] = []
        calls: list[ToolCallBody] = []
        for number, block in enumerate(message.blocks):
            if isinstance(block, ToolResultBlock):
                if message.role != "user" or parts:
                    why = "are the user's, and come before other blocks"
                    raise _misplaced(f"messages has tool_result at block {number}: they {why}")
                result = await self._result(block)
                question.messages.append(result)
                inner = block.content if isinstance(block.content, list) else ()
                for marked in (*inner, block):
                    question.mark([], marked.cache_control)
                continue
            if isinstance(block, ToolUseBlock):
                if message.role != "assistant":
                    raise _misplaced("messages has tool_use that is not the assistant's")
                arguments = json.dumps(block.input, ensure_ascii=False)
                function = CalledFunction(name=block.name, arguments=arguments)
                calls.append(ToolCallBody(id=block.id, function=function))
            else:
                parts += await self._parts(block)
            question.mark([_message(message.role, parts, calls)], block.cache_control)
        if parts or calls or not message.blocks:
            question.messages.append(_message(message.role, parts, calls))

    async def _result(self, block: ToolResultBlock) -> Message:
        parts: list[Part] = [TextPart(type="text", text="Error:")] if block.is_error else []
        if isinstance(block.content, str):
            parts.append(TextPart(type="text", text=block.content))
        else:
            for inner in block.content or ():
                parts += await self._parts(inner)
        return Message(role="tool", tool_call_id=block.tool_use_id, content=list(parts))

    async def _parts(self, block: TextBlock | DocumentBlock) -> list[Part]:
        if isinstance(block, TextBlock):
            return [TextPart(type="text", text=block.text)]
        source = block.source
        if isinstance(source, FileSource):
            name = source.file_id
        else:
            data = source.data if isinstance(source, Base64Source) else _base64(_text(source))
            suffix = ".pdf" if isinstance(source, Base64Source) else ".txt"
            reference = FileReference(file_data=data, filename=block.title or f"document{suffix}")
            name = await self._find_file(reference)
        parts: list[Part] = [FileContent(type="file", file=FileReference(file_id=name))]
        if block.context:
            parts.append(TextPart(type="text", text=block.context))
        return parts


def chat_request(wanted: CountTokensRequest, messages: list[Message]) -> ChatRequest:
    """Makes the question of a chat. Raises ApiError."""
    sampling: dict[str, Any] = {}
    if isinstance(wanted, MessagesRequest):
        sampling = {
            "stream": wanted.stream,
            "max_tokens": wanted.max_tokens,
            "temperature": wanted.temperature,
            "top_k": wanted.top_k,
            "top_p": wanted.top_p,
            "stop": wanted.stop_sequences,
        }
    last = messages[-1]
    if last.tool_calls:
        raise _misplaced("messages ends with tool_use; send its tool_result")
    choice = wanted.tool_choice
    try:
        return ChatRequest(
            model=wanted.model,
            messages=messages,
            continue_final_message=True if last.role == "assistant" else None,
            tools=None if wanted.tools is None else [_tool(tool) for tool in wanted.tools],
            tool_choice=_choice(wanted),
            parallel_tool_calls=False if choice and choice.disable_parallel_tool_use else None,
            response_format=_format(wanted),
            **sampling,
        )
    except ValidationError as error:
        raise renamed(invalid_body(error, dict(ChatRequest.model_fields)), NAMES) from None


def _message(role: Any, parts: Iterable[Part], calls: Iterable[ToolCallBody] = ()) -> Message:
    return Message(role=role, content=list(parts), tool_calls=list(calls) or None)


def _text(source: Any) -> str:
    if isinstance(source, PlainTextSource):
        return source.data
    if isinstance(source.content, str):
        return source.content
    return "\n\n".join(block.text for block in source.content)


def _base64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def _choice(wanted: CountTokensRequest) -> Any:
    if wanted.tool_choice is None:
        return None
    if wanted.tool_choice.name is not None:
        return NamedTool(type="function", function=NamedFunction(name=wanted.tool_choice.name))
    return {"any": "required"}.get(wanted.tool_choice.type, wanted.tool_choice.type)


def _tool(tool: AnthropicTool) -> ToolDefinition:
    function = FunctionDefinition(
        name=tool.name,
        description=tool.description,
        parameters=tool.input_schema,
        strict=tool.strict,
    )
    return ToolDefinition(type="function", function=function)


def _format(wanted: CountTokensRequest) -> JSONSchemaFormat | None:
    asked = None if wanted.output_config is None else wanted.output_config.format
    if asked is None:
        return None
    named = {"name": "output", "schema": asked.schema_}
    return JSONSchemaFormat(type="json_schema", json_schema=NamedSchema.model_validate(named))


def _misplaced(message: str) -> ApiError:
    return ApiError(400, message, param="messages", code="invalid_value")
