"""`--log-format json`: one line for each request, with what it took, and nothing of its text."""

import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from api.http.json_log import JSONFormatter, log_request, logger
from tests.api.live_server import MODEL, LiveServer
from tests.support.waiting import wait_for

KEYS = ("alice", "bob")
SECRET = "the gulls of Trieste"


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """What is logged of requests, as lines."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JSONFormatter())
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield stream
    logger.removeHandler(handler)
    logger.setLevel(level)


@pytest.fixture(scope="module")
def observed(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    store = tmp_path_factory.mktemp("store")
    with LiveServer(model_folder, store, observers=(log_request,), api_key=KEYS) as running:
        yield running


def lines(log: io.StringIO, count: int) -> list[dict[str, Any]]:
    """All lines, once there are so many: a line is written when its answer has been sent."""
    wait_for(lambda: log.getvalue().count("\n") >= count)
    return [json.loads(line) for line in log.getvalue().splitlines()]


def ask(server: LiveServer, key: str, **fields: Any) -> Any:
    body = {"model": MODEL, "max_tokens": 3, "ignore_eos": True, **fields}
    headers = {"Authorization": f"Bearer {key}"}
    return server.http.post("/v1/completions", json=body, headers=headers)


def test_a_question_is_one_line_with_what_it_took(observed: LiveServer, log: io.StringIO) -> None:
    prompt = SECRET * 40
    usage = ask(observed, "alice", prompt=prompt).json()["usage"]
    again = ask(observed, "alice", prompt=prompt, stream=True)
    assert again.text.endswith("[DONE]\n\n")
    first, second = lines(log, 2)
    for line in (first, second):
        assert line["route"] == "/v1/completions" and line["status"] == 200
        assert line["method"] == "POST" and line["level"] == "info"
        assert line["prompt_tokens"] == usage["prompt_tokens"] and line["completion_tokens"] == 3
        assert line["finish_reason"] == "length"
        assert 0 < line["ttft_ms"] <= line["total_ms"]
    assert second["cached_tokens"] >= usage["prompt_tokens"] - 64
    assert first["prompt_tokens_by_source"]["computed"] == usage["prompt_tokens"]
    assert second["prompt_tokens_by_source"]["device"] == second["cached_tokens"]
    assert first["id"] != second["id"] and len(first["tenant"]) == 12
    assert SECRET not in log.getvalue() and "alice" not in log.getvalue()


def test_tenants_are_told_apart_and_not_named(observed: LiveServer, log: io.StringIO) -> None:
    for key in ("alice", "bob", "alice"):
        ask(observed, key, prompt="a")
    tenants = [line["tenant"] for line in lines(log, 3)]
    assert tenants[0] == tenants[2] != tenants[1]


def test_several_prompts_of_one_request_are_counted_together(
    observed: LiveServer, log: io.StringIO
) -> None:
    usage = ask(observed, "bob", prompt=["a b c", "d e"], n=2).json()["usage"]
    (line,) = lines(log, 1)
    assert line["completion_tokens"] == usage["completion_tokens"] == 12
    assert line["prompt_tokens"] == usage["prompt_tokens"]


def test_other_requests_have_no_tokens(observed: LiveServer, log: io.StringIO) -> None:
    observed.http.get("/health")
    observed.http.get("/v1/files?after=x")
    ask(observed, "bob", prompt="a", temperature=-1)
    observed.http.get("/no/such/path", headers={"Authorization": "Bearer bob"})
    health, refused, wrong, none = lines(log, 4)
    assert (health["route"], health["status"]) == ("/health", 200)
    assert (refused["route"], refused["status"], refused["tenant"]) == (None, 401, "")
    assert (wrong["route"], wrong["status"]) == ("/v1/completions", 400)
    assert (none["route"], none["status"]) == (None, 404)
    assert not any("prompt_tokens" in line for line in (health, refused, wrong, none))


def test_a_client_that_leaves_is_told_as_such(observed: LiveServer, log: io.StringIO) -> None:
    body = {"prompt": "a", "max_tokens": 20_000, "ignore_eos": True, "stream": True}
    headers = {"Authorization": "Bearer alice"}
    with observed.http.stream("POST", "/v1/completions", json=body, headers=headers) as answer:
        chunks = answer.iter_lines()
        next(chunks)
    (line,) = lines(log, 1)
    assert line["finish_reason"] == "abort" and line["status"] == 200


def test_other_records_are_lines_of_json_too() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JSONFormatter())
    other = logging.getLogger("longctx.test_json_log")
    other.addHandler(handler)
    other.propagate = False
    try:
        raise ValueError("a\nb")
    except ValueError:
        other.exception("it failed: %s", "why")
    (line,) = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert line["message"] == "it failed: why" and line["level"] == "error"
    assert "ValueError: a\nb" in line["exception"] and line["logger"] == "longctx.test_json_log"
