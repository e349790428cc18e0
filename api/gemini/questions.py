"""Turns a question in Gemini's words into the conversation that chats are asked with."""

import json
import mimetypes
import re
from collections.abc import Sequence

from api.gemini.bodies import (
    Blob,
    Content,
    FunctionDeclaration,
    GenerateContentRequest,
    GenerationConfig,
    Part,
    Tool,
    ToolConfig,
)
from api.gemini.schemas import json_schema
from api.http.bodies import ChatRequest
from api.http.errors import ApiError
from api.http.sse import JSONObject
from longctx.documents.reader import KNOWN
from longctx.errors import InvalidRequest

MEDIA = ("image/", "audio/", "video/")
FILE_URI = re.compile(r"(?:https?://[^/]+/(?:[^?]*/)?)?files/([a-zA-Z0-9_-]+)")


def chat_request(
    wanted: GenerateContentRequest, *, model: str, stream: bool, begins_with: JSONObject
) -> ChatRequest:
    """Returns the question as a chat. `begins_with` are the fields of the chat, such as its tools,
    that a cached content has.

    Raises InvalidRequest and ApiError for what cannot be asked.
    """
    body: JSONObject = {
        "model": model,
        "stream": stream,
        "messages": messages(wanted.contents, wanted.system_instruction),
        **begins_with,
        **tool_fields(wanted.tools, wanted.tool_config),
        **_sampling(wanted.generation_config or GenerationConfig()),
    }
    if wanted.service_tier in ("standard", "flex"):
        body["service_tier"] = "flex" if wanted.service_tier == "flex" else "default"
    if "response_format" in body and body.get("tools") and body.get("tool_choice") != "none":
        raise InvalidRequest(
            "generationConfig.responseMimeType application/json excludes tools; leave one of them "
            "out",
            param="generationConfig.responseMimeType",
        )
    return ChatRequest.model_validate(body)


def messages(contents: Sequence[Content], system: Content | None) -> list[JSONObject]:
    """Returns the messages of a chat. Raises InvalidRequest and ApiError."""
    found: list[JSONObject] = []
    if system is not None:
        if any(part.text is None for part in system.parts):
            raise InvalidRequest(
                "systemInstruction may have text only; put files into contents",
                param="systemInstruction",
            )
        found.append({"role": "system", "content": [_said(part) for part in system.parts]})
    calls = _Calls()
    for content in contents:
        if content.role == "system":
            raise InvalidRequest(
                "contents has a role system; put its text into systemInstruction", param="contents"
            )
        if content.role == "model":
            found.append(_of_model(content.parts, calls))
        else:
            found += _of_user(content.parts, calls)
    return found


def tool_fields(tools: Sequence[Tool] | None, config: ToolConfig | None) -> JSONObject:
    """Returns the fields of a chat that say which functions the model may or has to call."""
    declared = [each for tool in tools or () for each in tool.function_declarations or ()]
    calling = None if config is None else config.function_calling_config
    mode = (calling and calling.mode) or "AUTO"
    allowed = calling and calling.allowed_function_names
    names = [each.name for each in declared]
    if len(set(names)) < len(names):
        raise InvalidRequest("tools has two functions of one name; rename one", param="tools")
    param = "toolConfig.functionCallingConfig"
    if allowed:
        if mode not in ("ANY", "VALIDATED"):
            raise InvalidRequest(
                "allowedFunctionNames is for mode ANY or VALIDATED; set one of them", param=param
            )
        for name in allowed:
            if name not in names:
                raise InvalidRequest(f"{name!r} is not among the functions", param=param)
        declared = [each for each in declared if each.name in allowed]
    if mode == "ANY" and not declared:
        raise InvalidRequest("mode is ANY, and there are no functions", param=param)
    if not declared:
        return {}
    strict = mode == "VALIDATED"
    fields: JSONObject = {"tools": [_function(each, strict) for each in declared]}
    if mode in ("ANY", "NONE"):
        fields["tool_choice"] = "required" if mode == "ANY" else "none"
    return fields


def file_id_of(uri: str) -> str:
    """Returns our id of an uploaded file. Raises InvalidRequest for a URI of something else."""
    found = FILE_URI.fullmatch(uri)
    if found is None:
        raise InvalidRequest(
            f"fileUri {uri[:200]!r} is no file of this server; upload it, and send its uri",
            param="contents",
        )
    return document_id(found[1])


def document_id(name: str) -> str:
    """Returns our id of the file that is called so here: names have no prefix."""
    return f"file-{name.removeprefix('file-')}"


def filename_of(mime_type: str) -> str:
    """Returns a name for a document that came without one."""
    kind = mime_type.partition(";")[0].strip().lower()
    return f"document{mimetypes.guess_extension(kind) or '.txt'}"


def check_media(mime_type: str) -> None:
    """Raises ApiError for pictures, sound and films."""
    if mime_type.lower().startswith(MEDIA):
        raise ApiError(
            400,
            f"{mime_type} is not read by this server; it reads documents: {KNOWN}",
            param="contents",
            code="unsupported_file",
        )


def standard_base64(data: str) -> str:
    """Writes base64 with the usual two signs and its padding, as Google's clients do not."""
    data = data.replace("-", "+").replace("_", "/")
    return data + "=" * (-len(data) % 4)


class _Calls:
    """Gives ids to the calls of a conversation, and finds which of them a response answers."""

    def __init__(self) -> None:
        self._open: list[tuple[str, str]] = []  # name and id
        self._count = 0

    def begin(self, name: str, given: str | None) -> str:
        self._count += 1
        call_id = given or f"call_{self._count}"
        self._open.append((name, call_id))
        return call_id

    def answer(self, name: str, given: str | None) -> str:
        """Returns the id of the call: the one given, or that of the first one of that name."""
        known = (call for call in self._open if given == call[1] or (not given and call[0] == name))
        found = next(known, None)
        if found is None:
            return given or f"call_{name}"
        self._open.remove(found)
        return found[1]


def _of_model(parts: Sequence[Part], calls: _Calls) -> JSONObject:
    said: list[JSONObject] = []
    called: list[JSONObject] = []
    for part in parts:
        if part.function_response is not None:
            raise InvalidRequest(
                "contents has a functionResponse of the model; it is the user's", param="contents"
            )
        if (call := part.function_call) is not None:
            function = {"name": call.name, "arguments": json.dumps(call.args or {})}
            called.append({"id": calls.begin(call.name, call.id), "function": function})
        else:
            said.append(_said(part))
    message: JSONObject = {"role": "assistant", "content": said or None}
    return {**message, "tool_calls": called} if called else message


def _of_user(parts: Sequence[Part], calls: _Calls) -> list[JSONObject]:
    """Returns a message for each response to a call, and for what stands between them."""
    found: list[JSONObject] = []
    for part in parts:
        if part.function_call is not None:
            raise InvalidRequest(
                "contents has a functionCall of the user; it is the model's", param="contents"
            )
        if (answered := part.function_response) is not None:
            found.append(
                {
                    "role": "tool",
                    "tool_call_id": calls.answer(answered.name, answered.id),
                    "content": json.dumps(answered.response, ensure_ascii=False),
                }
            )
        elif found and found[-1]["role"] == "user":
            found[-1]["content"].append(_said(part))
        else:
            found.append({"role": "user", "content": [_said(part)]})
    return found


def _said(part: Part) -> JSONObject:
    if part.text is not None:
        return {"type": "text", "text": part.text}
    if part.inline_data is not None:
        return {"type": "file", "file": _inline(part.inline_data)}
    assert part.file_data is not None
    return {"type": "file", "file": {"file_id": file_id_of(part.file_data.file_uri)}}


def _inline(blob: Blob) -> JSONObject:
    check_media(blob.mime_type)
    return {
        "file_data": f"data:{blob.mime_type};base64,{standard_base64(blob.data)}",
        "filename": blob.display_name or filename_of(blob.mime_type),
    }


def _function(declared: FunctionDeclaration, strict: bool) -> JSONObject:
    function: JSONObject = {"name": declared.name, "description": declared.description}
    if declared.parameters is not None:
        param = f"tools.functionDeclarations.{declared.name}.parameters"
        function["parameters"] = json_schema(declared.parameters, param=param)
    elif declared.parameters_json_schema is not None:
        function["parameters"] = declared.parameters_json_schema
    return {"type": "function", "function": {**function, "strict": strict}}


def _sampling(config: GenerationConfig) -> JSONObject:
    given = {
        "temperature": config.temperature,
        "top_p": config.top_p,
        "top_k": config.top_k,
        "max_tokens": config.max_output_tokens,
        "stop": config.stop_sequences or None,
        "n": config.candidate_count,
        "seed": config.seed,
        "presence_penalty": config.presence_penalty,
        "frequency_penalty": config.frequency_penalty,
        "logprobs": config.response_logprobs or None,
        "top_logprobs": config.logprobs,
        "response_format": _response_format(config),
    }
    return {name: value for name, value in given.items() if value is not None}


def _response_format(config: GenerationConfig) -> JSONObject | None:
    if config.response_mime_type != "application/json":
        return None
    schema = config.response_json_schema
    if config.response_schema is not None:
        schema = json_schema(config.response_schema, param="generationConfig.responseSchema")
    if schema is None:
        return {"type": "json_object"}
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
