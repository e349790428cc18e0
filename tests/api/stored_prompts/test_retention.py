"""Prompts that were asked to be kept, where keeping them is not possible or no longer wanted."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from api.stored_prompts.retention import Retention
from tests.api.live_server import LiveServer
from tests.api.stored_prompts.test_prompts import HELLO, STORY, chat, stored


@pytest.fixture(scope="module")
def server(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    store = tmp_path_factory.mktemp("store")
    with LiveServer(model_folder, store, cache={"kv_dir": store / "kv"}) as running:
        yield running


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_is_complete_though_its_prompt_cannot_be_kept(
    server: LiveServer, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_prompt: Any) -> None:
        raise OSError("database or disk is full")

    monkeypatch.setattr(Retention, "retain", fail)
    body = {"messages": HELLO, "max_tokens": 2, "ignore_eos": True, "stream": stream}
    body["prompt_cache_retention"] = "24h"
    answer = server.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200
    assert '"finish_reason":"length"' in answer.text and "error" not in answer.text
    assert not stream or answer.text.endswith("data: [DONE]\n\n")


def test_what_a_tiny_device_can_never_stream_is_refused_at_once(
    model_folder: Path, tmp_path: Path
) -> None:
    disk = {"kv_dir": tmp_path / "kv", "device_pool_gib": 0.001}
    with LiveServer(model_folder, tmp_path, cache=disk) as server:
        longer = [{"role": "user", "content": "word " * 800}]
        body = {"messages": longer, "max_tokens": 0}
        answer = server.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400
    assert "raise --device-pool-gib" in answer.json()["error"]["message"]


def retained(server: LiveServer) -> list[str]:
    """What the database keeps, in words."""
    path = server.config.folder / "prompts.sqlite"
    with closing(sqlite3.connect(path)) as database:
        rows = database.execute("SELECT token_ids FROM retained").fetchall()
    return [server.tokenizer.decode(np.frombuffer(row[0], "<i4").tolist()) for row in rows]


def test_nothing_keeps_the_text_of_a_deleted_file(server: LiveServer) -> None:
    with server.openai() as client:
        file_id = client.files.create(file=("a.txt", STORY.encode()), purpose="user_data").id
    stored(server.http, name="with-a-file", file_ids=[file_id])
    part = {"type": "file", "file": {"file_id": file_id}}
    question = [{"role": "user", "content": [part, {"type": "text", "text": "Well?"}]}]
    chat(server.http, messages=question, prompt_cache_retention="24h")
    assert any("The lift goes up" in text for text in retained(server))
    assert server.http.delete(f"/v1/files/{file_id}").status_code == 200
    assert not any("The lift goes up" in text for text in retained(server))
    prompt = server.http.get("/v1/prompt_cache/prompts/with-a-file").json()
    assert prompt["state"] == "error" and file_id in prompt["error"]
    assert (prompt["bytes"], prompt["durable_tokens"]) == (0, 0)


def test_a_conversation_is_kept_once_however_many_turns_it_has(server: LiveServer) -> None:
    before = len(retained(server))
    messages = [{"role": "user", "content": f"Turns. {STORY}"}]
    for _ in range(3):
        answer = chat(server.http, messages=messages, prompt_cache_retention="24h")
        said = answer["choices"][0]["message"]["content"]
        messages += [{"role": "assistant", "content": said}, {"role": "user", "content": "And?"}]
    assert len(retained(server)) == before + 1
    chat(server.http, messages=[messages[0]], prompt_cache_options={"ttl": "30m"})
    assert len(retained(server)) == before + 2


def test_what_the_device_cannot_keep_is_refused_before_it_is_answered(
    model_folder: Path, tmp_path: Path
) -> None:
    disk = {"kv_dir": tmp_path / "kv", "device_pool_gib": 0.006}
    with LiveServer(model_folder, tmp_path, cache=disk) as server:
        limit = server.application.engine.info.capacity_tokens - 64
        one, two = (_tokens(server, "Hello" + " Hello" * words) for words in (1, 2))
        words = 1 + (limit - one) // (two - one)
        for more in (0, 1):
            text = "Hello" + " Hello" * (words + more)
            body = {
                "messages": [{"role": "user", "content": text}],
                "max_tokens": 0,
                "prompt_cache_retention": "24h",
            }
            answer = server.http.post("/v1/chat/completions", json=body)
            assert answer.status_code == (400 if more else 200)
        assert len(retained(server)) == 1
        error = answer.json()["error"]
        assert error["param"] == "prompt_cache_retention"
        assert f"only one of up to {limit}" in error["message"]


def _tokens(server: LiveServer, text: str) -> int:
    messages = [{"role": "user", "content": text}]
    counted: int = server.http.post("/tokenize", json={"messages": messages}).json()["count"]
    return counted
