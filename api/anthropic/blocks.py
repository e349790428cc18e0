"""The blocks that messages are made of, as clients of Anthropic's API send them."""

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, Discriminator, Field, Tag

from api.http.message_bodies import RequestBody, neutral, text_or_list
from api.http.tool_bodies import Name


class CacheControl(RequestBody):
    """Marks the end of what is to be found again: at least so long, where that is an hour."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class _Block(RequestBody):
    cache_control: CacheControl | None = None


class Citations(RequestBody):
    """Where an answer's text is from is not told."""

    enabled: Annotated[Any, neutral(None, False)] = None


class TextBlock(_Block):
    type: Literal["text"]
    text: str

    citations: Annotated[Any, neutral(None, [])] = None


class PlainTextSource(RequestBody):
    type: Literal["text"]
    media_type: Literal["text/plain"] = "text/plain"
    data: str


class Base64Source(RequestBody):
    type: Literal["base64"]
    media_type: str = "application/pdf"  # any that files may have: the data tell which it is
    data: str


class FileSource(RequestBody):
    type: Literal["file"]
    file_id: str


class ContentSource(RequestBody):
    """A document in blocks of text, which are read one after the other."""

    type: Literal["content"]
    content: Annotated[
        Annotated[str, Tag("a string")] | Annotated[list[TextBlock], Tag("a list")],
        Discriminator(text_or_list),
    ]


class DocumentBlock(_Block):
    """Puts a document into a message. `title` names one that comes along; `context` is text."""

    type: Literal["document"]
    source: Annotated[
        PlainTextSource | Base64Source | FileSource | ContentSource, Field(discriminator="type")
    ]
    title: str | None = None
    context: str | None = None

    citations: Citations | None = None


class ToolUseBlock(_Block):
    """A call in an earlier answer."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]

    caller: Annotated[Any, neutral(None, {"type": "direct"})] = None
    toolset_name: Annotated[Any, neutral(None)] = None


ResultPart: TypeAlias = Annotated[TextBlock | DocumentBlock, Field(discriminator="type")]


class ToolResultBlock(_Block):
    """What a tool returned."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: (
        Annotated[
            Annotated[str, Tag("a string")] | Annotated[list[ResultPart], Tag("a list")],
            Discriminator(text_or_list),
        ]
        | None
    ) = None
    is_error: bool | None = None

    toolset_name: Annotated[Any, neutral(None)] = None


Block: TypeAlias = Annotated[
    TextBlock | DocumentBlock | ToolUseBlock | ToolResultBlock, Field(discriminator="type")
]


class AnthropicMessage(RequestBody):
    role: Literal["user", "assistant", "system"]
    content: Annotated[
        Annotated[str, Tag("a string")] | Annotated[list[Block], Tag("a list")],
        Discriminator(text_or_list),
    ]

    @property
    def blocks(self) -> list[Any]:
        if isinstance(self.content, str):
            return [TextBlock(type="text", text=self.content)]
        return self.content


def _only_custom(kind: str | None) -> str | None:
    if kind not in (None, "custom"):
        raise ValueError(
            f"{kind!r} is a tool that Anthropic defines or runs, and this server knows no such "
            "one; only tools with an input_schema can be offered"
        )
    return kind


class AnthropicTool(_Block):
    """Describes a tool that the model may ask for."""

    type: Annotated[str | None, AfterValidator(_only_custom)] = None
    name: Name
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None

    allowed_callers: Annotated[Any, neutral(None, ["direct"])] = None
    defer_loading: Annotated[Any, neutral(None, False)] = None
    eager_input_streaming: Any = None  # harmless: arguments are streamed as they are written
    input_examples: Annotated[Any, neutral(None, [])] = None


class AnthropicChoice(RequestBody):
    """Says whether tools are to be used."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None
