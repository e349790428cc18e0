"""What the server adds to its engine's own time: 32 clients that ask short questions in a loop.

    pytest -m slow -s tests/api/test_overhead.py           # prints the figures

The same prompts go to the server, from clients in a process of their own, and to an engine alone in
that process; by turns, so that both meet the same machine.
"""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median

import pytest

from tests.support.closed_loop import Loop, LoopProcess
from tests.support.waiting import patient

ROUNDS = 5
ADDED = 0.15
LOOP = Loop(requests=96, clients=32, answer_tokens=32)


@contextmanager
def server(store: Path) -> Iterator[str]:
    words = [sys.executable, "-m", "longctx", "serve", "--port", "0", "--store-dir", str(store)]
    with subprocess.Popen([*words, "--threads", "1"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().removeprefix("longctx ready ").strip()
        finally:
            process.terminate()
            process.wait(patient())


@pytest.mark.slow
@pytest.mark.parametrize("chat", [True, False], ids=["chats", "completions"])
@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
def test_the_server_adds_little_to_the_engines_own_time(
    tmp_path: Path, chat: bool, stream: bool
) -> None:
    loop = replace(LOOP, chat=chat, stream=stream)
    alone: list[float] = []
    served: list[float] = []
    with server(tmp_path) as url, LoopProcess.opened() as clients:
        for number in range(ROUNDS + 1):
            first = number * loop.requests
            alone.append(clients.seconds(replace(loop, first=first)))
            served.append(clients.seconds(replace(loop, first=first, url=url)))
    ratio = median(served[1:]) / median(alone[1:])  # the first ones warm up
    print(
        f"\n{1000 * median(served[1:]):.2f} ms a request of {loop.answer_tokens} tokens, "
        f"{1000 * median(alone[1:]):.2f} ms by the engine alone: "
        f"{100 * (ratio - 1):.1f} % added"
    )
    assert ratio < 1 + ADDED
