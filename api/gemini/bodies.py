"""The JSON bodies of Gemini's API, as strict types. The names are Google's, in camelCase or, as its
API takes them too, in snake_case.

The rule of `api/http/bodies.py` is kept: a field is served, or harmless, or accepted only with a
value that asks for nothing. Every other name is unknown and refused.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic.alias_generators import to_camel

from api.http.message_bodies import neutral
from longctx.request import MAX_LOGPROBS

MOST_CANDIDATES = 8
MOST_FUNCTIONS = 128


class GoogleBody(BaseModel):
    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, alias_generator=to_camel, populate_by_name=True
    )


def _listed(value: Any) -> Any:
    """Takes one object for a list of one, as Google does."""
    return [value] if isinstance(value, dict) else value


def _whole(value: Any) -> Any:
    """Takes 40.0 for 40: clients hold some counts as floats."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Count = Annotated[int, BeforeValidator(_whole)]
Listed = BeforeValidator(_listed)
FunctionName = Annotated[str, Field(pattern="^[a-zA-Z0-9_-]{1,64}$")]


class Blob(GoogleBody):
    """A document that travels inside the request, in base64."""

    mime_type: str
    data: str
    display_name: str | None = None


class FileData(GoogleBody):
    """Names an uploaded file by its URI."""

    file_uri: Annotated[str, Field(description="the `uri` or the `name` of an uploaded file")]
    mime_type: str | None = None  # harmless: how a file is read is told by its content
    display_name: str | None = None  # harmless


class FunctionCall(GoogleBody):
    id: str | None = None
    name: FunctionName
    args: dict[str, Any] | None = None


class FunctionResponse(GoogleBody):
    """What a function returned to a call of the model."""

    id: str | None = None
    name: FunctionName
    response: dict[str, Any]

    parts: Annotated[Any, neutral(None, [])] = None
    scheduling: Annotated[Any, neutral(None)] = None
    will_continue: Annotated[Any, neutral(None, False)] = None


class Part(GoogleBody):
    """Exactly one of a text, a document, a call or what a call returned."""

    text: str | None = None
    inline_data: Blob | None = None
    file_data: FileData | None = None
    function_call: FunctionCall | None = None
    function_response: FunctionResponse | None = None

    # harmless
    thought_signature: str | None = None
    part_metadata: Any = None

    thought: Annotated[Any, neutral(None, False)] = None
    executable_code: Annotated[Any, neutral(None)] = None
    code_execution_result: Annotated[Any, neutral(None)] = None
    video_metadata: Annotated[Any, neutral(None)] = None
    media_resolution: Annotated[Any, neutral(None)] = None

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        kinds = (
            self.text,
            self.inline_data,
            self.file_data,
            self.function_call,
            self.function_response,
        )
        if sum(kind is not None for kind in kinds) != 1:
            raise ValueError(
                "must have exactly one of text, inlineData, fileData, functionCall and "
                "functionResponse"
            )
        return self


class Content(GoogleBody):
    """What one role says. Without `role` it is the user's."""

    role: Literal["user", "model", "function", "system"] | None = None
    parts: Annotated[list[Part], Listed, Field(min_length=1)]


class FunctionDeclaration(GoogleBody):
    """Describes a function; its parameters in Google's form of a schema, or in JSON Schema."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    parameters_json_schema: dict[str, Any] | None = None

    behavior: Annotated[Any, neutral(None, "UNSPECIFIED", "BLOCKING")] = None
    response: Annotated[Any, neutral(None)] = None
    response_json_schema: Annotated[Any, neutral(None)] = None

    @model_validator(mode="after")
    def _one_schema(self) -> Self:
        if self.parameters is not None and self.parameters_json_schema is not None:
            raise ValueError("has parameters and parametersJsonSchema; leave one of them out")
        return self


class Tool(GoogleBody):
    function_declarations: Annotated[
        list[FunctionDeclaration] | None, Field(max_length=MOST_FUNCTIONS)
    ] = None

    code_execution: Annotated[Any, neutral(None)] = None
    computer_use: Annotated[Any, neutral(None)] = None
    file_search: Annotated[Any, neutral(None)] = None
    google_maps: Annotated[Any, neutral(None)] = None
    google_search: Annotated[Any, neutral(None)] = None
    google_search_retrieval: Annotated[Any, neutral(None)] = None
    mcp_servers: Annotated[Any, neutral(None, [])] = None
    url_context: Annotated[Any, neutral(None)] = None


class FunctionCallingConfig(GoogleBody):
    mode: Literal["MODE_UNSPECIFIED", "AUTO", "ANY", "NONE", "VALIDATED"] | None = None
    allowed_function_names: list[FunctionName] | None = None

    stream_function_call_arguments: Annotated[Any, neutral(None, False)] = None


class ToolConfig(GoogleBody):
    function_calling_config: FunctionCallingConfig | None = None

    retrieval_config: Annotated[Any, neutral(None)] = None
    include_server_side_tool_invocations: Annotated[Any, neutral(None, False)] = None


class ThinkingConfig(GoogleBody):
    """No model is made to think or kept from it; what asks for that is refused."""

    include_thoughts: Annotated[Any, neutral(None, False)] = None
    thinking_budget: Annotated[Any, neutral(None, 0, -1)] = None
    thinking_level: Annotated[Any, neutral(None, "THINKING_LEVEL_UNSPECIFIED")] = None


class GenerationConfig(GoogleBody):
    """How an answer is sampled, and its form."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: Count | None = None
    max_output_tokens: Annotated[Count, Field(ge=1)] | None = None
    stop_sequences: list[str] | None = None
    candidate_count: Annotated[Count, Field(ge=1, le=MOST_CANDIDATES)] | None = None
    seed: Count | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    response_mime_type: Literal["text/plain", "application/json"] | None = None
    response_schema: Annotated[
        dict[str, Any] | None, Field(description="in Google's form of a schema")
    ] = None
    response_json_schema: Annotated[dict[str, Any] | None, Field(description="in JSON Schema")] = (
        None
    )
    response_logprobs: bool | None = None
    logprobs: Annotated[Count, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    audio_timestamp: Annotated[Any, neutral(None, False)] = None
    enable_enhanced_civic_answers: Annotated[Any, neutral(None, False)] = None
    image_config: Annotated[Any, neutral(None)] = None
    media_resolution: Annotated[Any, neutral(None, "MEDIA_RESOLUTION_UNSPECIFIED")] = None
    response_modalities: Annotated[Any, neutral(None, [], ["TEXT"])] = None
    speech_config: Annotated[Any, neutral(None)] = None
    thinking_config: ThinkingConfig | None = None

    @model_validator(mode="after")
    def _schemas_go_with_json(self) -> Self:
        if self.response_schema is not None and self.response_json_schema is not None:
            raise ValueError("has responseSchema and responseJsonSchema; leave one of them out")
        shaped = self.response_schema is not None or self.response_json_schema is not None
        if shaped and self.response_mime_type != "application/json":
            raise ValueError("has a schema for the answer; set responseMimeType application/json")
        if self.logprobs is not None and not self.response_logprobs:
            raise ValueError("logprobs is allowed only with responseLogprobs=true")
        return self


class SafetySetting(GoogleBody):
    """Nothing is blocked here, so only what asks for no blocking is accepted."""

    category: str
    threshold: Annotated[
        Any, neutral(None, "BLOCK_NONE", "OFF", "HARM_BLOCK_THRESHOLD_UNSPECIFIED")
    ]
    method: Annotated[Any, neutral(None)] = None


class GenerateContentRequest(GoogleBody):
    """Asks for what the model says next."""

    model: Annotated[str | None, Field(description="as in the path, or left out")] = None
    contents: Annotated[list[Content], Listed, Field(min_length=1)]
    system_instruction: Content | None = None
    tools: Annotated[list[Tool] | None, Listed] = None
    tool_config: ToolConfig | None = None
    generation_config: GenerationConfig | None = None
    cached_content: Annotated[
        str | None, Field(description="name of what the conversation begins with")
    ] = None
    service_tier: Literal["unspecified", "standard", "flex"] | None = None
    safety_settings: list[SafetySetting] | None = None

    labels: dict[str, str] | None = None  # harmless

    store: Annotated[Any, neutral(None, False)] = None

    @model_validator(mode="after")
    def _cached_content_has_the_rest(self) -> Self:
        if self.cached_content is not None:
            for name in ("system_instruction", "tools", "tool_config"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"cachedContent excludes {to_camel(name)}; put it into the cached content"
                    )
        return self


class ContentTokensRequest(GoogleBody):
    """Asks how many tokens contents have, or a whole request."""

    model: str | None = None
    contents: Annotated[list[Content], Listed, Field(min_length=1)] | None = None
    generate_content_request: GenerateContentRequest | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.contents is None) == (self.generate_content_request is None):
            raise ValueError("must have either contents or generateContentRequest")
        return self


class CachedContentRequest(GoogleBody):
    """Contents to be kept computed, which conversations can begin with."""

    model: str
    display_name: Annotated[str | None, Field(max_length=128)] = None
    contents: Annotated[list[Content], Listed] = []
    system_instruction: Content | None = None
    tools: Annotated[list[Tool] | None, Listed] = None
    tool_config: ToolConfig | None = None
    ttl: Annotated[str | None, Field(description='a duration, such as "300s"')] = None
    expire_time: Annotated[str | None, Field(description="a time, as RFC 3339 writes it")] = None

    @model_validator(mode="after")
    def _has_content(self) -> Self:
        if not self.contents and self.system_instruction is None:
            raise ValueError("either contents or systemInstruction is required, or both")
        return self


class ExpiryRequest(GoogleBody):
    """A new end for a cached content: of it, nothing else can be changed."""

    name: str | None = None
    ttl: Annotated[str | None, Field(description='a duration, such as "300s"')] = None
    expire_time: Annotated[str | None, Field(description="a time, as RFC 3339 writes it")] = None


class FileFields(GoogleBody):
    """What an upload may say of its file. All else in a file's object is the server's to say."""

    display_name: Annotated[str | None, Field(max_length=512)] = None
    mime_type: str | None = None  # harmless: how a file is read is told by its content
    size_bytes: int | str | None = None  # harmless: the upload's headers say it


class UploadRequest(GoogleBody):
    """Begins an upload."""

    file: FileFields = FileFields()


class PageQuery(GoogleBody):
    page_size: Annotated[int | None, Field(ge=1, strict=False)] = None
    page_token: str | None = None
