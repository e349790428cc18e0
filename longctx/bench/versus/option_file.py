"""The options of a command as a TOML file, to give them to another process."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def write_options(config: Any, path: Path) -> Path:
    """Write every field that a config tree has a value for as a key; return `path`."""
    path.write_text("".join(f"{line}\n" for line in _lines(config)), encoding="utf-8")
    return path


def _lines(config: Any) -> Iterator[str]:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _lines(value)
        elif value is not None:
            # Of these types JSON's form is TOML's, too
            plain = value if isinstance(value, bool | int | float) else str(value)
            yield f"{field.name} = {json.dumps(plain, ensure_ascii=False)}"
