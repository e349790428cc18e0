"""Another process of a benchmark: the options that it gets, how it ends, what it said last."""

import dataclasses
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

STOP_SECONDS = 120.0  # what a server computed is written to the disk first
TOLD_LINES = 8


def write_options(config: Any, path: Path) -> Path:
    """Write every field that a config tree has a value for as a key of TOML; return `path`."""
    path.write_text("".join(f"{line}\n" for line in _lines(config)), encoding="utf-8")
    return path


def own_environment() -> dict[str, str]:
    """Return our environment without longctx's options, which would be taken twice."""
    return {name: value for name, value in os.environ.items() if not name.startswith("LONGCTX_")}


def stop(process: "subprocess.Popen[Any]") -> None:
    """End a process that leads a session of its own by SIGTERM, and by force if need be."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def last_words(said: str) -> str:
    """Shorten what a process said to the lines that may tell why it ended."""
    return " / ".join(said.strip().splitlines()[-TOLD_LINES:]) or "it said nothing"


def _lines(config: Any) -> Iterator[str]:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _lines(value)
        elif value is not None:
            # Of these types JSON's form is TOML's, too
            plain = value if isinstance(value, bool | int | float) else str(value)
            yield f"{field.name} = {json.dumps(plain, ensure_ascii=False)}"
