"""Who reads large documents keeps nobody else waiting: the server's event loop does little at once.

What is measured is the time that the loop's thread itself computes, so it is the same on a busy
machine. `tests/api/test_busy.py` has the times that a client sees.
"""

import asyncio
import base64
import gc
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest

from tests.api.live_server import LiveServer
from tests.support.made_documents import pdf
from tests.support.waiting import wait_for

AT_ONCE_SECONDS = 0.025


@pytest.fixture(scope="module")
def alone(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with LiveServer(model_folder, tmp_path_factory.mktemp("store"), max_upload_mib=64) as running:
        yield running


@contextmanager
def longest_work(server: LiveServer) -> Iterator[list[float]]:
    """Notes how long the loop of the server computed in each of its turns, in seconds."""
    run = asyncio.Handle._run
    found: list[float] = []

    def timed(handle: asyncio.Handle) -> None:
        began = time.thread_time()
        run(handle)
        if handle._loop is server.loop:  # type: ignore[attr-defined]
            found.append(time.thread_time() - began)

    gc.collect()
    gc.disable()  # a server has not the heap of all these tests
    try:
        with mock.patch.object(asyncio.Handle, "_run", timed):
            yield found
    finally:
        gc.enable()


def test_uploads_are_received_and_read_beside_the_event_loop(alone: LiveServer) -> None:
    files = [pdf(*["The ship left."] * 10, picture=256, seed=seed) for seed in range(6)]
    assert sum(map(len, files)) > 10 << 20
    health: list[int] = []
    with longest_work(alone) as found:
        for number, file in enumerate(files):
            sent = alone.http.post("/v1/files", files={"file": (f"{number}.pdf", file)})
            path = f"/v1/files/{sent.raise_for_status().json()['id']}"

            def is_read(path: str = path) -> bool:
                health.append(alone.http.get("/health").status_code)
                told = alone.http.get(path).raise_for_status().json()["longctx"]
                assert told["error"] is None
                return told["tokens"] is not None

            wait_for(is_read)
    assert set(health) == {200} and len(health) >= len(files)
    assert max(found) < AT_ONCE_SECONDS, sorted(found)[-5:]


def test_a_pdf_inside_a_message_is_decoded_beside_the_event_loop(alone: LiveServer) -> None:
    heavy = base64.b64encode(pdf("The ship came.", picture=1024)).decode()
    assert len(heavy) > 4 << 20
    file = {"type": "file", "file": {"filename": "a.pdf", "file_data": heavy}}
    body = {"messages": [{"role": "user", "content": [file]}], "max_tokens": 1}
    decoded: list[tuple[int, int]] = []
    decode = base64.b64decode

    def watched(encoded: str, *, validate: bool) -> bytes:
        decoded.append((threading.get_ident(), len(encoded)))
        return decode(encoded, validate=validate)

    with mock.patch.object(base64, "b64decode", watched):
        answer = alone.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert alone.thread.ident not in {thread for thread, _ in decoded}
    # Nobody else runs while Python decodes a piece, in any thread.
    assert max(characters for _, characters in decoded) <= 1 << 20
