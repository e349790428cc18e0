"""Tools that a model may call, which of them it has to, and its calls in a conversation."""

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag

from longctx.text.tool_forms import Tool

NO_PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {},
    "additionalProperties": False,
}
Name = Annotated[str, Field(pattern="^[a-zA-Z0-9_-]{1,64}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class FunctionDefinition(_Strict):
    """Describes a function. Without `parameters` it has none."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolDefinition(_Strict):
    type: Literal["function"]
    function: FunctionDefinition

    @property
    def tool(self) -> Tool:
        told = self.function
        return Tool(
            name=told.name,
            description=told.description,
            parameters=NO_PARAMETERS if told.parameters is None else told.parameters,
            strict=bool(told.strict),
        )


class NamedFunction(_Strict):
    name: str


class NamedTool(_Strict):
    type: Literal["function"]
    function: NamedFunction


def _word_or_object(value: Any) -> str:
    return "a word" if isinstance(value, str) else "an object"


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("a word")]
    | Annotated[NamedTool, Tag("an object")],
    Discriminator(_word_or_object),
]


def json_object(text: str) -> str:
    """Returns the text of a JSON object. Raises ValueError for any other text."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError("is not a JSON object")
    return text


class CalledFunction(_Strict):
    name: str
    arguments: Annotated[str, AfterValidator(json_object)]


class ToolCallBody(_Strict):
    """A call in an earlier answer."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
