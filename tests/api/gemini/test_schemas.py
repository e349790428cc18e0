"""Google's form of a schema means the same when it is written as JSON Schema."""

from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from api.gemini.schemas import DEEPEST, json_schema
from longctx.errors import InvalidRequest

LEAVES: dict[str, st.SearchStrategy[Any]] = {
    "STRING": st.text(max_size=4),
    "NUMBER": st.floats(-9, 9),
    "INTEGER": st.integers(-9, 9),
    "BOOLEAN": st.booleans(),
}


@st.composite
def schemas_with_values(draw: st.DrawFn, depth: int = 3) -> tuple[dict[str, Any], Any]:
    """A schema of Google's, and a value that fits it."""
    kinds = [*LEAVES, *(["ARRAY", "OBJECT"] if depth else [])]
    kind = draw(st.sampled_from(kinds))
    schema: dict[str, Any] = {"type": draw(st.sampled_from([kind, kind.lower()]))}
    value: Any
    if kind in LEAVES:
        value = draw(LEAVES[kind])
        if kind == "STRING" and draw(st.booleans()):
            schema |= {"format": "enum", "enum": list({value, "other"})}
    elif kind == "ARRAY":
        schema["items"], item = draw(schemas_with_values(depth - 1))
        value = [item] * draw(st.integers(0, 2))
        schema |= {"minItems": "0", "max_items": "2"}
    else:
        names = draw(st.lists(st.sampled_from("abcd"), unique=True))
        drawn = {name: draw(schemas_with_values(depth - 1)) for name in names}
        schema["properties"] = {name: inner for name, (inner, _) in drawn.items()}
        schema["required"] = names
        schema["propertyOrdering"] = draw(st.permutations(names))
        value = {name: inner for name, (_, inner) in drawn.items()}
    if draw(st.booleans()):
        schema["nullable"] = True
        value = draw(st.sampled_from([value, None]))
    return schema, value


@settings(deadline=None)
@given(schemas_with_values())
def test_what_fits_the_one_fits_the_other(drawn: tuple[dict[str, Any], Any]) -> None:
    schema, value = drawn
    written = json_schema(schema, param="schema")
    jsonschema.Draft202012Validator.check_schema(written)
    jsonschema.validate(value, written)
    if "propertyOrdering" in schema:
        assert list(written["properties"]) == schema["propertyOrdering"]
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**(value or {}), "another": 1}, written)


def test_what_google_does_not_have_is_refused() -> None:
    for wrong in (
        {"type": ["STRING"]},
        {"const": 3},
        {"type": "ARRAY", "items": 3},
        {"type": "ARRAY", "minItems": "many"},
        {"anyOf": {"type": "STRING"}},
        {"type": "OBJECT", "properties": [1]},
        {"type": "OBJECT", "properties": {}, "propertyOrdering": ["a"]},
    ):
        with pytest.raises(InvalidRequest):
            json_schema(wrong, param="schema")
    deep: dict[str, Any] = {"type": "STRING"}
    for _ in range(DEEPEST + 1):
        deep = {"type": "ARRAY", "items": deep}
    with pytest.raises(InvalidRequest, match="nested"):
        json_schema(deep, param="schema")
