"""Memory of the server and its engine process over many requests."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from longctx.process.launcher import Child
from tests.api.live_server import MODEL, LiveServer

WARM_UP = 150
REQUESTS = 500
GROWTH_BYTES = 8 << 20  # allocators settle; 16 KiB a request would show


def resident_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return 1024 * int(line.split()[1])
    raise AssertionError("no VmRSS")


@pytest.mark.slow
def test_memory_is_flat_over_500_requests(model_folder: Path, tmp_path: Path) -> None:
    with LiveServer(model_folder, tmp_path, max_sequences=8) as server:
        processes = server.application.engine.processes
        assert isinstance(processes, Child) and processes.process is not None
        process = processes.process

        def chat(number: int) -> None:
            # The same 40 texts again and again: new ones would fill the pool, as they should.
            text = f"Question {number % 40}. " + "words and more words " * (number % 40)
            messages = [{"role": "user", "content": text}]
            body = {"model": MODEL, "messages": messages, "max_tokens": 8, "ignore_eos": True}
            server.http.post("/v1/chat/completions", json=body).raise_for_status()

        with ThreadPoolExecutor(4) as clients:
            list(clients.map(chat, range(WARM_UP)))
            before = resident_bytes(process.pid)
            list(clients.map(chat, range(WARM_UP, WARM_UP + REQUESTS)))
        growth = resident_bytes(process.pid) - before
    print(f"\nengine process: {before / 1e6:.1f} MB, grown by {growth / 1e6:.1f} MB")
    assert growth < GROWTH_BYTES
