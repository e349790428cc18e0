"""Google's form of a schema, a part of OpenAPI 3.0, written as JSON Schema."""

from typing import Any

from pydantic.alias_generators import to_camel

from longctx.errors import InvalidRequest

TYPES = {"STRING", "NUMBER", "INTEGER", "BOOLEAN", "ARRAY", "OBJECT", "NULL"}
AS_THEY_ARE = {"title", "description", "default", "example", "pattern", "minimum", "maximum"}
COUNTS = {"minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties"}
DEEPEST = 64
ORDER = ("type", "properties", "items", "anyOf", "enum", "required", "additionalProperties")
# Formats of numbers say how a client holds them; `enum` repeats what the values say.
SILENT_FORMATS = {"int32", "int64", "float", "double", "enum"}


def json_schema(schema: dict[str, Any], *, param: str) -> dict[str, Any]:
    """Returns the schema as JSON Schema, its properties in the order of `propertyOrdering`.

    Raises InvalidRequest, at `param`, for what Google's form does not have.
    """
    return _written(schema, param, DEEPEST)


def _written(schema: Any, param: str, depth: int) -> dict[str, Any]:
    if not isinstance(schema, dict):
        raise InvalidRequest(f"{param} must be an object", param=param)
    if depth == 0:
        raise InvalidRequest(f"{param} is nested deeper than {DEEPEST} levels", param=param)
    given = {to_camel(name): value for name, value in schema.items() if value is not None}
    result: dict[str, Any] = {}
    for name, value in given.items():
        match name:
            case "type":
                result["type"] = _type(value, param)
            case "nullable" | "propertyOrdering":
                pass
            case "format":
                if value not in SILENT_FORMATS:
                    result["format"] = value
            case "enum" | "required":
                result[name] = value
            case "items":
                result["items"] = _written(value, f"{param}.items", depth - 1)
            case "anyOf":
                if not isinstance(value, list):
                    raise InvalidRequest(f"{param}.anyOf must be a list", param=param)
                result["anyOf"] = [_written(each, f"{param}.anyOf", depth - 1) for each in value]
            case "properties":
                result["properties"] = _properties(given, param, depth)
                result["additionalProperties"] = False  # Google's objects have no others
            case _ if name in COUNTS:
                result[name] = _count(value, f"{param}.{name}", param)
            case _ if name in AS_THEY_ARE:
                result[name] = value
            case _:
                raise InvalidRequest(
                    f"{param}.{name} is not a field of Google's schemas; leave it out, or send the "
                    "schema as JSON Schema",
                    param=param,
                )
    # In one order, whatever the client's: the same tools are then the same prompt.
    names = sorted(result, key=lambda name: (ORDER.index(name) if name in ORDER else -1, name))
    result = {name: result[name] for name in names}
    return _nullable(result) if given.get("nullable") is True else result


def _type(value: Any, param: str) -> str:
    if isinstance(value, str) and value.upper() in TYPES:
        return value.lower()
    raise InvalidRequest(
        f"{param}.type is {value!r}; it must be one of {', '.join(sorted(TYPES))}", param=param
    )


def _count(value: Any, where: str, param: str) -> int:
    """Reads a count, which Google writes as text: it has 64 bits."""
    try:
        return int(value)
    except (TypeError, ValueError):
        raise InvalidRequest(f"{where} must be a whole number", param=param) from None


def _properties(given: dict[str, Any], param: str, depth: int) -> dict[str, Any]:
    properties = given["properties"]
    if not isinstance(properties, dict):
        raise InvalidRequest(f"{param}.properties must be an object", param=param)
    ordering = given.get("propertyOrdering", [])
    if not isinstance(ordering, list) or any(name not in properties for name in ordering):
        raise InvalidRequest(f"{param}.propertyOrdering must list names of properties", param=param)
    return {
        name: _written(properties[name], f"{param}.properties.{name}", depth - 1)
        for name in dict.fromkeys((*ordering, *properties))
    }


def _nullable(schema: dict[str, Any]) -> dict[str, Any]:
    if "anyOf" in schema:
        return {**schema, "anyOf": [*schema["anyOf"], {"type": "null"}]}
    if "enum" in schema:
        schema = {**schema, "enum": [*schema["enum"], None]}
    return {**schema, "type": [schema["type"], "null"]} if "type" in schema else schema
