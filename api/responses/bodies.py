"""The bodies of `/v1/responses`. As in `api/http/bodies.py`, nothing that would change an answer is
ignored."""

from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import Field, model_validator

from api.http.bodies import PromptCacheOptions
from api.http.format_bodies import JSONObjectFormat, Name, TextFormat
from api.http.message_bodies import RequestBody, neutral
from api.responses.items import Choice, Items, ResponseFunction
from longctx.request import MAX_LOGPROBS

LOGPROBS = "message.output_text.logprobs"
# Harmless: there is no reasoning that could be included.
Included: TypeAlias = Literal["message.output_text.logprobs", "reasoning.encrypted_content"]


class ResponseSchema(RequestBody):
    """Names a schema that the answer is to be valid for."""

    type: Literal["json_schema"]
    name: Name
    description: str | None = None  # harmless: what it is for is told in the prompt
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class ResponseText(RequestBody):
    """Says which form the answer has."""

    format: Annotated[
        Annotated[TextFormat | JSONObjectFormat | ResponseSchema, Field(discriminator="type")]
        | None,
        Field(description="text, any JSON object, or JSON that is valid for a schema"),
    ] = None
    verbosity: Annotated[Any, neutral(None, "medium")] = None


class ResponseReasoning(RequestBody):
    """Models that can be told to reason are told so in the prompt."""

    effort: Annotated[Any, neutral(None, "none")] = None
    summary: Annotated[Any, neutral(None, "auto")] = None
    generate_summary: Annotated[Any, neutral(None)] = None


class ResponseStreamOptions(RequestBody):
    include_obfuscation: bool | None = None  # harmless: padding that changes no answer


class ResponseQuestion(RequestBody):
    """Has what an answer and a count of its tokens share."""

    model: Annotated[str | None, Field(description="the served name; may be left out")] = None
    input: Annotated[Items | None, Field(description="text, or a list of items")] = None
    instructions: Annotated[
        str | None, Field(description="a system message, of this response alone")
    ] = None
    previous_response_id: Annotated[
        str | None, Field(description="a stored response to go on from")
    ] = None
    text: ResponseText | None = None
    tools: Annotated[
        list[ResponseFunction] | None,
        Field(max_length=128, description="functions that the model may ask for"),
    ] = None
    tool_choice: Annotated[
        Choice | None, Field(description="none, auto, required, or one of them by name")
    ] = None
    parallel_tool_calls: Annotated[bool | None, Field(description="false: at most one call")] = None
    reasoning: ResponseReasoning | None = None

    conversation: Annotated[Any, neutral(None)] = None
    truncation: Annotated[Any, neutral(None, "disabled")] = None

    @model_validator(mode="after")
    def _has_input(self) -> Self:
        if self.input is None and self.previous_response_id is None:
            raise ValueError("input is required where no previous_response_id is given")
        return self


class InputTokensRequest(ResponseQuestion):
    """Asks how many tokens the input of a response has."""

    personality: Annotated[Any, neutral(None)] = None


class ResponseRequest(ResponseQuestion):
    """Asks for a response."""

    stream: bool | None = False
    stream_options: ResponseStreamOptions | None = None
    store: Annotated[
        bool | None, Field(description="false: it cannot be asked for again, nor gone on from")
    ] = True
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    include: Annotated[
        list[Included] | None, Field(description=f"{LOGPROBS}: tell how likely each token was")
    ] = None
    top_logprobs: Annotated[
        int | None,
        Field(ge=0, le=MAX_LOGPROBS, description="and so many of the likeliest in its place"),
    ] = None
    service_tier: Annotated[
        Literal["auto", "default", "flex"] | None,
        Field(description="flex: after other questions, when they compete"),
    ] = None
    prompt_cache_retention: Literal["in_memory", "24h"] | None = None
    prompt_cache_options: PromptCacheOptions | None = None

    # harmless
    metadata: Annotated[dict[str, str] | None, Field(max_length=16)] = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    user: str | None = None

    access_programs: Annotated[Any, neutral(None)] = None
    background: Annotated[Any, neutral(None, False)] = None
    background_options: Annotated[Any, neutral(None)] = None
    context_management: Annotated[Any, neutral(None, [])] = None
    image: Annotated[Any, neutral(None)] = None
    max_tool_calls: Annotated[Any, neutral(None)] = None
    moderation: Annotated[Any, neutral(None)] = None
    prompt: Annotated[Any, neutral(None)] = None

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is allowed only with stream=true")
        return self

    @property
    def is_stored(self) -> bool:
        return self.store is not False

    @property
    def tells_logprobs(self) -> bool:
        return LOGPROBS in (self.include or ()) or bool(self.top_logprobs)
