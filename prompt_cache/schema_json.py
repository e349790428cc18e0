"""Reads and writes schemas as JSON, which says what PML says, with text taken as it is.

    {"name": "travel", "content": [
      {"system": "You are a travel agent."},
      {"module": "trip", "content": ["Plan a trip of ",
          {"parameter": "duration", "length": 8, "default": "three days"}, ".\\n"]},
      {"union": [{"module": "harbour", "content": "..."},
                 {"module": "mountains", "content": "..."}]}
    ]}

An object has one field of ELEMENTS, which says what it is. `content` is a text, or a list of texts
and objects.
"""

import json
from collections.abc import Sequence
from typing import Any

from prompt_cache.errors import SchemaError
from prompt_cache.schema import (
    MAX_BYTES,
    MAX_DEPTH,
    MAX_ELEMENTS,
    ROLES,
    Element,
    ModuleNode,
    Node,
    ParameterNode,
    ScaffoldNode,
    Schema,
    TextNode,
    UnionNode,
    schema_of,
)

NAMED = ("module", "parameter")  # the field of that name has the element's name
ELEMENTS = (*NAMED, "union", "scaffold", *ROLES)  # the field of the others has the content
FIELDS = {"module": ("content",), "parameter": ("length", "default")}  # further ones


def read_json(text: str) -> Schema:
    """Return the schema. Raises SchemaError for what is no JSON, or no schema."""
    if len(text) > MAX_BYTES:
        raise SchemaError(
            f"the JSON has {len(text):,} characters, the limit is {MAX_BYTES:,}; upload long text "
            "to /v1/files and name the file in the prompt"
        )
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise SchemaError(f"line {error.lineno}, column {error.colno}: {error.msg}") from error
    except RecursionError as error:
        raise _too_deep("the schema") from error
    except ValueError as error:  # a number of thousands of digits
        raise SchemaError(f"the JSON cannot be read: {error}") from error
    return schema_from(value)


def schema_from(value: object) -> Schema:
    """Return the schema of JSON that was read already. Raises SchemaError."""
    if not isinstance(value, dict):
        raise SchemaError('a schema is an object such as {"name": "travel", "content": [...]}')
    return schema_of(_Elements().root(value))


def schema_object(schema: Schema) -> dict[str, Any]:
    """Return an object that reads back as the same schema."""
    roles = [{role.role: _content(role.content)} for role in schema.roles]
    return {"name": schema.name, "content": [*roles, *map(_object, schema.content)]}


class _Elements:
    """Turns the objects of one schema into elements, and counts them."""

    def __init__(self) -> None:
        self._count = 0

    def root(self, value: dict[str, Any]) -> Element:
        root = Element("schema", {}, "the schema")
        for name, given in value.items():
            if name == "content":
                self._fill(root, given, "content", depth=1)
            else:
                root.attributes[name] = given
        return root

    def _fill(self, element: Element, content: object, where: str, *, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise _too_deep(element.where)
        if isinstance(content, str):
            element.children = [content]
            return
        if not isinstance(content, list):
            raise element.fault("its content must be a text, or a list of texts and objects")
        for number, child in enumerate(content):
            if isinstance(child, str):
                element.children.append(child)
            else:
                element.children.append(self._element(child, f"{where}.{number}", depth=depth))

    def _element(self, value: object, where: str, *, depth: int) -> Element:
        self._count += 1
        if self._count > MAX_ELEMENTS:
            raise SchemaError(f"{where}: it is beyond {MAX_ELEMENTS:,} elements, the limit")
        kinds = [name for name in ELEMENTS if isinstance(value, dict) and name in value]
        if not isinstance(value, dict) or len(kinds) != 1:
            raise SchemaError(
                f"{where}: it must be a text or an object with one of the fields "
                f"{', '.join(ELEMENTS)}"
            )
        (kind,) = kinds
        named = kind in NAMED
        element = Element(kind, {"name": value[kind]} if named else {}, where)
        for field, given in value.items():
            if field == kind and not named:
                self._fill(element, given, f"{where}.{kind}", depth=depth + 1)
            elif field == "content" and kind == "module":
                self._fill(element, given, f"{where}.content", depth=depth + 1)
            elif field in FIELDS.get(kind, ()):
                element.attributes[field] = given
            elif field != kind:
                known = ", ".join((kind, *FIELDS.get(kind, ())))
                raise element.fault(f"there is no field {field!r}; it has {known}")
        return element


def _too_deep(where: str) -> SchemaError:
    return SchemaError(f"{where}: elements are nested {MAX_DEPTH} deep at most; flatten the schema")


def _content(nodes: Sequence[Node]) -> str | list[Any]:
    match nodes:
        case [TextNode(text)]:
            return text
        case _:
            return list(map(_object, nodes))


def _object(node: Node) -> str | dict[str, Any]:
    match node:
        case TextNode(text):
            return text
        case ParameterNode(name, length, default):
            given = {} if default is None else {"default": default}
            return {"parameter": name, "length": length, **given}
        case ModuleNode(name, content):
            return {"module": name, "content": _content(content)}
        case UnionNode(members):
            return {"union": list(map(_object, members))}
        case ScaffoldNode(members):
            return {"scaffold": list(map(_object, members))}
