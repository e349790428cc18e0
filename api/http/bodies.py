"""The JSON bodies that clients may send, as strict types: nothing that would change an answer is
ignored.

A parameter is either served, or harmless (accepted, without effect on the answer by its nature),
or listed here as `neutral`: known from OpenAI's API, not served, and accepted only with a value
that asks for nothing. Every other name is unknown and refused.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from api.http.format_bodies import ResponseFormat
from api.http.message_bodies import (
    Message,
    RequestBody,
    TextOrTexts,
    check_ending,
    ending_of,
    neutral,
)
from api.http.tool_bodies import NamedTool, ToolChoice, ToolDefinition
from longctx.request import MAX_LOGPROBS, RequestClass, SamplingParams
from longctx.text.chat_template import Ending
from longctx.text.tool_forms import Tool, ToolForm
from offload.tier_names import MemoryTierName

MAX_PROMPTS = 2048
COMPLETION_TOKENS = 16  # of a completion that says nothing of it, as OpenAI has it
DAY_SECONDS = 86_400
HALF_HOUR_SECONDS = 1800


def _prompt_shape(value: Any) -> str | None:
    match value:
        case str():
            return "a string"
        case [int(), *_]:
            return "a list of token ids"
        case [list(), *_]:
            return "a list of lists"
        case list():
            return "a list"
        case _:
            return None


def _not_ahead(priority: int) -> int:
    if priority < 0:
        raise ValueError(
            f"is {priority}, the least is 0: no question goes ahead of others; leave it out"
        )
    return priority


class StreamOptions(RequestBody):
    include_usage: bool = False
    continuous_usage_stats: Annotated[
        bool, Field(description="with include_usage: the counts so far in every chunk")
    ] = False
    include_obfuscation: bool | None = None  # harmless: padding that changes no answer


# `SamplingParams` takes these by the same name, and has its own default for each that is absent.
AS_GIVEN = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "logit_bias",
    "ignore_eos",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)


class GenerationRequest(RequestBody):
    """Has what chat and completions share. `SamplingParams` checks the ranges."""

    model: Annotated[str | None, Field(description="the served name; may be left out")] = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    return_progress: Annotated[
        bool, Field(description="streams: chunks that say how much of the prompt is computed")
    ] = False
    cache_explain: Annotated[
        bool, Field(description="say what each tier had of the prompt, and why no more")
    ] = False
    n: int | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None  # 0: read the prompt, answer nothing
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    response_format: Annotated[
        ResponseFormat | None,
        Field(description="text, any JSON object, or JSON that is valid for a schema"),
    ] = None
    stop: TextOrTexts | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: Annotated[
        bool | None, Field(description="go on after the end token, up to max_tokens")
    ] = None
    service_tier: Annotated[
        Literal["auto", "default", "flex"] | None,
        Field(description="flex: after other questions, when they compete"),
    ] = None
    priority: Annotated[
        Annotated[int, AfterValidator(_not_ahead), Field(json_schema_extra={"minimum": 0})] | None,
        Field(description="above 0: after other questions, as with flex, however far above"),
    ] = None

    # harmless
    user: str | None = None
    metadata: dict[str, str] | None = None

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is allowed only with stream=true")
        if self.counts_on and not self.include_usage:
            raise ValueError("continuous_usage_stats is allowed only with include_usage=true")
        return self

    @property
    def answer_tokens(self) -> int | None:
        """The most tokens that the answer may have; None leaves that to the context."""
        return self.max_tokens

    @property
    def answer_tokens_field(self) -> str:
        """The field that `answer_tokens` was given by."""
        return "max_tokens"

    @property
    def usual_answer_tokens(self) -> int | None:
        """The most tokens of an answer of which nothing is said, where there is room for them."""
        return None

    @property
    def in_memory(self) -> bool:
        """Whether the prompt may not be written to disk."""
        return False

    def grammar(self, form: ToolForm | None) -> str | None:
        """Returns what the answer has to follow; `form` is how the model calls tools.

        Raises InvalidRequest for a schema that is too large.
        """
        return None if self.response_format is None else self.response_format.grammar

    @property
    def echoes(self) -> bool:
        """Whether the answer begins with the prompt."""
        return False

    @property
    def answer_logprobs(self) -> int | None:
        """How many of the likeliest tokens are told beside each; None asks for nothing."""
        return None

    @model_validator(mode="after")
    def _priority_and_tier_agree(self) -> Self:
        if self.priority is not None and self.service_tier in ("default", "flex"):
            fitting = "flex" if self.priority > 0 else "default"
            if self.service_tier != fitting:
                raise ValueError(
                    f"priority {self.priority} contradicts service_tier {self.service_tier!r}, "
                    f"it goes with {fitting!r}; leave one of them out"
                )
        return self

    @property
    def tier(self) -> str | None:
        """The service tier of the question, which the answer names; None where none is asked
        for."""
        if self.service_tier != "auto":
            return self.service_tier
        return "flex" if self.request_class is RequestClass.BATCH else "default"

    @property
    def request_class(self) -> RequestClass:
        """How the engine's scheduler is to rank the question among others."""
        later = self.service_tier == "flex" or (self.priority or 0) > 0
        return RequestClass.BATCH if later else RequestClass.INTERACTIVE

    @property
    def counts_on(self) -> bool:
        """Whether each chunk of a stream tells the counts so far."""
        return self.stream_options is not None and self.stream_options.continuous_usage_stats

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def offered(self) -> list[Tool]:
        """The tools that the model is told of."""
        return []

    def sampling(self, max_tokens: int | None, form: ToolForm | None = None) -> SamplingParams:
        """Returns the parameters for the engine; `form` is how the model calls tools.

        Raises InvalidRequest for a value out of range.
        """
        given = {name: value for name in AS_GIVEN if (value := getattr(self, name)) is not None}
        return SamplingParams(
            max_tokens=max_tokens,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            grammar=self.grammar(form),
            shown_tokens=() if form is None or not self.offered else form.shown_tokens,
            logprobs=self.answer_logprobs,
            prompt_logprobs=self.answer_logprobs if self.echoes else None,
            **given,
        )


class PromptCache(RequestBody):
    """Says what the conversation begins with: a named prompt, or modules of a schema."""

    prompt: Annotated[str | None, Field(description="name of a stored prompt")] = None
    schema_name: Annotated[str | None, Field(alias="schema", description="name of a schema")] = None
    modules: Annotated[
        list[str] | None, Field(description="names of the schema's modules that the prompt takes")
    ] = None
    parameters: Annotated[
        dict[str, str] | None, Field(description="arguments of the modules, by name")
    ] = None
    level: Annotated[
        str | None, Field(description="exact, link:K or modular; the server's default if absent")
    ] = None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.prompt is None) == (self.schema_name is None):
            raise ValueError("must have either prompt or schema")
        if self.prompt is not None:
            for name in ("modules", "parameters", "level"):
                if getattr(self, name) is not None:
                    raise ValueError(f"has {name}, which are a schema's; leave it out of a prompt")
        return self


class PromptCacheOptions(RequestBody):
    mode: Literal["implicit", "explicit"] | None = None
    ttl: Literal["30m"] | None = None


class ChatRequest(GenerationRequest):
    """Asks for the next message of a conversation."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=0)] | None = None
    prompt_cache: Annotated[
        PromptCache | None, Field(description="what the conversation begins with")
    ] = None
    add_generation_prompt: Annotated[
        bool | None, Field(description="false: nothing is put after the last message")
    ] = None
    continue_final_message: Annotated[
        bool | None, Field(description="the answer goes on with the last message, an assistant's")
    ] = None
    prompt_cache_retention: Literal["in_memory", "in-memory", "24h"] | None = None
    prompt_cache_options: PromptCacheOptions | None = None
    logprobs: Annotated[
        bool | None, Field(description="tell how likely each token of the answer was")
    ] = None
    top_logprobs: Annotated[
        int | None,
        Field(ge=0, le=MAX_LOGPROBS, description="and so many of the likeliest in its place"),
    ] = None

    tools: Annotated[
        list[ToolDefinition] | None,
        Field(max_length=128, description="functions that the model may ask for"),
    ] = None
    tool_choice: Annotated[
        ToolChoice | None, Field(description="none, auto, required, or one of them by name")
    ] = None
    parallel_tool_calls: Annotated[bool | None, Field(description="false: at most one call")] = None

    # harmless
    prediction: Any = None
    prompt_cache_key: str | None = None  # says which server of many; here is one, with one cache
    safety_identifier: str | None = None

    audio: Annotated[Any, neutral(None)] = None
    function_call: Annotated[Any, neutral(None, "none")] = None
    functions: Annotated[Any, neutral(None, [])] = None
    modalities: Annotated[Any, neutral(None, ["text"])] = None
    moderation: Annotated[Any, neutral(None)] = None
    reasoning_effort: Annotated[Any, neutral(None, "none")] = None
    store: Annotated[Any, neutral(None, False)] = None
    verbosity: Annotated[Any, neutral(None, "medium")] = None
    web_search_options: Annotated[Any, neutral(None)] = None

    @property
    def in_memory(self) -> bool:
        """Whether the prompt may not be written to disk."""
        return self.prompt_cache_retention in ("in_memory", "in-memory")

    @model_validator(mode="after")
    def _one_ending(self) -> Self:
        check_ending(self.messages, self.add_generation_prompt, self.continue_final_message)
        return self

    @property
    def ending(self) -> Ending:
        return ending_of(self.add_generation_prompt, self.continue_final_message)

    @model_validator(mode="after")
    def _tools_go_together(self) -> Self:
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise ValueError("tools has two functions of one name; rename one")
        if isinstance(self.tool_choice, NamedTool):
            name = self.tool_choice.function.name
            if name not in names:
                raise ValueError(f"tool_choice names {name!r}, which is not among the tools")
        elif self.tool_choice == "required" and not names:
            raise ValueError("tool_choice is required, and there are no tools")
        shaped = self.response_format is not None and self.response_format.type != "text"
        if self.offered and shaped:
            raise ValueError("response_format excludes tools; leave one of them out")
        return self

    @property
    def offered(self) -> list[Tool]:
        """The tools that the model is told of."""
        return [] if self.tool_choice == "none" else [each.tool for each in self.tools or ()]

    def grammar(self, form: ToolForm | None) -> str | None:
        tools, several = self.offered, self.parallel_tool_calls is not False
        if form is None or not tools:
            return super().grammar(form)
        if isinstance(self.tool_choice, NamedTool):
            tools = [tool for tool in tools if tool.name == self.tool_choice.function.name]
            return form.grammar(tools, required=True, several=False, param="tools")
        required = self.tool_choice == "required"
        if required or not several or any(tool.strict for tool in tools):
            return form.grammar(tools, required=required, several=several, param="tools")
        return super().grammar(form)

    @model_validator(mode="after")
    def _top_logprobs_need_logprobs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs is allowed only with logprobs=true")
        return self

    @property
    def answer_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def keep_seconds(self) -> int | None:
        """How long the prompt is to be retained at least; None when that is not asked for."""
        if self.prompt_cache_retention == "24h":
            return DAY_SECONDS
        asked = self.prompt_cache_options is not None and self.prompt_cache_options.ttl is not None
        return HALF_HOUR_SECONDS if asked and not self.in_memory else None

    @property
    def answer_tokens(self) -> int | None:
        if self.max_completion_tokens is not None:
            return self.max_completion_tokens
        return self.max_tokens

    @property
    def answer_tokens_field(self) -> str:
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"


TokenIds = Annotated[list[int], Field(min_length=1, fail_fast=True)]
Prompt = Annotated[
    Annotated[str, Tag("a string")]
    | Annotated[list[str], Tag("a list"), Field(min_length=1, max_length=MAX_PROMPTS)]
    | Annotated[TokenIds, Tag("a list of token ids")]
    | Annotated[list[TokenIds], Tag("a list of lists"), Field(max_length=MAX_PROMPTS)],
    Discriminator(
        _prompt_shape,
        custom_error_type="prompt_type",
        custom_error_message="must be a string, a list of strings, of token ids, or of such lists",
    ),
]


class CompletionRequest(GenerationRequest):
    """Asks for what comes after one prompt or several."""

    prompt: Prompt

    echo: Annotated[bool | None, Field(description="begin the answer with the prompt")] = None
    logprobs: Annotated[
        int | None,
        Field(
            ge=0,
            le=MAX_LOGPROBS,
            description="tell how likely each token was, and so many of the likeliest in its "
            "place; with echo of the prompt's tokens too, all of which are computed for that",
        ),
    ] = None

    best_of: Annotated[Any, neutral(None, 1)] = None
    suffix: Annotated[Any, neutral(None, "")] = None

    @model_validator(mode="after")
    def _one_prompt_is_explained(self) -> Self:
        if self.cache_explain and len(self.prompts) > 1:
            raise ValueError("cache_explain is for one prompt; send them one at a time")
        return self

    @property
    def usual_answer_tokens(self) -> int | None:
        return None if "max_tokens" in self.model_fields_set else COMPLETION_TOKENS

    @property
    def echoes(self) -> bool:
        return bool(self.echo)

    @property
    def answer_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        match self.prompt:
            case str() | [int(), *_]:
                return [self.prompt]  # type: ignore[list-item]
            case several:
                return several  # type: ignore[return-value]


class ClearRequest(RequestBody):
    """Names the tier whose idle blocks are to be evicted."""

    tier: Annotated[
        Literal[MemoryTierName, "all"],
        Field(description="the tier to evict from; all: every one in memory"),
    ] = "device"


class TokenizeRequest(RequestBody):
    """Asks for the tokens of plain text, or of messages in the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    tools: Annotated[
        list[ToolDefinition] | None,
        Field(max_length=128, description="with messages: functions that the model is told of"),
    ] = None
    add_special_tokens: Annotated[
        bool | None, Field(description="of a prompt: with what comes before it by default")
    ] = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    return_token_strs: Annotated[
        bool | None, Field(description="name each token, too, as log-probabilities do")
    ] = None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("either prompt or messages is required, not both")
        if self.messages is None and (
            self.add_generation_prompt is not None or self.continue_final_message is not None
        ):
            raise ValueError("a prompt has no messages to end; leave out how they do")
        if self.messages is None and self.tools:
            raise ValueError("tools are for messages; a prompt has them in its text")
        if self.messages is not None:
            if self.add_special_tokens is not None:
                raise ValueError("add_special_tokens is for a prompt; messages have a template's")
            check_ending(self.messages, self.add_generation_prompt, self.continue_final_message)
        return self

    @property
    def ending(self) -> Ending:
        return ending_of(self.add_generation_prompt, self.continue_final_message)


class DetokenizeRequest(RequestBody):
    """Asks for the text of tokens."""

    model: str | None = None
    tokens: list[int]
