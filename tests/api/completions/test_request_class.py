"""The class of a question in the engine's scheduler, as its request asks for it, over the wire."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.api.live_server import MODEL, LiveServer
from tests.support.waiting import patient, wait_for

ASK: Any = [{"role": "user", "content": "What is the name of the ship?"}]
CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
GEMINI = f"/v1beta/models/{MODEL}:generateContent"
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": ASK, "max_tokens": 2},
    COMPLETIONS: {"prompt": "In 1932", "max_tokens": 2},
    RESPONSES: {"input": "What is the name of the ship?", "max_output_tokens": 2},
    GEMINI: {
        "contents": [{"parts": [{"text": "What is the name of the ship?"}]}],
        "generationConfig": {"maxOutputTokens": 2},
    },
}
FLEX = {"service_tier": "flex"}
HELD = {"prompt": "In 1932", "max_tokens": 30_000, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def narrow(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server that answers one question at a time, so that any other can be seen waiting."""
    with LiveServer(model_folder, tmp_path_factory.mktemp("store"), max_sequences=1) as running:
        yield running


def waiting(server: LiveServer) -> dict[str, int]:
    """How many prompts wait, by the class that the engine has them in."""
    classes = server.http.get("/v1/scheduler").json()["classes"]
    return {name: each["waiting"] for name, each in classes.items() if each["waiting"]}


@contextmanager
def place_taken(server: LiveServer) -> Iterator[None]:
    """Nobody else is answered within: a long answer has the only place."""
    with server.http.stream("POST", COMPLETIONS, json=HELD) as held:
        lines = held.iter_lines()  # kept: where it is let go of, the connection is closed
        assert next(lines).startswith('data: {"id":"cmpl-')
        yield


def class_of(server: LiveServer, path: str, body: dict[str, Any]) -> dict[str, int]:
    """What waits in the engine of one request, which is answered afterwards."""
    with ThreadPoolExecutor(1) as pool:
        with place_taken(server):
            asked = pool.submit(httpx.post, server.url + path, json=body, timeout=patient())
            seen = wait_for(lambda: waiting(server) or (asked.done() and asked.result().text))
        answer = asked.result(patient())
    assert answer.status_code == 200, answer.text
    assert isinstance(seen, dict), f"it did not wait: {seen}"
    return seen


@pytest.mark.parametrize(
    ("path", "fields", "name"),
    [
        (CHAT, {}, "interactive"),
        (CHAT, {"service_tier": "auto"}, "interactive"),
        (CHAT, {"service_tier": "default"}, "interactive"),
        (CHAT, FLEX, "batch"),
        (CHAT, {**FLEX, "stream": True}, "batch"),
        (COMPLETIONS, {}, "interactive"),
        (COMPLETIONS, {"service_tier": "default"}, "interactive"),
        (COMPLETIONS, FLEX, "batch"),
        (COMPLETIONS, {**FLEX, "stream": True}, "batch"),
        (RESPONSES, {}, "interactive"),
        (RESPONSES, FLEX, "batch"),
        (GEMINI, {"serviceTier": "standard"}, "interactive"),
        (GEMINI, {"serviceTier": "flex"}, "batch"),
        (CHAT, {"priority": 0}, "interactive"),
        (CHAT, {"priority": None}, "interactive"),
        (CHAT, {"priority": 1}, "batch"),
        (CHAT, {"priority": 3, "service_tier": "auto"}, "batch"),
        (CHAT, {"priority": 3, **FLEX}, "batch"),
        (COMPLETIONS, {"priority": 0, "service_tier": "default"}, "interactive"),
        (COMPLETIONS, {"priority": 2**40}, "batch"),
        (COMPLETIONS, {"priority": 1, "stream": True}, "batch"),
    ],
)
def test_the_engine_has_a_question_in_the_class_that_it_asks_for(
    narrow: LiveServer, path: str, fields: dict[str, Any], name: str
) -> None:
    assert class_of(narrow, path, {**BODIES[path], **fields}) == {name: 1}


def test_all_prompts_of_a_request_are_of_its_class(narrow: LiveServer) -> None:
    body = {**BODIES[COMPLETIONS], "prompt": ["In 1932", "In 2015"], "priority": 1}
    with ThreadPoolExecutor(1) as pool:
        with place_taken(narrow):
            asked = pool.submit(httpx.post, narrow.url + COMPLETIONS, json=body, timeout=patient())
            wait_for(lambda: sum(waiting(narrow).values()) == 2)
            assert waiting(narrow) == {"batch": 2}
        assert len(asked.result(patient()).json()["choices"]) == 2


@pytest.mark.parametrize(
    ("asked", "told"), [(None, None), ("auto", "default"), ("default", "default"), ("flex", "flex")]
)
def test_a_service_tier_is_named(
    server: LiveServer, client: openai.OpenAI, asked: Any, told: str | None
) -> None:
    extra = {} if asked is None else {"service_tier": asked}
    answer = client.chat.completions.create(model=MODEL, messages=ASK, max_tokens=2, **extra)
    assert answer.service_tier == told
    whole = client.completions.create(**{"model": MODEL, **BODIES[COMPLETIONS]}, extra_body=extra)
    assert getattr(whole, "service_tier", None) == told
    for path in (CHAT, COMPLETIONS):
        streamed = server.http.post(path, json={**BODIES[path], **extra, "stream": True}).text
        chunks = [line[6:] for line in streamed.splitlines() if line.startswith("data: {")]
        assert chunks and {json.loads(chunk).get("service_tier") for chunk in chunks} == {told}


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, RESPONSES])
@pytest.mark.parametrize("tier", ["priority", "scale", "", 1])
def test_a_tier_that_there_is_not_is_refused(server: LiveServer, path: str, tier: Any) -> None:
    reply = server.http.post(path, json={**BODIES[path], "service_tier": tier})
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (400, "service_tier")
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_value")
    assert "'default' or 'flex'" in error["message"]


def test_a_priority_decides_the_tier_where_that_is_left_to_the_server(
    client: openai.OpenAI,
) -> None:
    for tier, priority, told in (("auto", 2, "flex"), ("auto", 0, "default"), (None, 2, None)):
        answer = client.chat.completions.create(
            model=MODEL,
            messages=ASK,
            max_tokens=2,
            service_tier=tier,  # type: ignore[arg-type]
            extra_body={"priority": priority},
        )
        assert answer.service_tier == told


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize(
    ("fields", "code", "says"),
    [
        ({"priority": -1}, "unsupported_value", "priority is -1, the least is 0"),
        ({"priority": -(2**70)}, "unsupported_value", "leave it out"),
        ({"priority": "1"}, "invalid_value", "valid integer"),
        ({"priority": 1.5}, "invalid_value", "valid integer"),
        ({"priority": True}, "invalid_value", "valid integer"),
        ({"priority": [1]}, "invalid_value", "valid integer"),
        (
            {"priority": 0, "service_tier": "flex"},
            *("unsupported_value", "priority 0 contradicts service_tier 'flex'"),
        ),
        (
            {"priority": 2, "service_tier": "default"},
            *("unsupported_value", "it goes with 'flex'; leave one of them out"),
        ),
    ],
)
def test_a_wrong_priority_is_named(
    server: LiveServer, path: str, fields: dict[str, Any], code: str, says: str
) -> None:
    reply = server.http.post(path, json={**BODIES[path], **fields})
    error = reply.json()["error"]
    assert (reply.status_code, error["type"]) == (400, "invalid_request_error")
    assert (error["param"], error["code"]) == ("priority", code)
    assert says in error["message"]
