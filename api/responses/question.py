"""Turns the items of a response into the conversation that chats take, and back into what is kept.

Files that came inside an item are found before: from then on they are named by id.
"""

from collections.abc import Iterable, Sequence
from typing import Any
from uuid import uuid4

from pydantic import TypeAdapter, ValidationError

from api.http.bodies import ChatRequest
from api.http.errors import invalid_body, renamed
from api.http.format_bodies import JSONSchemaFormat, NamedSchema, ResponseFormat
from api.http.message_bodies import FileContent, FileReference, Message, TextPart
from api.http.sse import JSONObject
from api.http.tool_bodies import (
    CalledFunction,
    FunctionDefinition,
    NamedFunction,
    NamedTool,
    ToolCallBody,
    ToolDefinition,
)
from api.responses.bodies import ResponseQuestion, ResponseRequest, ResponseSchema
from api.responses.items import (
    FunctionCallItem,
    FunctionCallOutputItem,
    InputFile,
    InputText,
    Item,
    MessageItem,
    OutputText,
)

# What a chat's parameters are called here.
NAMES = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "response_format.json_schema": "text.format",
    "response_format": "text.format",
}
STORED: TypeAdapter[list[Item]] = TypeAdapter(list[Item])


def items_of(wanted: ResponseQuestion) -> list[Item]:
    """Returns the request's own items: a plain text is a message of the user."""
    if isinstance(wanted.input, str):
        return [MessageItem(role="user", content=wanted.input)]
    return wanted.input or []


def chat_request(wanted: ResponseQuestion, items: Sequence[Item]) -> ChatRequest:
    """Makes the question of a chat, of all items before the answer. Raises ApiError."""
    sampling: dict[str, Any] = {}
    if isinstance(wanted, ResponseRequest):
        sampling = {
            "stream": wanted.stream,
            "max_completion_tokens": wanted.max_output_tokens,
            "temperature": wanted.temperature,
            "top_p": wanted.top_p,
            "logprobs": True if wanted.tells_logprobs else None,
            "top_logprobs": wanted.top_logprobs,
            "service_tier": wanted.service_tier,
            "prompt_cache_retention": wanted.prompt_cache_retention,
            "prompt_cache_options": wanted.prompt_cache_options,
        }
    opening = [] if wanted.instructions is None else [_system(wanted.instructions)]
    try:
        return ChatRequest(
            model=wanted.model,
            messages=[*opening, *_messages(items)],
            tools=None if wanted.tools is None else [_tool(tool) for tool in wanted.tools],
            tool_choice=_choice(wanted.tool_choice),
            parallel_tool_calls=wanted.parallel_tool_calls,
            response_format=_format(wanted),
            **sampling,
        )
    except ValidationError as error:
        raise renamed(invalid_body(error, dict(ChatRequest.model_fields)), NAMES) from None


def _choice(chosen: Any) -> Any:
    if chosen is None or isinstance(chosen, str):
        return chosen
    return NamedTool(type="function", function=NamedFunction(name=chosen.name))


def kept(items: Iterable[Item]) -> list[JSONObject]:
    """Writes items as they are stored and listed: each has an id."""
    return [_kept(item) for item in items]


def _kept(item: Item) -> JSONObject:
    if isinstance(item, FunctionCallItem):
        prefix = "fc"
        told: JSONObject = {"name": item.name, "arguments": item.arguments}
    elif isinstance(item, FunctionCallOutputItem):
        prefix = "fco"
        told = {"output": item.output if isinstance(item.output, str) else _parts(item.parts)}
    else:
        prefix = "msg"
        told = {"role": item.role, "content": _parts(item.parts)}
    if not isinstance(item, MessageItem):
        told = {"call_id": item.call_id, **told}
    status = item.status or "completed"
    return {"id": item.id or new_id(prefix), "type": item.type, "status": status, **told}


def new_id(prefix: str) -> str:
    return f"{prefix}_{uuid4().hex}"


def _parts(parts: Iterable[InputText | InputFile | OutputText]) -> list[JSONObject]:
    written: list[JSONObject] = []
    for part in parts:
        told: JSONObject = part.model_dump(exclude_none=True, exclude={"prompt_cache_breakpoint"})
        written.append({**told, "annotations": []} if isinstance(part, OutputText) else told)
    return written


def _system(text: str) -> Message:
    return Message(role="system", content=text)


def _messages(items: Sequence[Item]) -> list[Message]:
    """Makes messages of items: what an assistant says and calls in a row is one message."""
    messages: list[Message] = []
    for item in items:
        if isinstance(item, FunctionCallItem):
            function = CalledFunction(name=item.name, arguments=item.arguments)
            call = ToolCallBody(id=item.call_id, function=function)
            said = messages.pop() if messages and messages[-1].role == "assistant" else None
            calls = [*((said and said.tool_calls) or ()), call]
            content = None if said is None else said.content
            messages.append(Message(role="assistant", content=content, tool_calls=calls))
        elif isinstance(item, FunctionCallOutputItem):
            content = [_part(part) for part in item.parts]
            messages.append(Message(role="tool", tool_call_id=item.call_id, content=content))
        else:
            messages.append(Message(role=item.role, content=[_part(part) for part in item.parts]))
    return messages


def _part(part: InputText | InputFile | OutputText) -> TextPart | FileContent:
    if isinstance(part, InputFile):
        reference = FileReference(
            file_id=part.file_id, file_data=part.file_data, filename=part.filename
        )
        return FileContent(type="file", file=reference)
    return TextPart(type="text", text=part.text)


def _tool(tool: Any) -> ToolDefinition:
    function = FunctionDefinition(
        name=tool.name,
        description=tool.description,
        parameters=tool.parameters,
        strict=tool.strict,
    )
    return ToolDefinition(type="function", function=function)


def _format(wanted: ResponseQuestion) -> ResponseFormat | None:
    asked = None if wanted.text is None else wanted.text.format
    if not isinstance(asked, ResponseSchema):
        return asked
    named = {"name": asked.name, "schema": asked.schema_, "strict": asked.strict}
    return JSONSchemaFormat(type="json_schema", json_schema=NamedSchema.model_validate(named))
