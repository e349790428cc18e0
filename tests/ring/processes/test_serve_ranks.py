"""`longctx serve --ranks 2` with real processes: answers as one rank does, and survives its ranks.

pytest -m slow tests/ring/processes/test_serve_ranks.py runs every way to lose every rank.
"""

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.ring.processes.ring_server import RingServer, body, document
from tests.support.waiting import patient, wait_for

NOTICED_SECONDS = 10.0  # until requests end, on an idle machine
BACK_SECONDS = 60.0
KILL, STOP = signal.SIGKILL, signal.SIGSTOP


def lose_while_answering(server: RingServer, file_id: str, rank: int, how: int) -> dict[str, Any]:
    """Signal a rank in the middle of a stream; return how it ends, and after how long."""
    options = {"stream": True, "max_tokens": 4000, "ignore_eos": True}
    with httpx.stream(
        "POST",
        f"{server.url}/v1/chat/completions",
        json=body(file_id, **options),
        timeout=patient(60),
    ) as answer:
        lines = (line[6:] for line in answer.iter_lines() if line.startswith("data: "))
        for _ in range(5):
            next(lines)
        os.kill(server.rank(rank), how)
        began = time.monotonic()
        last: dict[str, Any] = {}
        for line in lines:
            if line != "[DONE]":
                last = json.loads(line)
    return {"seconds": time.monotonic() - began, "last": last}


def lose_while_reading(server: RingServer, rank: int, how: int) -> dict[str, Any]:
    """Signal a rank while a long prompt is computed; return the answer, and how long it took."""
    found: dict[str, Any] = {}

    def ask() -> None:
        message = {"role": "user", "content": document(1500)}
        body = {"messages": [message], "max_tokens": 4}
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=patient(60))
        found.update(status=answer.status_code, body=answer.json(), ended=time.monotonic())

    asking = threading.Thread(target=ask)
    computed = server.metric("longctx_computed_tokens_total")
    asking.start()
    wait_for(lambda: server.metric("longctx_computed_tokens_total") >= computed + 2000)
    os.kill(server.rank(rank), how)
    began = time.monotonic()
    asking.join()
    return {**found, "seconds": found["ended"] - began}


def check_is_back(server: RingServer, file_id: str, expected: str) -> None:
    """Ask on the same port until it is answered, and check that nothing was computed again."""
    text, computed = server.ask_until_answered(file_id, BACK_SECONDS)
    assert text == expected and computed < 200, (text, computed)


def test_two_ranks_answer_as_one_and_outlive_a_rank(tmp_path: Path) -> None:
    with RingServer(tmp_path / "store") as server:
        file_id = server.upload(document(100))
        expected, _ = server.ask(file_id)
        assert "4711" in expected

        ended = lose_while_answering(server, file_id, rank=1, how=KILL)
        assert ended["seconds"] < patient(NOTICED_SECONDS) and "error" in ended["last"], ended
        assert server.client.get("/health").json()["engine"] == "restarting"
        refused = server.client.post("/v1/chat/completions", json=body(file_id))
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "engine_died"
        check_is_back(server, file_id, expected)
        assert server.metric("longctx_engine_restarts_total") == 1
        assert server.metric("longctx_ranks") == 2
        assert server.metric("longctx_ring_sent_bytes_total") > 0
        server.end(signal.SIGINT)

    with RingServer(tmp_path / "store", ranks=1) as alone:
        text, computed = alone.ask(file_id)  # restored from what two have written
        alone.end()
        assert text == expected and computed < 200


@pytest.mark.slow
@pytest.mark.parametrize("how", [KILL, STOP], ids=["killed", "stopped"])
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_any_rank_may_be_lost_at_any_time(tmp_path: Path, rank: int, how: int) -> None:
    with RingServer(tmp_path / "store", ranks=3) as server:
        file_id = server.upload(document(250))
        expected, _ = server.ask(file_id)

        decoding = lose_while_answering(server, file_id, rank, how)
        assert decoding["seconds"] < patient(NOTICED_SECONDS) and "error" in decoding["last"], (
            decoding
        )
        check_is_back(server, file_id, expected)

        reading = lose_while_reading(server, rank, how)
        assert reading["seconds"] < patient(NOTICED_SECONDS) and reading["status"] == 503, reading
        check_is_back(server, file_id, expected)
        server.end()


@pytest.mark.slow
def test_any_number_of_ranks_restores_what_another_has_written(tmp_path: Path) -> None:
    with RingServer(tmp_path / "store") as server:
        file_id = server.upload(document(250))
        expected, _ = server.ask(file_id)
        server.end()
    for ranks in (1, 3, 4):
        with RingServer(tmp_path / "store", ranks=ranks) as server:
            text, computed = server.ask(file_id)
            server.end()
            assert text == expected and computed < 200


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [None, 0, 1])
def test_nothing_is_left_of_a_server_that_is_killed(tmp_path: Path, stopped: int | None) -> None:
    with RingServer(tmp_path / "store") as server:
        if stopped is not None:
            os.kill(server.rank(stopped), STOP)
        server.end(KILL)
