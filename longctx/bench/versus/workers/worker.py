"""A process that runs one engine: a command a line on its input, an answer a line on its output.

Run as `python worker.py ADAPTER.py` by the interpreter of the engine's own environment, so it
imports nothing but the standard library; the adapter beside it imports the engine. `load` makes
the adapter's `Contender` of what the command says; each later command is one of its methods. An
answer is {"ok": what it returned} or {"error": why not}. The end of the input is the end.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

STATUS = Path("/proc/self/status")


def main(adapter: str) -> None:
    """Answer commands until there are none. What libraries print goes to the error output."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    worker = Worker(Path(adapter))
    for line in sys.stdin:
        answers.write(json.dumps(worker.answer(json.loads(line))) + "\n")
        answers.flush()


class Worker:
    """Turns commands into calls of one adapter's `Contender`."""

    def __init__(self, adapter: Path) -> None:
        self._adapter = adapter
        self._contender: Any = None

    def answer(self, command: dict[str, Any]) -> dict[str, Any]:
        """Do what the command says; whatever goes wrong in the engine becomes an answer."""
        name = command.pop("do")
        try:
            if name == "load":
                self._contender = _module(self._adapter).Contender(**command)
                return {"ok": self._contender.about}
            if name == "peak_bytes":
                return {"ok": peak_bytes()}
            return {"ok": getattr(self._contender, name)(**command)}
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}


def peak_bytes() -> int | None:
    """Read the most memory that this process ever had, mapped files included; None off Linux."""
    if not STATUS.exists():
        return None
    for line in STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None


def _module(path: Path) -> Any:
    """Load the adapter by its place: it is in no package that this interpreter knows."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main(sys.argv[1])
