"""What was answered so far, a line of JSON each: an interrupted run goes on where it was.

The first line says of which run, and of which commit; the lines of another one are never mixed
with it. A run that came to its end is renamed, from NAME.part.jsonl to NAME.jsonl, and the next
one begins anew.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from longctx.bench.report import Parameter, commit
from longctx.errors import InvalidRequest

Key = tuple[str | int | float, ...]


class Journal:
    """The records of one run, by key; on disk where there is a file."""

    def __init__(self, out: Path | None, name: str, run: Mapping[str, Parameter]) -> None:
        """Read what an interrupted run of the same kind left in the folder.

        Raises InvalidRequest where the file is of another run, or not readable as one.
        """
        self.records: dict[Key, dict[str, Any]] = {}
        self._stream: BinaryIO | None = None
        if out is None:
            return
        out.mkdir(parents=True, exist_ok=True)
        self._file, self._end = out / f"{name}.part.jsonl", out / f"{name}.jsonl"
        file, run = self._file, {**run, "commit": commit()}
        kept = self._read(file, run) if file.exists() else b""
        self._stream = file.open("r+b" if kept else "wb")
        if kept:  # without the line that was cut short when the run was
            self._stream.seek(len(kept))
            self._stream.truncate()
        else:
            self._write({"run": dict(run)})

    def add(self, key: Key, record: Mapping[str, Any]) -> None:
        """Keep a record; it outlives this process when this returns."""
        self.records[key] = dict(record)
        self._write({"key": key, **record})

    def close(self) -> None:
        """Close the file, to be gone on with; records stay readable."""
        if self._stream is not None:
            self._stream.close()

    def finish(self) -> None:
        """Close the file of a run that came to its end."""
        if self._stream is not None:
            self._stream.close()
            self._file.replace(self._end)

    def _read(self, file: Path, run: Mapping[str, Parameter]) -> bytes:
        """Take in the whole lines of a file, and return them."""
        content = file.read_bytes()
        kept = content[: content.rfind(b"\n") + 1]
        lines = kept.split(b"\n")[:-1]
        if not lines:
            return b""
        try:
            before = json.loads(lines[0])["run"]
            for line in lines[1:]:
                record = json.loads(line)
                self.records[tuple(record.pop("key"))] = record
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidRequest(
                f"{file} holds no answers of a run ({error!r}); delete it, or choose another --out"
            ) from error
        if changed := [name for name in {**before, **run} if before.get(name) != run.get(name)]:
            told = ", ".join(
                f"{name} was {before.get(name)!r} and is {run.get(name)!r}" for name in changed
            )
            raise InvalidRequest(
                f"{file} holds the answers of another run: {told}; delete it, or choose another "
                "--out"
            )
        return kept

    def _write(self, line: Mapping[str, Any]) -> None:
        if self._stream is not None:
            text = json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n"
            self._stream.write(text.encode())
            self._stream.flush()
