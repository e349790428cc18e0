"""Runs `longctx serve` in a process of its own, as anybody would start it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

START_SECONDS = 240.0  # a codec is measured at a model's first start
STOP_SECONDS = 30.0
READY = "longctx ready "


@contextmanager
def running_server(console: Console, words: Sequence[str], *, errors: Path) -> Iterator[str]:
    """Yields the address of a server that lives as long as the block and is ended by SIGTERM.

    `words` are options of `longctx serve`; `errors` gets what it says on stderr.
    """
    began = time.monotonic()
    with (
        errors.open("ab") as log,
        subprocess.Popen(
            [sys.executable, "-P", "-m", "longctx", "serve", "--port", "0", *words],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=own_environment(),
            start_new_session=True,  # Ctrl-C is ours; the server is then told by SIGTERM
        ) as process,
    ):
        try:
            with console.status("  loading the model", spinner_style="cyan"):
                address = _address(process, errors)
            console.print(f"  ready at {address} after {time.monotonic() - began:.1f} s")
            yield address
        except BaseException:
            _stop(process)
            raise
        code = _stop(process)
        console.print(f"  The server was stopped by SIGTERM: exit code {code}")
        if code:
            raise SystemExit(f"longctx demo: the server ended with code {code}")


def own_environment() -> dict[str, str]:
    """Returns our environment without longctx's options: the demo shows defaults."""
    return {name: value for name, value in os.environ.items() if not name.startswith("LONGCTX_")}


def _stop(process: subprocess.Popen[str]) -> int:
    """Ends the server, by force if need be, and returns its exit code."""
    process.send_signal(signal.SIGTERM)
    try:
        return process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _address(process: subprocess.Popen[str], errors: Path) -> str:
    """Returns the address in the ready line. Ends the demo when the server ends before that."""
    assert process.stdout is not None
    signal.signal(signal.SIGALRM, _too_slow)
    signal.setitimer(signal.ITIMER_REAL, START_SECONDS)
    try:
        for line in process.stdout:
            if line.startswith(READY):
                return line.removeprefix(READY).strip()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    said = errors.read_text(encoding="utf-8").strip().splitlines()
    raise SystemExit(f"longctx demo: the server did not start: {said[-1] if said else 'no reason'}")


def _too_slow(number: int, frame: object) -> None:
    raise SystemExit(f"longctx demo: the server was not ready after {START_SECONDS:.0f} s")
