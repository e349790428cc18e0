"""`longctx chat` in a terminal: a pseudoterminal, with what somebody would type."""

import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.support.tiny_models import write_model
from tests.support.tiny_tokenizer import write_tokenizer
from tests.support.waiting import patient, wait_for

OPTIONS = ("--device-pool-gib", "0.1", "--threads", "1", "--device", "cpu", "--kv-codec", "raw")
END_TOKEN = 1

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="pseudoterminals of Linux")


class Terminal:
    """Collects what a process writes to its terminal, and types."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.shown = ""
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def type(self, text: str) -> None:
        os.write(self.descriptor, text.encode())

    def wait(self, text: str) -> str:
        """Waits until `text` is shown; returns what came before it, and forgets both."""
        wait_for(lambda: text in self.shown or not self.reader.is_alive())
        before, found, rest = self.shown.partition(text)
        assert found, f"it ended without {text!r}: {before}"
        self.shown = rest
        return before

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self.descriptor, 4096)
            except OSError:  # the process has ended
                return
            if not data:
                return
            self.shown += data.decode(errors="replace")


def _as_a_shell_does() -> None:
    """Makes Ctrl-C a signal, and lets it through: a background job, as which tests may run, has it
    ignored, and so has what it starts."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def chat(*argv: Any) -> Iterator[tuple[Terminal, subprocess.Popen[bytes]]]:
    ours, theirs = pty.openpty()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TERM": "dumb"}
    process = subprocess.Popen(
        [sys.executable, "-m", "longctx", "chat", *map(str, argv), *OPTIONS],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
        preexec_fn=_as_a_shell_does,
    )
    os.close(theirs)
    terminal = Terminal(ours)
    try:
        yield terminal, process
    finally:
        process.kill()
        process.wait()
        terminal.reader.join(patient())
        os.close(ours)


def test_a_conversation_about_two_documents(tmp_path: Path) -> None:
    first, second = tmp_path / "first.txt", tmp_path / "second.html"
    first.write_text("The access code of the north gate is 7421.")
    second.write_text("<p>The gate number of the crane in Belgrade is 5964.</p>")
    with chat(first, second) as (terminal, process):
        terminal.wait("Ctrl-D ends.")
        terminal.wait("> ")
        terminal.type("What is the access code of the north gate?\n")
        terminal.wait("gate?")
        assert "7421" in terminal.wait("prompt tokens were cached")
        terminal.wait("> ")
        terminal.type("/new\n")
        terminal.wait("begins anew")
        terminal.wait("> ")
        terminal.type("What is the gate number of the crane in Belgrade?\n")
        terminal.wait("Belgrade?")
        assert "5964" in terminal.wait("prompt tokens were cached")
        terminal.wait("> ")
        terminal.type("\x04")  # Ctrl-D
        assert process.wait(patient()) == 0
    assert "Traceback" not in terminal.shown


@pytest.fixture
def endless_model(tmp_path: Path) -> Path:
    """A model whose answers never end by themselves, and which has little room."""
    folder = tmp_path / "endless"
    folder.mkdir()
    write_model(folder, num_hidden_layers=2, max_position_embeddings=4096)
    write_tokenizer(folder)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][END_TOKEN] = 0.0  # others are likelier
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_ctrl_c_stops_an_answer_and_no_more(endless_model: Path) -> None:
    with chat("--model", endless_model, "--max-context", "1024") as (terminal, process):
        terminal.wait("> ")
        terminal.type("some")
        terminal.wait("some")  # echoed, so that the line is waited for again
        terminal.type("\x03")  # which gives it up
        terminal.wait("Ctrl-C stops an answer")
        terminal.wait("> ")
        terminal.type("Tell a tale.\n")
        terminal.wait("tale.\r\n")
        wait_for(lambda: len(terminal.shown) > 8)
        terminal.type("\x03")
        terminal.wait("stopped")
        terminal.wait("> ")
        terminal.type("boats and fish " * 200 + "\n")
        terminal.wait("longctx: ")
        assert "limit" in terminal.wait("begins a shorter conversation")
        terminal.type("Go on.\n")  # with what was said
        terminal.wait("prompt tokens were cached")
        terminal.wait("> ")
        terminal.type("\x04")
        assert process.wait(patient()) == 0
    assert "Traceback" not in terminal.shown


def test_lines_of_a_pipe_are_questions(endless_model: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    options = ("--model", endless_model, "--max-context", "256", *OPTIONS)
    ended = subprocess.run(
        [sys.executable, "-m", "longctx", "chat", *map(str, options)],
        input="One?\n\n/new\nTwo?\n",
        capture_output=True,
        env=environment,
        text=True,
        timeout=patient(),
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("prompt tokens were cached") == 2
    assert ended.stdout.strip() and "> " not in ended.stdout[:2]
