"""Prompts that were asked to be kept, where keeping them is not possible or no longer wanted."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from api.retention import Retention
from tests.api.live_server import LiveServer
from tests.api.test_prompts import HELLO


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
    body = {"messages": HELLO, "max_tokens": 2, "prompt_cache_retention": "24h", "stream": stream}
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
        answer = server.http.post("/v1/chat/completions", json=body, timeout=20)
    assert answer.status_code == 400
    assert "raise --device-pool-gib" in answer.json()["error"]["message"]
