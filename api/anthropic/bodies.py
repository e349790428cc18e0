"""The bodies of `/v1/messages`. As in `api/http/bodies.py`, nothing that would change an answer is
ignored."""

from collections.abc import Iterator
from itertools import chain
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from api.anthropic.blocks import (
    AnthropicChoice,
    AnthropicMessage,
    AnthropicTool,
    CacheControl,
    TextBlock,
)
from api.http.message_bodies import RequestBody, neutral, text_or_list

MOST_MARKS = 4


class OutputFormat(RequestBody):
    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(RequestBody):
    """Says which form the answer has."""

    format: Annotated[OutputFormat | None, Field(description="JSON that is valid for a schema")] = (
        None
    )
    effort: Annotated[Any, neutral(None)] = None
    task_budget: Annotated[Any, neutral(None)] = None


class CountTokensRequest(RequestBody):
    """Asks how many tokens messages have."""

    model: Annotated[str | None, Field(description="the served name; may be left out")] = None
    messages: Annotated[list[AnthropicMessage], Field(min_length=1)]
    system: Annotated[
        Annotated[
            Annotated[str, Tag("a string")] | Annotated[list[TextBlock], Tag("a list")],
            Discriminator(text_or_list),
        ]
        | None,
        Field(description="what the conversation begins with"),
    ] = None
    tools: Annotated[list[AnthropicTool] | None, Field(max_length=128)] = None
    tool_choice: AnthropicChoice | None = None
    output_config: OutputConfig | None = None
    cache_control: Annotated[
        CacheControl | None, Field(description="as if the last block had it")
    ] = None

    # harmless
    user_profile_id: str | None = None

    speed: Annotated[Any, neutral(None, "standard")] = None
    thinking: Annotated[Any, neutral(None, {"type": "disabled"})] = None
    context_management: Annotated[Any, neutral(None)] = None
    mcp_servers: Annotated[Any, neutral(None, [])] = None

    @model_validator(mode="after")
    def _choice_is_there(self) -> Self:
        names = [tool.name for tool in self.tools or ()]
        if self.tool_choice is not None:
            kind, name = self.tool_choice.type, self.tool_choice.name
            if (kind == "tool") != (name is not None):
                raise ValueError("tool_choice must have a name if and only if its type is tool")
            if name is not None and name not in names:
                raise ValueError(f"tool_choice names {name!r}, which is not among the tools")
            if kind == "any" and not names:
                raise ValueError("tool_choice is any, and there are no tools")
        if len(set(names)) < len(names):
            raise ValueError("tools has two of one name; rename one")
        return self

    @model_validator(mode="after")
    def _marks_are_few_and_in_order(self) -> Self:
        marks = [mark for mark in self._marks() if mark is not None]
        if len(marks) > MOST_MARKS:
            raise ValueError(
                f"cache_control is given {len(marks)} times, the limit is {MOST_MARKS}; mark the "
                "ends of the longest parts that stay the same"
            )
        lives = [mark.ttl == "1h" for mark in marks]
        if lives != sorted(lives, reverse=True):
            raise ValueError(
                "cache_control has a ttl of 1h after one of 5m; longer ones come first"
            )
        return self

    def _marks(self) -> Iterator[CacheControl | None]:
        for block in chain(self.tools or (), self.system_blocks):
            yield block.cache_control
        for message in self.messages:
            for block in message.blocks:
                content = getattr(block, "content", None)
                for inner in content if isinstance(content, list) else ():
                    yield inner.cache_control
                yield block.cache_control
        yield self.cache_control

    @property
    def system_blocks(self) -> list[TextBlock]:
        if isinstance(self.system, str):
            return [TextBlock(type="text", text=self.system)] if self.system else []
        return self.system or []


class MessagesRequest(CountTokensRequest):
    """Asks for the next message of a conversation."""

    max_tokens: Annotated[int, Field(ge=1)]
    stream: bool | None = False
    stop_sequences: list[str] | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None

    # harmless
    metadata: dict[str, Any] | None = None
    service_tier: Literal["auto", "standard_only"] | None = None

    container: Annotated[Any, neutral(None)] = None
    diagnostics: Annotated[Any, neutral(None)] = None
    inference_geo: Annotated[Any, neutral(None)] = None
