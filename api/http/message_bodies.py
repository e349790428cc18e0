"""The messages of a conversation, as clients send them: text and files, in parts or as a string.

Here too is what all bodies are made of: the strict base class, and what marks a parameter that is
known and not served.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)

from api.http.tool_bodies import ToolCallBody
from longctx.text.chat_template import Ending


def neutral(*values: Any) -> AfterValidator:
    """Marks a parameter that is not served: only these values of it are accepted."""

    def check(value: Any) -> Any:
        if not any(type(value) is type(accepted) and value == accepted for accepted in values):
            raise ValueError("is not supported by this server; leave it out")
        return value

    return AfterValidator(check)


# This chooses the branch of a union that a value is read as; only its errors are then reported.
# Tags have spaces, so that an error's path tells them from fields.
def text_or_list(value: Any) -> str:
    return "a string" if isinstance(value, str) else "a list"


class RequestBody(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


TextOrTexts = Annotated[
    Annotated[str, Tag("a string")] | Annotated[list[str], Tag("a list")],
    Discriminator(text_or_list),
]


class TextPart(RequestBody):
    type: Literal["text"]
    text: str

    prompt_cache_breakpoint: Any = None  # harmless: every prefix is found again without marks


class FileReference(RequestBody):
    """Names an uploaded file, or holds one that travels inside the message as a data URL."""

    file_id: Annotated[str | None, Field(description="of an upload")] = None
    file_data: Annotated[str | None, Field(description="a data URL with the text")] = None
    filename: str | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.file_id is None) == (self.file_data is None):
            raise ValueError("must have either file_id or file_data")
        return self


class FileContent(RequestBody):
    """Puts a file into a message. `reuse` is a level of `prompt_cache.level`: where a file follows
    other text than it was computed after, what was computed there may be reused at that level."""

    type: Literal["file"]
    file: FileReference
    reuse: Annotated[
        str | None,
        Field(description="after other text: at which level the file's state may be reused"),
    ] = None

    prompt_cache_breakpoint: Any = None  # harmless


Part = Annotated[TextPart | FileContent, Field(discriminator="type")]
Content = Annotated[
    Annotated[str, Tag("a string")] | Annotated[list[Part], Tag("a list")],
    Discriminator(text_or_list),
]


class Message(RequestBody):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None

    name: Annotated[Any, neutral(None)] = None
    tool_calls: Annotated[
        list[ToolCallBody] | None, Field(description="an assistant's: what it called")
    ] = None
    tool_call_id: Annotated[str | None, Field(description="a tool's: which call it answers")] = None
    function_call: Annotated[Any, neutral(None)] = None
    refusal: Annotated[Any, neutral(None)] = None
    audio: Annotated[Any, neutral(None)] = None
    annotations: Annotated[Any, neutral(None, [])] = None

    @model_validator(mode="after")
    def _calls_and_answers(self) -> Self:
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"has tool_calls, which are the assistant's, not the {self.role}'s")
        if (self.tool_call_id is None) == (self.role == "tool"):
            raise ValueError("must have a tool_call_id if and only if it is a tool's")
        return self

    @property
    def parts(self) -> list[TextPart | FileContent]:
        if isinstance(self.content, str):
            return [TextPart(type="text", text=self.content)]
        return self.content or []


def check_ending(messages: list[Message], asks: bool | None, continues: bool | None) -> None:
    """Raises ValueError where a conversation cannot end as it is to."""
    if continues and asks:
        raise ValueError("continue_final_message excludes add_generation_prompt=true")
    if continues and messages[-1].role != "assistant":
        raise ValueError(
            "continue_final_message is for a last message of the assistant, and this is "
            f"the {messages[-1].role}'s"
        )


def ending_of(asks: bool | None, continues: bool | None) -> Ending:
    if continues:
        return Ending.OPEN
    return Ending.CLOSED if asks is False else Ending.ANSWER
