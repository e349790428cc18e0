"""Bodies and files that were changed at random: each is answered, none with a 500, and nothing
grows. The seed is fixed; `pytest -m slow` sends 10,000 bodies and 500 files."""

import copy
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.api.live_server import MODEL, LiveServer
from tests.support.made_documents import epub, pdf, tarred, word, zipped
from tests.support.tiny_models import write_model
from tests.support.tiny_tokenizer import write_tokenizer
from tests.support.tool_templates import HERMES_TEMPLATE
from tests.support.waiting import wait_for

ASK = [{"role": "user", "content": "Who keeps the harbour?"}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
TOOL = {"type": "function", "function": {"name": "clock", "parameters": SCHEMA, "strict": True}}
CALL = {"id": "c", "type": "function", "function": {"name": "clock", "arguments": '{"a": 1}'}}
TALK = [
    {"role": "system", "content": "Be short."},
    *ASK,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c", "content": [{"type": "text", "text": "noon"}]},
]
FORM = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
FILE = {"type": "file", "file": {"file_data": "data:text/plain;base64,SGVsbG8=", "filename": "a"}}
BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"model": MODEL, "messages": TALK, "tools": [TOOL], "max_tokens": 4}),
    ("/v1/chat/completions", {"messages": ASK, "response_format": FORM, "max_tokens": 4, "n": 2}),
    (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": [FILE]}], "max_tokens": 2, "stream": True}
        | {"stream_options": {"include_usage": True}, "logprobs": True, "top_logprobs": 3},
    ),
    (
        "/v1/completions",
        {"prompt": ["Who", "What"], "max_tokens": 3, "echo": True, "logprobs": 2, "seed": 1}
        | {"stop": ["x", "y"], "temperature": 0.5, "top_p": 0.9, "logit_bias": {"7": 1.5}},
    ),
    ("/v1/completions", {"prompt": [7, 8, 9], "max_tokens": 2, "stop_token_ids": [4]}),
    ("/tokenize", {"messages": TALK, "tools": [TOOL], "return_token_strs": True}),
    ("/tokenize", {"prompt": "Who?", "add_special_tokens": False}),
    ("/detokenize", {"tokens": [7, 8, 9]}),
    ("/v1/prompt_cache/prompts", {"name": "a", "messages": ASK}),
    ("/v1/cache/flush", {"tier": "device"}),
    ("/v1/responses", {"input": "Who?", "max_output_tokens": 4, "instructions": "Be short."}),
    ("/v1/messages", {"model": MODEL, "messages": ASK, "max_tokens": 4, "system": "Be short."}),
    (
        f"/v1beta/models/{MODEL}:generateContent",
        {"contents": [{"role": "user", "parts": [{"text": "Who?"}]}]}
        | {"generationConfig": {"maxOutputTokens": 4, "temperature": 0.5, "topK": 3}},
    ),
]
STRANGE: list[Any] = [
    *(None, True, False, 0, -1, 1, 0.5, 2**31, -(2**63), 2**70, 1e300, float("inf"), float("nan")),
    *("", "x", "\0", "\ud800", "\u202e", "</s>", "a" * 5000, "../..", "1", "null", "{}", "<s>"),
    *([], {}, [[]], [None], [1, "x"], {"": ""}, {"type": "text"}, {"$ref": "#"}, [{}] * 200),
]


def places(node: Any) -> Iterator[tuple[Any, Any]]:
    """Every list or object in a body, with each of its keys."""
    entries = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in list(entries):
        yield node, key
        if isinstance(value, dict | list):
            yield from places(value)


def changed(body: dict[str, Any], rng: random.Random) -> bytes:
    body = copy.deepcopy(body)
    for _ in range(rng.choice((1, 1, 2, 5))):
        found = list(places(body))
        if not found:
            break
        node, key = rng.choice(found)
        match rng.randrange(4):
            case 0:
                del node[key]
            case 1 if isinstance(node, dict):
                node[rng.choice(("x", "type", "name", "stream", "n", "\ud800"))] = rng.choice(
                    STRANGE
                )
            case 2:
                node[key] = [node[key]]
            case _:
                node[key] = copy.deepcopy(rng.choice(STRANGE))
    return scrambled(json.dumps(body).encode(), rng, often=0.2)


def scrambled(data: bytes, rng: random.Random, *, often: float) -> bytes:
    if not data or rng.random() > often:
        return data
    changes = bytearray(data)
    for _ in range(rng.choice((1, 3, 30))):
        place = rng.randrange(len(changes) + 1)
        match rng.randrange(4):
            case 0:
                del changes[place : place + rng.choice((1, 9, 999))]
            case 1:
                changes[place:place] = rng.randbytes(rng.choice((1, 4, 99)))
            case 2:
                changes[place:place] = changes[max(0, place - 50) : place]
            case _ if place < len(changes):
                changes[place] = rng.randrange(256)
    return bytes(changes)


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server whose answers are short, however long they may be."""
    folder = tmp_path_factory.mktemp("model")
    write_model(folder, num_hidden_layers=1, max_position_embeddings=384)
    write_tokenizer(folder, chat_template=HERMES_TEMPLATE)
    with LiveServer(folder, tmp_path_factory.mktemp("store")) as running:
        yield running


def held() -> tuple[int, int]:
    """Descriptors and memory of this process, which the server is a part of."""
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return len(os.listdir("/proc/self/fd")), resident


def bodies(server: LiveServer, count: int, rng: random.Random) -> set[int]:
    statuses = set()
    for _ in range(count):
        path, body = rng.choice(BODIES)
        content = changed(body, rng)
        reply = server.http.post(path, content=content)
        assert reply.status_code < 500, (path, content, reply.text)
        if reply.status_code != 200:
            assert reply.json()["error"]["message"], (path, content, reply.text)
        statuses.add(reply.status_code)
    return statuses


@pytest.mark.parametrize("count", [250, pytest.param(10_000, marks=pytest.mark.slow)])
def test_changed_bodies_are_answered_and_nothing_grows(fuzzed: LiveServer, count: int) -> None:
    rng = random.Random(16)
    bodies(fuzzed, 50, rng)
    descriptors, memory = held()
    assert {200, 400} <= bodies(fuzzed, count, rng)
    wait_for(lambda: held()[0] <= descriptors + 8)
    assert held()[1] < memory + 200e6


DOCUMENTS = {
    "a.pdf": pdf("The first page", "The second page"),
    "a.docx": word(("Title", "A harbour"), ("Normal", "Some text of it.")),
    "a.epub": epub("The first chapter", "The second chapter"),
    "a.zip": zipped(("a.txt", b"text"), ("b/c.md", b"# More")),
    "a.tar.gz": tarred(("a.txt", b"text"), ("b/c.md", b"# More")),
    "a.html": b"<html><body><h1>Harbour</h1><p>Text &amp; more</p></body></html>",
    "a.csv": b"name,masts\nMeridian,3\n",
    "a.txt": "Größe, Übermut, façade; the harbour.".encode(),
}


@pytest.mark.parametrize("count", [16, pytest.param(500, marks=pytest.mark.slow)])
def test_changed_files_are_read_or_errors_and_nothing_is_left(
    fuzzed: LiveServer, count: int
) -> None:
    rng = random.Random(17)
    before = held()[0]
    kept = set(fuzzed.documents.iterdir())  # files that came inside messages
    for _ in range(count):
        kind = rng.choice(sorted(DOCUMENTS))
        content = scrambled(DOCUMENTS[kind], rng, often=0.9)
        name = rng.choice((kind, kind, rng.choice(sorted(DOCUMENTS)), "noname"))
        reply = fuzzed.http.post("/v1/files", files={"file": (name, content)})
        assert reply.status_code in (200, 400), (name, content, reply.text)
        if reply.status_code == 400:
            continue
        path = f"/v1/files/{reply.json()['id']}"
        ended = wait_for(lambda path=path: _ended(fuzzed, path))  # type: ignore[misc]
        assert ended["state"] == "ready" or ended["error"], (name, content)
        assert fuzzed.http.delete(path).status_code == 200
    wait_for(lambda: set(fuzzed.documents.iterdir()) <= kept)
    wait_for(lambda: held()[0] <= before + 8)


def _ended(server: LiveServer, path: str) -> dict[str, Any] | None:
    told: dict[str, Any] = server.http.get(path).json()["longctx"]
    return told if told["state"] in ("ready", "error") else None
