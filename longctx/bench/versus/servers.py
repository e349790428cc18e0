"""longctx's server and llama.cpp's, started as anybody would start them, and asked over HTTP.

Both get the same chat completions. Read `running_server`.
"""

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from longctx.bench.served.answer import Answer, read_answer, streaming
from longctx.bench.served.process import last_words, own_environment, stop
from longctx.errors import InvalidRequest, LongctxError

START_SECONDS = 600.0  # a codec is measured at a model's first start
POLL_SECONDS = 0.05
SLOT_FILE = "slot.bin"
HOST = "127.0.0.1"


class Server(Protocol):
    """A kind of server: how it is started on a folder that outlives it, and how it is asked."""

    name: str
    headers: Mapping[str, str]

    def command(self, folder: Path, port: int) -> list[str]:
        """Return the words that start it."""

    def without_cache(self, number: int) -> tuple[dict[str, str], dict[str, Any]]:
        """Return headers and fields of the body that make the `number`-th such question cold."""

    def save(self, address: str) -> float:
        """Have it keep what it computed, where it does not by itself; return the seconds."""

    def restore(self, address: str) -> float:
        """Have it bring that back, where it does not by itself; return the seconds."""

    def stored_bytes(self, folder: Path) -> int:
        """Return the bytes that it left on the disk."""


class LongctxServer:
    """`longctx serve`. What is computed for one API key is not used for another: so one is cold."""

    name = "longctx"

    def __init__(self, options: Path, keys: int) -> None:
        self._options = options
        self._keys = [f"key-{number}" for number in range(keys)]
        self.headers: Mapping[str, str] = {"Authorization": "Bearer everybody"}

    def command(self, folder: Path, port: int) -> list[str]:
        words = [sys.executable, "-P", "-m", "longctx", "serve", "--config", str(self._options)]
        words += ["--store-dir", str(folder), "--host", HOST, "--port", str(port)]
        return words + [word for key in ("everybody", *self._keys) for word in ("--api-key", key)]

    def without_cache(self, number: int) -> tuple[dict[str, str], dict[str, Any]]:
        return {"Authorization": f"Bearer {self._keys[number]}"}, {}

    def save(self, address: str) -> float:
        return 0.0

    def restore(self, address: str) -> float:
        return 0.0

    def stored_bytes(self, folder: Path) -> int:
        return sum(file.stat().st_size for file in folder.rglob("*.kv"))


class LlamaServer:
    """llama.cpp's `llama-server` with one slot, saved and restored, and its prompt cache in RAM."""

    name = "llama.cpp"
    headers: Mapping[str, str] = {}

    def __init__(self, program: Path, model: Path, *, threads: int, context: int) -> None:
        self._program, self._model = program, model
        self._threads, self._context = threads, context

    def command(self, folder: Path, port: int) -> list[str]:
        words = [str(self._program.absolute()), "--model", str(self._model), "--host", HOST]
        words += ["--port", str(port), "--parallel", "1", "--ctx-size", str(self._context)]
        words += ["--threads", str(self._threads), "--threads-batch", str(self._threads)]
        return [*words, "--flash-attn", "on", "--slot-save-path", str(folder)]

    def without_cache(self, number: int) -> tuple[dict[str, str], dict[str, Any]]:
        return {}, {"cache_prompt": False}

    def save(self, address: str) -> float:
        return self._slot(address, "save")

    def restore(self, address: str) -> float:
        return self._slot(address, "restore")

    def stored_bytes(self, folder: Path) -> int:
        return (folder / SLOT_FILE).stat().st_size

    def _slot(self, address: str, action: str) -> float:
        began = time.perf_counter()
        body = json.dumps({"filename": SLOT_FILE}).encode()
        with _opened(f"{address}/slots/0?action={action}", body, {}) as response:
            response.read()
        return time.perf_counter() - began


@contextmanager
def running_server(server: Server, folder: Path, errors: Path) -> Iterator[str]:
    """Yield the address of a server that answers, on `folder`; stop it with the block.

    What it says goes to `errors`. Raises LongctxError where it ends before it is ready.
    """
    port = _free_port()
    words = server.command(folder, port)
    with errors.open("ab") as log:
        try:
            process = subprocess.Popen(
                words,
                stdout=log,
                stderr=log,
                env=own_environment(),
                start_new_session=True,  # Ctrl-C is ours; the server is then told by SIGTERM
            )
        except OSError as error:
            raise InvalidRequest(
                f"{server.name}'s server cannot be started by {words[0]}: {error.strerror}"
            ) from error
    address = f"http://{HOST}:{port}"
    try:
        _wait(server.name, process, address, errors)
        yield address
    finally:
        stop(process)


def ask(
    server: Server, address: str, text: str, *, max_tokens: int, cold: int | None = None
) -> Answer:
    """Ask in one message of the user, greedily; `cold` numbers questions that use no cache."""
    headers, fields = ({}, {}) if cold is None else server.without_cache(cold)
    headers = {**server.headers, **headers}
    asked = json.loads(streaming(_model(server, address), text, max_tokens))
    body = json.dumps({**asked, **fields}).encode()
    began = time.perf_counter()
    with _opened(f"{address}/v1/chat/completions", body, headers) as response:
        return read_answer(response, began)


def _model(server: Server, address: str) -> str:
    with _opened(f"{address}/v1/models", None, server.headers) as response:
        return str(json.load(response)["data"][0]["id"])


def _opened(url: str, body: bytes | None, headers: Mapping[str, str]) -> Any:
    """Open a GET, or a POST of `body`. No limit of time: a long prompt takes minutes."""
    request = urllib.request.Request(url, body, {"Content-Type": "application/json", **headers})
    try:
        return urllib.request.urlopen(request)
    except urllib.error.HTTPError as error:
        said = error.read(2000).decode(errors="replace").strip()
        raise LongctxError(f"{url} answered {error.code}: {said}") from error
    except OSError as error:
        raise LongctxError(f"{url} cannot be asked: {error}") from error


def _free_port() -> int:
    with socket.socket() as one:
        one.bind((HOST, 0))
        return int(one.getsockname()[1])


def _wait(name: str, process: subprocess.Popen[bytes], address: str, errors: Path) -> None:
    """Return when `/health` answers 200. Raises LongctxError where it never will."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        with suppress(OSError), urllib.request.urlopen(f"{address}/health") as response:
            if response.status == 200:
                return
        if process.poll() is not None:
            said = last_words(errors.read_text(encoding="utf-8", errors="replace"))
            raise LongctxError(f"{name}'s server ended with {process.returncode}: {said}")
        time.sleep(POLL_SECONDS)
    raise LongctxError(f"{name}'s server was not ready after {START_SECONDS:.0f} s")
