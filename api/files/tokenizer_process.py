"""Reads uploaded documents and tokenizes their text in a process that may run wild or be killed.

A zygote is forked from the server while that has one thread. It holds the loaded tokenizer and
forks one child per document, so a document starts at once, with limits of its own, and costs the
others nothing: a child has the lowest priority and one thread, and is killed when it is cancelled
or over its limits.

The processes exchange lines of JSON. For each job the server sends its paths and limits; it
receives `pid`, then `read` (bytes so far) as often as there is progress, `count` (tokens) or
`error`, and last `exit` (the status of the child).
"""

import array
import asyncio
import codecs
import json
import os
import resource
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import msgspec

from api.background.finish import finish
from api.background.store_dir import read_path, reading_path
from api.files.reading import Reading
from longctx.documents.reader import is_plain_text, read_document
from longctx.errors import InvalidRequest, LongctxError
from longctx.text.tokenizer import Tokenizer
from offload.machine_limits import memory_bytes
from offload.units import GIB

# A piece of 2**20 characters takes about 1 s and 200 MiB to tokenize. The limits are for what has
# gone wrong: 30 times that time, and memory that no vocabulary needs. Data, not address space:
# libraries that are only mapped would count there, and a CUDA build maps gigabytes.
PIECE_CHARACTERS = 1 << 20
CPU_SECONDS = 60
CPU_SECONDS_PER_MIB = 30
DATA_BYTES = 4 << 30
# Real time is longer when the processors are busy: this work takes only what others leave.
PATIENCE = 60


class TokenizationFailed(LongctxError):
    """Raised when a document cannot be tokenized; the message says why."""


@dataclass(slots=True)
class _Child:
    pid: int | None = None
    unwanted: bool = False

    def kill(self) -> None:
        self.unwanted = True
        if self.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)


class TokenizerProcess:
    """Is made before there are threads, and then used and closed on the event loop."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Forks the zygote, so it must be called before there are threads."""
        ours, theirs = socket.socketpair()
        sys.stdout.flush()
        sys.stderr.flush()
        # Ctrl-C reaches the whole group: the zygote takes none, not even before it says so.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        self.zygote_pid = os.fork()
        if self.zygote_pid == 0:
            ours.close()
            _run_zygote(tokenizer, theirs)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        self._socket = ours
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._turn = asyncio.Lock()

    async def tokenize(
        self,
        text: Path,
        tokens: Path,
        *,
        filename: str = "",
        continues: bool,
        on_progress: Callable[[int], None] = lambda read_bytes: None,
    ) -> int:
        """Writes the token ids of a document to `tokens`, little-endian int32; returns the count.

        What is no UTF-8 text is read first: its text is then beside the document, as `read_path`
        says, and what `Reading` tells of it as `reading_path` says.

        One document at a time; cancelling kills the process at work. Once this has returned or
        raised, nothing writes `tokens`, or any other file, any more. `continues` says
        that other text precedes the document in its prompt. Raises TokenizationFailed.
        """
        child = _Child()
        # The child writes a partial file, and only this process names it `tokens`: a child that is
        # killed too late, or that outlives its zygote, leaves no tokens of a deleted document.
        partial = tokens.with_suffix(".partial")
        read = [read_path(text), reading_path(text)]
        partials = [path.with_name(f"{path.name}-partial") for path in read]
        job = {
            "text": str(text),
            "filename": filename,
            "read": [str(path) for path in partials],
            "tokens": str(partial),
            "continues": continues,
        }
        try:
            count = await finish(self._run(child, job, on_progress), on_cancel=child.kill)
            for path, name in zip(partials, read, strict=True):
                with suppress(FileNotFoundError):  # it was text as it came
                    path.rename(name)
            partial.rename(tokens)
        finally:
            for path in (*partials, partial):
                path.unlink(missing_ok=True)
        return count

    async def close(self) -> None:
        """Kills the zygote and abandons what it works on."""
        if self._streams is not None:
            self._streams[1].close()
        self._socket.close()
        with suppress(ProcessLookupError, ChildProcessError):
            os.kill(self.zygote_pid, signal.SIGKILL)
            await asyncio.to_thread(os.waitpid, self.zygote_pid, 0)

    async def _run(
        self, child: _Child, job: dict[str, Any], on_progress: Callable[[int], None]
    ) -> int:
        async with self._turn:
            if child.unwanted:
                raise TokenizationFailed("cancelled")
            mebibytes = os.path.getsize(job["text"]) >> 20
            cpu_seconds = CPU_SECONDS + CPU_SECONDS_PER_MIB * mebibytes
            deadline = asyncio.get_running_loop().call_later(PATIENCE * cpu_seconds, child.kill)
            result: dict[str, Any] = {}
            try:
                await self._send({**job, "cpu_seconds": cpu_seconds})
                while "exit" not in result:
                    message = await self._receive()
                    result |= message
                    if "pid" in message:
                        child.pid = message["pid"]
                        if child.unwanted:
                            child.kill()
                    elif "read" in message:
                        on_progress(message["read"])
            except TokenizationFailed:
                child.kill()  # it has outlived the zygote
                raise
            finally:
                child.pid = None  # the number may be another's from now on
                late = deadline.when() <= asyncio.get_running_loop().time()
                deadline.cancel()
        if "error" in result:
            raise TokenizationFailed(result["error"])
        if "count" not in result:
            raise TokenizationFailed(_cause_of_death(result["exit"], cpu_seconds, late))
        count = result["count"]
        assert isinstance(count, int)
        return count

    async def _send(self, message: dict[str, Any]) -> None:
        if self._streams is None:
            self._streams = await asyncio.open_connection(sock=self._socket)
        with suppress(OSError):  # the next receive says what is wrong
            self._streams[1].write(json.dumps(message).encode() + b"\n")

    async def _receive(self) -> dict[str, Any]:
        assert self._streams is not None
        line = b""
        with suppress(OSError):
            line = await self._streams[0].readline()
        if not line:
            raise TokenizationFailed(
                "the process that reads documents has ended; restart the server"
            )
        message = json.loads(line)
        assert isinstance(message, dict)
        return message


def _cause_of_death(status: int, cpu_seconds: int, late: bool) -> str:
    if late:
        return f"reading it took more than {PATIENCE * cpu_seconds} s; upload it in parts"
    if os.WIFSIGNALED(status):
        match os.WTERMSIG(status):
            case signal.SIGXCPU:
                return f"reading it took more than {cpu_seconds} s of CPU; upload it in parts"
            case signal.SIGABRT:
                return (
                    f"reading it took more than {_data_bytes() / GIB:.2g} GiB; upload it in parts"
                )
            case number:
                name = signal.Signals(number).name
                return f"the process that read it was ended by {name}; upload it again"
    return f"the process that read it ended with status {os.waitstatus_to_exitcode(status)}"


def _run_zygote(tokenizer: Tokenizer, connection: socket.socket) -> None:
    """Forks a child for each job. Never returns: the process ends when the server has ended and its
    end of the connection is closed."""
    try:
        # What the server has open (its port, its locks) must be free when the server is gone.
        keep = connection.fileno()
        os.closerange(3, keep)
        os.closerange(keep + 1, os.sysconf("SC_OPEN_MAX"))
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        leave_processors_to_others()
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the tokenizers library reads it
        lines = connection.makefile("rw", encoding="utf-8", newline="\n")
        for line in lines:
            pid = os.fork()
            if pid == 0:
                _run_child(tokenizer, json.loads(line), lines)
            _write(lines, pid=pid)
            _, status = os.waitpid(pid, 0)
            _write(lines, exit=status)
    except OSError:
        pass  # the server is gone
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def leave_processors_to_others() -> None:
    """Gives this process the lowest priority: its work takes only what others leave."""
    os.nice(19)
    if sys.platform == "linux":
        with suppress(PermissionError):
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def _data_bytes() -> int:
    """Returns what a child may hold: in a small container half of its memory, so that it lives."""
    return min(DATA_BYTES, memory_bytes() // 2)


def _too_much_memory() -> str:
    return f"reading it took more than {_data_bytes() / GIB:.2g} GiB"


def _run_child(tokenizer: Tokenizer, job: dict[str, Any], lines: TextIOWrapper) -> None:
    """Does one job and reports on it. Never returns: the process ends."""
    try:
        seconds = job["cpu_seconds"]
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_DATA, (_data_bytes(), _data_bytes()))
        text, tokens = Path(job["text"]), Path(job["tokens"])
        size = max(1, text.stat().st_size)
        if not is_plain_text(text, job["filename"]):
            text = _read(text, job["filename"], *map(Path, job["read"]))
        read_size = max(1, text.stat().st_size)
        count = _write_tokens(
            tokenizer,
            text,
            tokens,
            continues=job["continues"],
            on_progress=lambda read: _write(lines, read=read * size // read_size),
        )
        _write(lines, count=count)
    except InvalidRequest as error:
        _write(lines, error=str(error))
    except MemoryError:
        _write(lines, error=_too_much_memory())
    except OSError as error:
        with suppress(OSError):
            _write(
                lines, error=f"it cannot be read, or its tokens not be written: {error.strerror}"
            )
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _write(lines: TextIOWrapper, **message: Any) -> None:
    lines.write(json.dumps(message) + "\n")
    lines.flush()


def _read(source: Path, filename: str, text: Path, reading: Path) -> Path:
    """Writes the text of a document, and how it was read; returns the path of the text."""
    document = read_document(source, filename)
    text.write_text(document.text, encoding="utf-8", errors="replace", newline="")
    reading.write_bytes(msgspec.json.encode(Reading.of(document)))
    return text


def _write_tokens(
    tokenizer: Tokenizer,
    text: Path,
    tokens: Path,
    *,
    continues: bool,
    on_progress: Callable[[int], None],
) -> int:
    count = 0
    with tokens.open("wb") as file:
        for piece, read_bytes in _pieces(text):
            ids = array.array("i", tokenizer.encode(piece, continues=continues))
            if sys.byteorder == "big":
                ids.byteswap()
            ids.tofile(file)
            count += len(ids)
            continues = True
            on_progress(read_bytes)
        file.flush()
        os.fsync(file.fileno())
    return count


def _pieces(path: Path) -> Iterator[tuple[str, int]]:
    """Yields the text in pieces, each with the bytes read until then, without a byte order mark."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    text = ""
    with path.open("rb") as file:
        while data := file.read(PIECE_CHARACTERS):
            text += decoder.decode(data)
            while len(text) >= 2 * PIECE_CHARACTERS:
                end = cut(text)
                yield text[:end], file.tell()
                text = text[end:]
        if text:
            yield text, file.tell()


def cut(text: str) -> int:
    """Returns where the first piece of a long text ends: after a line, else before a space.

    Tokenizers end a token there anyway, so the pieces have the tokens that the whole would have.
    """
    end = text.rfind("\n", 1, PIECE_CHARACTERS)
    while end > PIECE_CHARACTERS // 2 and text[end + 1].isspace():
        end = text.rfind("\n", 1, end)
    if end > PIECE_CHARACTERS // 2:
        return end + 1
    end = text.rfind(" ", PIECE_CHARACTERS // 2, PIECE_CHARACTERS)
    return end if end > 0 else PIECE_CHARACTERS
