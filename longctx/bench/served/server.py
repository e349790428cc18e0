"""Runs `longctx serve` with the options of a benchmark, and asks it as any client would."""

import http.client
import json
import os
import re
import secrets
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from longctx.bench.served.answer import Answer, read_answer, streaming
from longctx.bench.served.process import last_words, own_environment, stop, write_options
from longctx.config import EngineConfig
from longctx.errors import LongctxError

READY = "longctx ready "
SAMPLE = re.compile(r"^(\w[\w:]*)(?:\{(.*)\})? (\S+)$")
LABEL = re.compile(r'(\w+)="([^"]*)"')


class RunningServer:
    """A server that runs; every call makes a connection of its own.

    Calls raise LongctxError where it refuses or does not answer.
    """

    def __init__(self, address: str, pid: int) -> None:
        self._host = address.removeprefix("http://")
        self._pid = pid
        self.model: str = self._get("/v1/models")["data"][0]["id"]

    def upload(self, name: str, text: str) -> str:
        """Store a text as a file, and return the file's id; it is computed from then on."""
        border = secrets.token_hex(16)
        head = (
            f'--{border}\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n'
            "Content-Type: text/plain\r\n\r\n"
        )
        body = f"{head}{text}\r\n--{border}--\r\n".encode()
        kind = f"multipart/form-data; boundary={border}"
        told = json.loads(self._send("POST", "/v1/files", body, kind))
        return str(told["id"])

    def file(self, file_id: str) -> dict[str, Any]:
        """Return a file's object."""
        return self._get(f"/v1/files/{file_id}")

    def ask(self, file_id: str, question: str, *, max_tokens: int) -> Answer:
        """Stream the greedy answer to a question about a file."""
        content: list[dict[str, Any]] = [
            {"type": "file", "file": {"file_id": file_id}},
            {"type": "text", "text": question},
        ]
        body = streaming(self.model, content, max_tokens)
        began = time.perf_counter()
        with self._response("POST", "/v1/chat/completions", body) as response:
            return read_answer(response, began)

    def metric(self, name: str, label: str) -> defaultdict[str, float]:
        """Return the samples of a metric by the value of one label; 0 where there is none."""
        values: defaultdict[str, float] = defaultdict(float)
        for line in self._send("GET", "/metrics").decode().splitlines():
            found = SAMPLE.match(line)
            if found is not None and found[1] == name:
                labels = dict(LABEL.findall(found[2] or ""))
                values[labels.get(label, "")] += float(found[3])
        return values

    def peak_bytes(self) -> int:
        """Return the most memory that the server's processes have held, each at its own time; 0
        where the system does not tell."""
        return sum(_peak_bytes(pid) for pid in (self._pid, *_descendants(self._pid)))

    def busy_seconds(self) -> float:
        """Return the time that processors have spent on the server's processes; 0 where the system
        does not tell."""
        return sum(_busy_seconds(pid) for pid in (self._pid, *_descendants(self._pid)))

    def _get(self, path: str) -> dict[str, Any]:
        told = json.loads(self._send("GET", path))
        assert isinstance(told, dict)
        return told

    def _send(self, method: str, path: str, body: bytes | None = None, kind: str = "") -> bytes:
        with self._response(method, path, body, kind) as response:
            return response.read()

    @contextmanager
    def _response(
        self, method: str, path: str, body: bytes | None = None, kind: str = ""
    ) -> Iterator[http.client.HTTPResponse]:
        headers = {} if body is None else {"Content-Type": kind or "application/json"}
        with closing(http.client.HTTPConnection(self._host)) as connection:
            try:
                connection.request(method, path, body, headers)
                response = connection.getresponse()
                if response.status != 200:
                    raise LongctxError(f"{path} answered {response.status}: {response.read()!r}")
                yield response
            except (OSError, http.client.HTTPException) as error:
                raise LongctxError(f"the server does not answer {path}: {error}") from error


@contextmanager
def serving(engine: EngineConfig, folder: Path) -> Iterator[RunningServer]:
    """Yield a server with these options that keeps all it stores in `folder`; ended by SIGTERM.

    Raises LongctxError, with what it said, where it does not start.
    """
    options = write_options(engine, folder / "longctx.toml")
    errors = folder / "stderr"
    words = ["--config", str(options), "--store-dir", str(folder / "store"), "--port", "0"]
    with (
        errors.open("wb") as log,
        subprocess.Popen(
            [sys.executable, "-P", "-m", "longctx", "serve", *words],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=own_environment(),
            start_new_session=True,  # Ctrl-C is for this process, which ends the server
        ) as process,
    ):
        try:
            assert process.stdout is not None
            ready = next((line for line in process.stdout if line.startswith(READY)), None)
            if ready is None:
                said = errors.read_text(encoding="utf-8", errors="replace")
                raise LongctxError(f"the server did not start: {last_words(said)}")
            yield RunningServer(ready.removeprefix(READY).strip(), process.pid)
        finally:
            stop(process)


def _descendants(pid: int) -> Iterator[int]:
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, file.read_text(encoding="ascii").split()):
            yield child
            yield from _descendants(child)


def _busy_seconds(pid: int) -> float:
    """Count the process, and what it has started and seen end."""
    try:
        told = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return 0.0
    ticks = map(int, told.rpartition(")")[2].split()[11:15])
    return sum(ticks) / os.sysconf("SC_CLK_TCK")


def _peak_bytes(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return 0
    found: Mapping[str, str] = dict(
        line.split(":", 1) for line in status.splitlines() if ":" in line
    )
    return int(found.get("VmHWM", "0 kB").split()[0]) << 10
