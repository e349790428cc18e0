"""Grammars that answers have to follow, in the words of llguidance, which compiles them.

A grammar is text: the engine's process compiles it (`engine/grammars.py`). What can be known
without that is checked here: how large a schema is, and how deep.
"""

import json
from collections.abc import Mapping
from typing import Any

from longctx.errors import InvalidRequest

MAX_SCHEMA_BYTES = 256 << 10
MAX_SCHEMA_DEPTH = 100  # of the JSON text: the compiler reads 128 levels
ANY_OBJECT: Mapping[str, Any] = {"type": "object"}
# One space, or a new line and the indentation of the next: with more a model that is lost could
# write nothing but space to the end of its answer.
WHITESPACE = r"[ ]|\n[ ]{0,40}"


def json_grammar(schema: Mapping[str, Any], *, strict: bool, param: str) -> str:
    """Return the grammar of JSON values that are valid for a schema.

    With `strict` a keyword that cannot be followed is an error when the grammar is compiled; else
    it is passed over. Raises InvalidRequest, at `param`, for a schema that is too large or deep.
    """
    check_schema(schema, param=param)
    return json.dumps({"grammars": [{"json_schema": compiled_schema(schema, strict=strict)}]})


def compiled_schema(schema: Mapping[str, Any], *, strict: bool) -> dict[str, Any]:
    """Return the schema with what the compiler has to know of it."""
    options = {"whitespace_pattern": WHITESPACE, "lenient": not strict}
    return {**schema, "x-guidance": options}


def check_schema(schema: Mapping[str, Any], *, param: str) -> None:
    """Raises InvalidRequest for a schema that is too large or too deep to be compiled."""
    depth = _depth(schema)
    if depth > MAX_SCHEMA_DEPTH:
        raise InvalidRequest(
            f"the schema is {depth} levels deep, the limit is {MAX_SCHEMA_DEPTH}; name parts of it "
            "in $defs and refer to them",
            param=param,
        )
    size = len(json.dumps(schema))
    if size > MAX_SCHEMA_BYTES:
        raise InvalidRequest(
            f"the schema has {size} bytes, the limit is {MAX_SCHEMA_BYTES}; name parts that come "
            "again in $defs and refer to them, or ask for less at once",
            param=param,
        )


def _depth(value: Any) -> int:
    """Measure how deep lists and objects lie in each other, without recursion."""
    deepest, level = 0, [value]
    while level:
        inner: list[Any] = []
        for each in level:
            inner += each.values() if isinstance(each, Mapping) else []
            inner += each if isinstance(each, list) else []
        deepest += any(isinstance(each, Mapping | list) for each in level)
        level = inner
    return deepest
