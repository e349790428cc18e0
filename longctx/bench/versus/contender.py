"""An engine in a process of its own, told what to do in lines of JSON: see `workers/worker.py`.

Each runs by the interpreter of its own environment, so no package of ours meets one of theirs.
Read `running`.
"""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

from longctx.bench.served.process import last_words, own_environment
from longctx.errors import InvalidRequest, LongctxError

WORKERS = Path(__file__).parent / "workers"


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """How one engine is run; `own` is longctx, by this interpreter."""

    name: str
    adapter: Path
    python: Path
    load: Mapping[str, Any]  # what its `Contender` takes
    own: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One answer; `seconds` of each token, from when the prompt was given."""

    token_ids: tuple[int, ...]
    seconds: tuple[float, ...]

    @property
    def first_token_seconds(self) -> float:
        return self.seconds[0]

    @property
    def interval_seconds(self) -> float:
        """The mean time between tokens; there are two at least."""
        return (self.seconds[-1] - self.seconds[0]) / (len(self.seconds) - 1)


class Contender:
    """One running engine. Every method raises LongctxError where the engine fails or ends."""

    def __init__(self, engine: Engine, process: subprocess.Popen[str], said: IO[bytes]) -> None:
        self._engine, self._process, self._said = engine, process, said
        self.name = engine.name
        self.about: dict[str, Any] = self._do("load", **engine.load)

    def answer(self, prompt: tuple[int, ...], new_tokens: int) -> Answer:
        told = self._do("answer", prompt=prompt, new_tokens=new_tokens)
        if len(told["seconds"]) != new_tokens:
            raise LongctxError(
                f"{self.name} gave {len(told['seconds'])} tokens instead of {new_tokens}"
            )
        return Answer(token_ids=tuple(told["token_ids"]), seconds=tuple(told["seconds"]))

    def save(self, folder: Path) -> int:
        """Keep what the engine computed in `folder`, or where its options say; return the bytes."""
        return int(self._do("save", folder=str(folder)))

    def restore(self, folder: Path) -> float:
        """Bring it back; return the seconds that this took."""
        return float(self._do("restore", folder=str(folder)))

    def peak_bytes(self) -> int | None:
        """Return the most memory that the process ever had; None where the system tells none."""
        told = self._do("peak_bytes")
        return None if told is None else int(told)

    def _do(self, name: str, **values: Any) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": name, **values}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended: its output says so, and its last words why
        # No limit of time: a long prompt takes minutes
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise LongctxError(f"{self.name} ended with {code} at {name}: {self._last_words()}")
        told = json.loads(line)
        if "error" in told:
            raise LongctxError(f"{self.name} could not {name}: {told['error']}")
        return told["ok"]

    def _last_words(self) -> str:
        self._said.seek(0)
        return last_words(self._said.read().decode(errors="replace"))


@contextmanager
def running(engine: Engine) -> Iterator[Contender]:
    """Start an engine's process and load the model; end the process with the block.

    Raises InvalidRequest where there is no such interpreter, LongctxError where the engine fails.
    """
    # Of rivals, nothing but their own environment counts; longctx may be found by PYTHONPATH
    alone = "-P" if engine.own else "-I"
    words = [str(engine.python), alone, str(WORKERS / "worker.py"), str(engine.adapter)]
    with TemporaryFile() as said:
        try:
            process = subprocess.Popen(
                words,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
                env=own_environment(),
                start_new_session=True,  # Ctrl-C is ours
            )
        except OSError as error:
            raise InvalidRequest(
                f"{engine.name} cannot be started by {engine.python}: {error.strerror}; name the "
                "interpreter in its environment, such as venv/bin/python"
            ) from error
        with process:
            try:
                yield Contender(engine, process, said)
            finally:
                process.kill()  # it holds nothing that has to be kept


def longctx_engine(options: Path) -> Engine:
    """Return longctx as a contender, with the options in this file."""
    return Engine(
        name="longctx",
        adapter=Path(__file__).parent / "with_longctx.py",
        python=Path(sys.executable),
        load={"options": str(options)},
        own=True,
    )


def rival(
    name: str, adapter: str, python: Path, *, model: Path, threads: int, context: int
) -> Engine:
    """Return another engine, run by `python`, which is not resolved: it may be a venv's link."""
    return Engine(
        name=name,
        adapter=WORKERS / adapter,
        python=python.absolute(),
        load={"model": str(model), "threads": threads, "context": context},
    )
