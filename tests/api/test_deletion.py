"""What is deleted leaves nothing in the end, whatever is in flight at that moment."""

import os
import shutil
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.api.live_server import MODEL, LiveServer
from tests.api.test_restart import engine_process
from tests.support.stored_files import files_holding
from tests.support.waiting import wait_for

WORDS = "the gulls of Trieste count {} boats, and none of them is theirs. "
LONG = "".join(WORDS.format(number) for number in range(400))
SHORT = LONG[: len(LONG) // 8]
SECRET = b"none of them is theirs"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


def serving(model_folder: Path, store: Path, **cache: Any) -> LiveServer:
    """A server with all tiers."""
    cache = {"kv_dir": store / "kv", "host_pool_gib": 0.05, **cache}
    return LiveServer(model_folder, store, cache=cache)


@pytest.fixture(scope="module")
def server(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with serving(model_folder, tmp_path_factory.mktemp("deletion") / "store") as running:
        yield running


def upload(server: LiveServer, text: str, name: str = "a.txt", **fields: str) -> str:
    answer = server.http.post("/v1/files", files={"file": (name, text)}, data=fields)
    return answer.raise_for_status().json()["id"]  # type: ignore[no-any-return]


def question(file_ids: list[str], text: str = "?", **fields: Any) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [{"type": "file", "file": {"file_id": name}} for name in file_ids]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
    return {"model": MODEL, "messages": messages, "max_tokens": 2, **fields}


def ask(server: LiveServer, *file_ids: str, text: str = "?", **fields: Any) -> dict[str, Any]:
    body = question(list(file_ids), text, **fields)
    answer = server.http.post("/v1/chat/completions", json=body).raise_for_status()
    return answer.json()  # type: ignore[no-any-return]


def delete(server: LiveServer, file_id: str) -> dict[str, Any]:
    body = server.http.delete(f"/v1/files/{file_id}").raise_for_status().json()
    receipt: dict[str, Any] = body.pop("longctx")
    assert body == {"id": file_id, "object": "file", "deleted": True}
    return receipt


def described(server: LiveServer, file_id: str) -> dict[str, Any]:
    return server.http.get(f"/v1/files/{file_id}").json()["longctx"]  # type: ignore[no-any-return]


def is_ready(server: LiveServer, file_id: str) -> bool:
    return bool(described(server, file_id)["state"] == "ready")


def is_begun(server: LiveServer, file_id: str) -> bool:
    return bool(described(server, file_id)["prefilled_tokens"] > 0)


def wait_until_ready(server: LiveServer, *file_ids: str) -> None:
    for name in file_ids:
        wait_for(partial(is_ready, server, name))


def blocks(server: LiveServer) -> dict[str, int]:
    """Count the blocks in each tier."""
    stats = server.engine_stats()
    assert stats.store is not None
    below = {name: tier.blocks for name, tier in stats.store.tiers.items()}
    return {"device": stats.device.blocks, **below}


def queued_bytes(server: LiveServer) -> int:
    """Count what is still to be written to disk."""
    stats = server.engine_stats()
    assert stats.store is not None
    return stats.store.queued_bytes


def assert_nothing_is_left(server: LiveServer) -> None:
    """Wait until no tier has a block; then no file has a byte of the text or of its tokens."""
    wait_for(lambda: not any(blocks(server).values()))
    tokens = server.tokenizer.encode(LONG)[200:216]
    needles = (SECRET, np.array(tokens, dtype="<i4").tobytes())

    def files() -> list[Path]:
        return [path for path in server.config.folder.rglob("*") if path.is_file()]

    wait_for(lambda: not [path for path in files() if path.suffix in (".kv", ".txt", ".tokens")])
    assert not files_holding(server.config.folder, *needles)


# An iterator of a stream's lines has to be held: where it goes, the request is aborted
def stream(server: LiveServer, body: dict[str, Any]) -> Any:
    return server.http.stream("POST", "/v1/chat/completions", json={**body, "stream": True})


def test_a_question_at_once_and_a_deletion_a_moment_later_leave_nothing(
    server: LiveServer,
) -> None:
    name = upload(server, LONG)
    with stream(server, question([name], max_tokens=40, ignore_eos=True)) as answer:
        lines = answer.iter_lines()
        next(line for line in lines if '"processed"' in line or "content" in line)
        receipt = delete(server, name)
        assert receipt["erased"] or receipt["waiting_for"]["requests"] == 1
        assert server.http.get(f"/v1/files/{name}").status_code == 404
        assert '"finish_reason":"length"' in "".join(lines).replace(" ", "")
    assert_nothing_is_left(server)


def test_a_document_that_was_computed_and_asked_leaves_with_its_questions(
    server: LiveServer,
) -> None:
    name = upload(server, LONG)
    wait_until_ready(server, name)
    ask(server, name, text="Why? " * 100)
    messages = question([name])["messages"]
    other = [{"role": "system", "content": "Be brief."}, *messages]
    ask(server, name, messages=other)  # computed anew, and stored under keys of its own
    wait_for(lambda: not queued_bytes(server))
    held = blocks(server)
    receipt = delete(server, name)
    assert receipt["waiting_for"] == {}
    assert {tier: gone["blocks"] for tier, gone in receipt["erased"].items()} == held
    assert_nothing_is_left(server)


def test_a_document_that_is_deleted_while_it_is_computed_leaves_nothing(
    server: LiveServer,
) -> None:
    for _ in range(3):
        name = upload(server, LONG)
        wait_for(partial(is_begun, server, name))
        delete(server, name)
        assert_nothing_is_left(server)
    delete(server, upload(server, LONG))  # while it is tokenized
    assert_nothing_is_left(server)


def test_named_and_retained_prompts_with_the_text_of_a_file_go_with_it(
    server: LiveServer,
) -> None:
    name = upload(server, SHORT)
    prompt = {"name": "guide", "system": "Read it well.", "file_ids": [name]}
    server.http.post("/v1/prompt_cache/prompts", json=prompt).raise_for_status()
    path = "/v1/prompt_cache/prompts/guide"
    wait_for(lambda: server.http.get(path).json()["state"] == "ready")
    ask(server, name, text="Keep this. " * 30, prompt_cache_retention="24h")
    messages = [{"role": "user", "content": "Why? " * 60}]
    chat = {"model": MODEL, "prompt_cache": {"prompt": "guide"}, "max_tokens": 2}
    answer = server.http.post("/v1/chat/completions", json={**chat, "messages": messages})
    answer.raise_for_status()
    delete(server, name)
    assert_nothing_is_left(server)


def test_a_prompt_that_asks_to_be_retained_is_not_when_its_file_is_deleted_before_its_end(
    server: LiveServer,
) -> None:
    name = upload(server, SHORT)
    body = question([name], max_tokens=200, ignore_eos=True, prompt_cache_retention="24h")
    with stream(server, body) as answer:
        lines = answer.iter_lines()
        next(line for line in lines if '"content"' in line)
        delete(server, name)
        list(lines)
    assert_nothing_is_left(server)


def test_a_named_prompt_and_a_schema_leave_with_what_was_asked_after_them(
    server: LiveServer,
) -> None:
    before = blocks(server)
    prompt = {"name": "mine", "system": SHORT[:1500]}
    schema = {"name": "kit", "content": [{"module": "part", "content": SHORT[1500:3000]}]}
    for kind, body in (("prompts", prompt), ("schemas", schema)):
        server.http.post(f"/v1/prompt_cache/{kind}", json=body).raise_for_status()
    messages = [{"role": "user", "content": "Why? " * 300}]
    for wanted in ({"prompt": "mine"}, {"schema": "kit", "modules": ["part"]}):
        body = {"model": MODEL, "messages": messages, "prompt_cache": wanted, "max_tokens": 2}
        server.http.post("/v1/chat/completions", json=body).raise_for_status()
    assert blocks(server) != before
    for path in ("prompts/mine", "schemas/kit"):
        deleted = server.http.delete(f"/v1/prompt_cache/{path}").raise_for_status().json()
        assert deleted["longctx"]["waiting_for"] == {}
        assert deleted["longctx"]["erased"]["disk"]["blocks"] > 0
    assert_nothing_is_left(server)


def test_what_two_documents_share_stays_until_the_second_is_deleted(
    model_folder: Path, store: Path
) -> None:
    with serving(model_folder, store) as server:
        first, second = upload(server, LONG), upload(server, LONG[: len(LONG) // 2] + "The end.")
        wait_until_ready(server, first, second)
        ask(server, first)
        ask(server, second)
        assert delete(server, first)["waiting_for"] == {}
        left = blocks(server)["disk"]
        file = described(server, second)
        assert file["durable_tokens"] == file["tokens"]
    with serving(model_folder, store) as server:
        wait_until_ready(server, second)
        assert blocks(server)["disk"] == left, "what was deleted is served again"
        assert ask(server, second)["longctx"]["computed_tokens"] <= 128
        delete(server, second)
        assert_nothing_is_left(server)


@pytest.mark.parametrize("killed", [False, True])
def test_a_deletion_that_did_not_come_to_its_end_is_ended_by_the_next_start(
    model_folder: Path, store: Path, tmp_path: Path, killed: bool
) -> None:
    """`killed`: the store as it is at the moment of the deletion, as `kill -9` would leave it."""
    with serving(model_folder, store) as server:
        name = upload(server, LONG)
        wait_until_ready(server, name)
        messages = question([name])["messages"]
        ask(server, name, messages=[{"role": "system", "content": "Be brief."}, *messages])
        body = question([name], max_tokens=4000, ignore_eos=True)
        with stream(server, body) as answer:
            lines = answer.iter_lines()
            next(line for line in lines if '"content"' in line)
            assert delete(server, name)["waiting_for"]["requests"] == 1
            if killed:
                shutil.copytree(store, tmp_path / "copy")
                store = tmp_path / "copy"
        assert list((store / "kv").glob("*.kv")) or not killed
    with serving(model_folder, store) as server:
        assert server.http.get("/v1/files").json()["data"] == []
        assert_nothing_is_left(server)


def test_a_deletion_outlives_an_engine_that_dies_of_it(server: LiveServer) -> None:
    name = upload(server, LONG)
    wait_until_ready(server, name)
    body = question([name], max_tokens=4000, ignore_eos=True)
    with stream(server, body) as answer:
        lines = answer.iter_lines()
        next(line for line in lines if '"content"' in line)
        delete(server, name)
        os.kill(engine_process(server), signal.SIGKILL)
        list(lines)
    wait_for(lambda: server.http.get("/health").status_code == 200)
    assert_nothing_is_left(server)


def test_what_another_model_has_stored_of_a_document_goes_with_it(
    model_folder: Path, store: Path
) -> None:
    with serving(model_folder, store) as server:
        name = upload(server, LONG)
        wait_until_ready(server, name)
    with serving(model_folder, store, kv_codec="bf16", force_codec=True) as server:
        wait_until_ready(server, name)
        assert delete(server, name)["waiting_for"] == {}
        assert_nothing_is_left(server)
