"""Reads a schema in either of its written forms."""

from prompt_cache.pml import read_pml
from prompt_cache.schema import Schema
from prompt_cache.schema_json import read_json


def read_schema(text: str) -> Schema:
    """Return the schema that the text says: PML if it begins as markup, else JSON.

    Raises SchemaError.
    """
    text = text.removeprefix("\ufeff")
    return read_pml(text) if text.lstrip().startswith("<") else read_json(text)
