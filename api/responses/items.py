"""The input of a response: items, as clients send them and as they are stored."""

from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from api.http.message_bodies import RequestBody, neutral, text_or_list
from api.http.tool_bodies import Name, json_object


def _only_function(kind: str) -> str:
    if kind != "function":
        raise ValueError(
            f"{kind!r} is a tool that others run, and this server calls no other service; "
            "only functions can be offered"
        )
    return kind


class InputText(RequestBody):
    type: Literal["input_text"]
    text: str

    prompt_cache_breakpoint: Any = None  # harmless: every prefix is found again without marks


class OutputText(RequestBody):
    """A part of an earlier answer."""

    type: Literal["output_text"]
    text: str

    annotations: Any = None  # harmless: what was told beside an answer is no part of the prompt
    logprobs: Any = None


class InputFile(RequestBody):
    """Names an uploaded file, or holds one that travels inside the item as base64."""

    type: Literal["input_file"]
    file_id: Annotated[str | None, Field(description="of an upload")] = None
    file_data: Annotated[str | None, Field(description="a data URL with the document")] = None
    filename: str | None = None

    file_url: Annotated[Any, neutral(None)] = None
    detail: Any = None  # harmless: documents are read as text
    prompt_cache_breakpoint: Any = None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.file_id is None) == (self.file_data is None):
            raise ValueError("must have either file_id or file_data")
        return self


InputPart: TypeAlias = Annotated[InputText | InputFile | OutputText, Field(discriminator="type")]
InputContent: TypeAlias = Annotated[
    Annotated[str, Tag("a string")] | Annotated[list[InputPart], Tag("a list")],
    Discriminator(text_or_list),
]
ItemStatus: TypeAlias = Literal["in_progress", "completed", "incomplete"]


class MessageItem(RequestBody):
    """What somebody said. Its `id` and `status` come from an earlier answer."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: InputContent

    id: str | None = None
    status: ItemStatus | None = None
    phase: Any = None  # harmless

    @property
    def parts(self) -> list[InputText | InputFile | OutputText]:
        if isinstance(self.content, str):
            if self.role == "assistant":
                return [OutputText(type="output_text", text=self.content)]
            return [InputText(type="input_text", text=self.content)]
        return self.content


class FunctionCallItem(RequestBody):
    """A call in an earlier answer."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: Annotated[str, AfterValidator(json_object)]

    id: str | None = None
    status: ItemStatus | None = None
    caller: Annotated[Any, neutral(None)] = None
    namespace: Annotated[Any, neutral(None)] = None


class FunctionCallOutputItem(RequestBody):
    """What a function returned."""

    type: Literal["function_call_output"]
    call_id: str
    output: InputContent

    id: str | None = None
    status: ItemStatus | None = None

    @property
    def parts(self) -> list[InputText | InputFile | OutputText]:
        if isinstance(self.output, str):
            return [InputText(type="input_text", text=self.output)]
        return self.output


def _item_kind(value: Any) -> str | None:
    """Chooses the branch of an item; one without a type is a message."""
    kind = value.get("type", "message") if isinstance(value, dict) else getattr(value, "type", None)
    return f"a {kind}" if isinstance(kind, str) else None


Item: TypeAlias = Annotated[
    Annotated[MessageItem, Tag("a message")]
    | Annotated[FunctionCallItem, Tag("a function_call")]
    | Annotated[FunctionCallOutputItem, Tag("a function_call_output")],
    Discriminator(
        _item_kind,
        custom_error_type="item_type",
        custom_error_message="an item is a message, a function_call or a function_call_output",
    ),
]
Items: TypeAlias = Annotated[
    Annotated[str, Tag("a string")] | Annotated[list[Item], Tag("a list"), Field(min_length=1)],
    Discriminator(text_or_list),
]


class ResponseFunction(RequestBody):
    """Describes a function that the model may ask for. Without `parameters` it has none."""

    type: Annotated[str, AfterValidator(_only_function)]
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ChosenFunction(RequestBody):
    type: Annotated[str, AfterValidator(_only_function)]
    name: str


def _word_or_object(value: Any) -> str:
    return "a word" if isinstance(value, str) else "an object"


Choice: TypeAlias = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("a word")]
    | Annotated[ChosenFunction, Tag("an object")],
    Discriminator(_word_or_object),
]
