"""Named prompts: computed at once, used by name, kept until they expire; OpenAI's cache fields."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.api.live_server import MODEL, LiveServer
from tests.support.waiting import wait_for

KEYS = ("alice", "bob")
SYSTEM = "You answer from the rules of the harbour. Boats come in before the evening. " * 20
STORY = "The lift goes up to the snow, and the road is closed until spring. " * 30
PROMPTS = "/v1/prompt_cache/prompts"
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def server(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    store = tmp_path_factory.mktemp("store")
    disk = {"kv_dir": store / "kv", "force_level": True}
    with LiveServer(model_folder, store, cache=disk) as running:
        yield running


def stored(
    http: httpx.Client, *, headers: dict[str, str] | None = None, **fields: Any
) -> dict[str, Any]:
    """The prompt, once it is computed."""
    answer = http.post(PROMPTS, json=fields, headers=headers)
    assert answer.status_code == 200, answer.text
    path = f"{PROMPTS}/{fields['name']}"
    wait_for(lambda: http.get(path, headers=headers).json()["state"] in ("ready", "error"))
    described: dict[str, Any] = http.get(path, headers=headers).json()
    return described


def chat(
    http: httpx.Client, *, headers: dict[str, str] | None = None, **fields: Any
) -> dict[str, Any]:
    body = {"messages": HELLO, "max_tokens": 2, "temperature": 0, **fields}
    answer = http.post("/v1/chat/completions", json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    given: dict[str, Any] = answer.json()
    return given


def test_a_prompt_is_computed_at_once_and_used_by_its_name(server: LiveServer) -> None:
    described = stored(server.http, name="harbour", system=SYSTEM, ttl="24h")
    assert described["expires_at"] == described["created_at"] + 86_400
    assert described["tokens"] > 500
    assert described["durable_tokens"] == described["tokens"]
    answer = chat(server.http, prompt_cache={"prompt": "harbour"})
    assert answer["prompt_cache"]["prompt"] == "harbour"
    cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert described["tokens"] - 64 <= cached <= answer["usage"]["prompt_tokens"]
    again = chat(server.http, messages=[{"role": "system", "content": SYSTEM}, *HELLO])
    assert again["usage"]["prompt_tokens"] == answer["usage"]["prompt_tokens"]
    assert again["choices"][0]["message"] == answer["choices"][0]["message"]
    assert server.http.get(f"{PROMPTS}/harbour").json()["hits"] == 1


def test_a_prompt_may_have_files(server: LiveServer) -> None:
    with server.openai() as client:
        file_id = client.files.create(file=("a.txt", STORY.encode()), purpose="user_data").id
    described = stored(server.http, name="rules", system=SYSTEM, file_ids=[file_id])
    assert described["state"] == "ready" and described["expires_at"] is None
    answer = chat(server.http, prompt_cache={"prompt": "rules"})
    cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert described["tokens"] - 64 <= cached
    assert answer["longctx"]["computed_tokens"] < 128


def test_a_file_that_is_deleted_is_missed_by_its_prompt(server: LiveServer) -> None:
    with server.openai() as client:
        file_id = client.files.create(file=("b.txt", STORY.encode()), purpose="user_data").id
        stored(server.http, name="short-lived", file_ids=[file_id])
        client.files.delete(file_id)
    body = {"messages": HELLO, "prompt_cache": {"prompt": "short-lived"}}
    answer = server.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 404 and file_id in answer.json()["error"]["message"]
    refused = server.http.post(PROMPTS, json={"name": "x", "file_ids": [file_id]})
    assert refused.status_code == 404 and refused.json()["error"]["param"] == "file_ids"


def test_an_expired_prompt_is_gone_and_so_are_its_blocks(server: LiveServer) -> None:
    brief = {"name": "brief", "system": f"Only for now. {SYSTEM}", "ttl": 1}
    server.http.post(PROMPTS, json=brief).raise_for_status()  # it may expire before it is computed
    wait_for(lambda: server.http.get(f"{PROMPTS}/brief").status_code == 404)
    names = [entry["name"] for entry in server.http.get(PROMPTS).json()["data"]]
    assert "brief" not in names
    wait_for(
        lambda: (
            chat(
                server.http,
                messages=[{"role": "system", "content": f"Only for now. {SYSTEM}"}, *HELLO],
                max_tokens=0,
            )["usage"]["prompt_tokens_details"]["cached_tokens"]
            < 500
        )
    )


def test_a_prompt_is_replaced_listed_and_deleted(server: LiveServer) -> None:
    first = stored(server.http, name="mine", system="One. " * 80)
    second = stored(server.http, name="mine", system="Two or three. " * 80)
    assert first["tokens"] != second["tokens"]
    listed = server.http.get(PROMPTS).json()
    assert [entry["name"] for entry in listed["data"]].count("mine") == 1
    deleted = server.http.delete(f"{PROMPTS}/mine").json()
    receipt = deleted.pop("longctx")
    assert deleted == {"name": "mine", "object": "prompt_cache.prompt.deleted", "deleted": True}
    assert receipt["waiting_for"] == {} and receipt["erased"]["disk"]["blocks"] > 0
    for answer in (server.http.get(f"{PROMPTS}/mine"), server.http.delete(f"{PROMPTS}/mine")):
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "prompt_not_found"


BAD_PROMPTS: dict[str, tuple[dict[str, Any], str]] = {
    "no name": ({"system": "x"}, "name is required"),
    "a bad name": ({"name": "a/b", "system": "x"}, "name must have 1 to 64 letters"),
    "nothing": ({"name": "a"}, "either system or file_ids is required"),
    "a bad ttl": ({"name": "a", "system": "x", "ttl": "soon"}, 'such as "30m", "24h" or "7d"'),
    "no time": ({"name": "a", "system": "x", "ttl": 0}, "must be seconds from 1 on"),
    "an unknown field": ({"name": "a", "system": "x", "text": "y"}, "unknown parameter: text"),
    "too long": ({"name": "a", "system": "word " * 40_000}, "beyond the limit of"),
}


@pytest.mark.parametrize("case", BAD_PROMPTS)
def test_a_bad_prompt_is_refused(server: LiveServer, case: str) -> None:
    fields, words = BAD_PROMPTS[case]
    answer = server.http.post(PROMPTS, json=fields)
    assert answer.status_code == 400 and words in answer.json()["error"]["message"]


def test_a_prompt_begins_the_conversation(server: LiveServer) -> None:
    stored(server.http, name="harbour", system=SYSTEM)
    for messages, status, words in (
        (
            [{"role": "system", "content": "No."}, *HELLO],
            400,
            "must be the user's, not the system's",
        ),
        (HELLO, 404, "there is no prompt 'harbor'"),
    ):
        name = "harbour" if status == 400 else "harbor"
        body = {"messages": messages, "prompt_cache": {"prompt": name}}
        answer = server.http.post("/v1/chat/completions", json=body)
        assert answer.status_code == status and words in answer.json()["error"]["message"]


def test_prompts_survive_restarts_and_are_a_tenants_own(model_folder: Path, tmp_path: Path) -> None:
    alice, bob = ({"Authorization": f"Bearer {key}"} for key in KEYS)
    disk = {"kv_dir": tmp_path / "kv"}
    with LiveServer(model_folder, tmp_path, api_key=KEYS, cache=disk) as server:
        stored(server.http, headers=alice, name="a", system=SYSTEM)
        stored(server.http, headers=alice, name="brief", system=SYSTEM, ttl=1)  # the same
        assert server.http.get(f"{PROMPTS}/a", headers=bob).status_code == 404
        assert server.http.get(PROMPTS, headers=bob).json()["data"] == []
    time.sleep(1)
    with LiveServer(model_folder, tmp_path, api_key=KEYS, cache=disk) as server:
        wait_for(lambda: server.http.get(f"{PROMPTS}/a", headers=alice).json()["state"] == "ready")
        assert server.http.get(f"{PROMPTS}/brief", headers=alice).status_code == 404
        assert server.engine_stats().computed_tokens == 0  # all of it was on the disk
        answer = chat(server.http, headers=alice, prompt_cache={"prompt": "a"})
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] > 500


def test_openais_cache_fields_are_taken(server: LiveServer) -> None:
    part = {"type": "text", "text": "Hello", "prompt_cache_breakpoint": {"mode": "explicit"}}
    chat(
        server.http,
        messages=[{"role": "user", "content": [part]}],
        prompt_cache_key="customer-7",
        prompt_cache_options={"mode": "implicit", "ttl": "30m"},
        prompt_cache_retention="in_memory",
    )
    for field, value in (("prompt_cache_retention", "1h"), ("prompt_cache_options", {"ttl": "1h"})):
        body = {"messages": HELLO, field: value}
        answer = server.http.post("/v1/chat/completions", content=json.dumps(body))
        assert answer.status_code == 400
        assert answer.json()["error"]["param"].startswith(field)


def test_retention_means_what_it_says(model_folder: Path, tmp_path: Path) -> None:
    disk = {"kv_dir": tmp_path / "kv"}
    short = [{"role": "user", "content": f"Short. {STORY[:1500]}"}]  # not stored by itself
    long = [{"role": "user", "content": f"Long. {STORY * 3}"}]  # stored by itself
    with LiveServer(model_folder, tmp_path, cache=disk) as server:
        chat(server.http, messages=short, prompt_cache_retention="24h")
        for _ in range(2):
            usage = chat(server.http, messages=long, prompt_cache_retention="in_memory")["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] > 1024  # it is in memory
        wait_for(lambda: server.engine_stats().tiers["disk"].blocks > 0)
    with LiveServer(model_folder, tmp_path, cache=disk) as server:
        cached = [
            chat(server.http, messages=messages)["usage"]["prompt_tokens_details"]["cached_tokens"]
            for messages in (short, long)
        ]
        assert cached[0] > 300
        assert cached[1] == 0


def test_a_file_is_reused_after_any_text(server: LiveServer) -> None:
    with server.openai() as client:
        file: Any = client.files.create(file=("c.txt", STORY.encode()), purpose="user_data")
        wait_for(lambda: _state(client, file.id) == "ready")
        levels: dict[str, Any] = {}
        for level in (None, "exact", "link:16", "modular"):
            part: Any = {"type": "file", "file": {"file_id": file.id}}
            if level is not None:
                part["reuse"] = level
            levels[level or "none"] = client.chat.completions.create(
                model=MODEL,
                messages=[
                    {"role": "system", "content": f"Level {level}: be brief."},
                    {"role": "user", "content": [part, {"type": "text", "text": "Well?"}]},
                ],
                max_tokens=2,
            )
    assert "prompt_cache" not in levels["none"].model_extra
    told = levels["link:16"].prompt_cache
    assert told["files"] == [{"file_id": file.id, "level": "link:16"}]
    assert 16 <= told["linked_tokens"] < 16 + 64  # and the rows after its last full block
    assert told["borrowed_tokens"] > 500
    assert levels["modular"].longctx["computed_tokens"] < 200
    assert levels["none"].longctx["computed_tokens"] > 500
    assert "document_prefix" not in levels["modular"].longctx
    part = {"type": "file", "file": {"file_id": file.id}, "reuse": "some"}
    body = {"messages": [{"role": "user", "content": [part]}]}
    answer = server.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400
    assert "choose exact, modular, or link:K" in answer.json()["error"]["message"]


def _state(client: openai.OpenAI, file_id: str) -> str:
    described: Any = client.files.retrieve(file_id)
    return described.longctx["state"]  # type: ignore[no-any-return]
