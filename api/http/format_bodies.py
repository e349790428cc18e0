"""Which form an answer has: text, any JSON object, or JSON that is valid for a schema."""

from typing import Annotated, Any, Literal

from pydantic import Field

from api.http.message_bodies import RequestBody
from longctx.text.grammar import ANY_OBJECT, json_grammar

SCHEMA_PARAM = "response_format.json_schema.schema"
Name = Annotated[str, Field(pattern="^[a-zA-Z0-9_-]{1,64}$")]


class TextFormat(RequestBody):
    type: Literal["text"]

    @property
    def grammar(self) -> None:
        return None


class JSONObjectFormat(RequestBody):
    type: Literal["json_object"]

    @property
    def grammar(self) -> str:
        return json_grammar(ANY_OBJECT, strict=True, param="response_format")


class NamedSchema(RequestBody):
    """Names a schema. With `strict` it may have only keywords that can be followed."""

    name: Name
    description: str | None = None  # harmless: what it is for is told in the prompt
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class JSONSchemaFormat(RequestBody):
    type: Literal["json_schema"]
    json_schema: NamedSchema

    @property
    def grammar(self) -> str:
        """The grammar of the schema. Raises InvalidRequest for one that is too large or deep."""
        named = self.json_schema
        schema = ANY_OBJECT if named.schema_ is None else named.schema_
        return json_grammar(schema, strict=bool(named.strict), param=SCHEMA_PARAM)


ResponseFormat = Annotated[
    TextFormat | JSONObjectFormat | JSONSchemaFormat, Field(discriminator="type")
]
