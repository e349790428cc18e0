"""Cached contents: kept computed under a name, through restarts, until they expire or are gone."""

import io
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longctx.request import FinishReason
from tests.api.gemini.google_client import connect
from tests.api.live_server import MODEL, LiveServer
from tests.support.stored_files import files_holding
from tests.support.waiting import wait_for

SECRET = "none of them is theirs"
STORY = "".join(f"the gulls count {number} boats, and {SECRET}. " for number in range(60))
CACHED = "/v1beta/cachedContents"
INLINE = {"inline_data": {"data": STORY.encode(), "mime_type": "text/plain"}}
CONTENTS = [{"role": "user", "parts": [{"text": STORY}]}]
CLOCK = {"function_declarations": [{"name": "clock", "description": "Tells the time"}]}
GREEDY = {"temperature": 0, "max_output_tokens": 6}


def serving(folder: Path, store: Path, **settings: Any) -> LiveServer:
    cache = {"kv_dir": store / "kv", "host_pool_gib": 0.05}
    return LiveServer(folder, store, cache=cache, **settings)


def create(gemini: Any, **config: Any) -> Any:
    return gemini.caches.create(model=MODEL, config={"contents": CONTENTS, **config})


def ask(gemini: Any, text: str = "Whose?", **config: Any) -> Any:
    return gemini.models.generate_content(model=MODEL, contents=text, config={**GREEDY, **config})


def kept(server: LiveServer, gemini: Any, **config: Any) -> Any:
    """A cached content that is computed, and on disk; its files are before it is made."""

    def ended() -> int:
        return server.engine_stats().requests_ended[FinishReason.LENGTH]

    before = ended()
    cached = create(gemini, **config)
    wait_for(lambda: ended() > before)
    return cached


def test_a_question_begins_with_a_cached_content(server: LiveServer, gemini: Any) -> None:
    wanted = {"system_instruction": "Be exact.", "display_name": "gulls", "ttl": "300s"}
    cached = kept(server, gemini, **wanted)
    assert cached.name.startswith("cachedContents/") and cached.display_name == "gulls"
    assert cached.model == f"models/{MODEL}"
    tokens = cached.usage_metadata.total_token_count
    assert 280 < (cached.expire_time - cached.create_time).total_seconds() < 320
    answer = ask(gemini, cached_content=cached.name)
    usage = answer.usage_metadata
    assert tokens // 64 * 64 <= usage.cached_content_token_count <= usage.prompt_token_count
    whole = gemini.models.generate_content(
        model=MODEL,
        contents=[*CONTENTS, {"role": "user", "parts": [{"text": "Whose?"}]}],
        config={**GREEDY, "system_instruction": "Be exact."},
    )
    assert answer.text == whole.text
    assert usage.prompt_token_count == whole.usage_metadata.prompt_token_count
    counted = server.http.post(
        f"/v1beta/models/{MODEL}:countTokens",
        json={
            "generateContentRequest": {
                "contents": [{"parts": [{"text": "Whose?"}]}],
                "cachedContent": cached.name,
            }
        },
    ).json()
    assert counted["totalTokens"] == usage.prompt_token_count
    assert counted["cachedContentTokenCount"] == tokens
    streamed = gemini.models.generate_content_stream(
        model=MODEL, contents="Whose?", config={**GREEDY, "cached_content": cached.name}
    )
    assert "".join(piece.text or "" for piece in streamed) == answer.text
    gemini.caches.delete(name=cached.name)


def test_tools_of_a_cached_content_are_those_of_its_questions(gemini: Any) -> None:
    calling = {"function_calling_config": {"mode": "ANY"}}
    cached = create(gemini, tools=[CLOCK], tool_config=calling)
    answer = ask(gemini, cached_content=cached.name, max_output_tokens=200)
    assert answer.function_calls[0].name == "clock"
    gemini.caches.delete(name=cached.name)


def test_a_system_instruction_alone_can_be_cached(gemini: Any) -> None:
    cached = create(gemini, contents=None, system_instruction="Be exact. " * 40)
    answer = ask(gemini, cached_content=cached.name)
    whole = ask(gemini, system_instruction="Be exact. " * 40)
    assert answer.text == whole.text
    gemini.caches.delete(name=cached.name)


def test_an_uploaded_file_can_be_cached_and_goes_its_own_way(gemini: Any) -> None:
    text = {"mime_type": "text/plain"}
    file = gemini.files.upload(file=io.BytesIO(STORY.encode()), config=text)
    cached = create(gemini, contents=[file])
    assert cached.usage_metadata.total_token_count > 500
    assert ask(gemini, cached_content=cached.name).text == ask_whole(gemini, file)
    gemini.caches.delete(name=cached.name)
    assert gemini.files.get(name=file.name).name == file.name
    second = create(gemini, contents=[file])
    gemini.files.delete(name=file.name)
    with pytest.raises(Exception, match="NOT_FOUND"):
        ask(gemini, cached_content=second.name)
    gemini.caches.delete(name=second.name)


def ask_whole(gemini: Any, file: Any) -> str:
    part = {"file_data": {"file_uri": file.uri, "mime_type": "text/plain"}}
    contents = [{"role": "user", "parts": [part]}, {"role": "user", "parts": [{"text": "Whose?"}]}]
    answer = gemini.models.generate_content(model=MODEL, contents=contents, config=GREEDY)
    return answer.text  # type: ignore[no-any-return]


def test_a_document_inside_the_contents_goes_with_the_last_one_of_it(gemini: Any) -> None:
    contents = [{"role": "user", "parts": [INLINE]}]
    first, second = create(gemini, contents=contents), create(gemini, contents=contents)
    assert len(list(gemini.files.list())) == 1
    gemini.caches.delete(name=first.name)
    assert ask(gemini, cached_content=second.name).usage_metadata.prompt_token_count > 500
    gemini.caches.delete(name=second.name)
    assert list(gemini.files.list()) == []


def test_a_document_that_was_uploaded_before_stays(server: LiveServer, gemini: Any) -> None:
    part = {"inlineData": {"data": "QSBzdG9yeSBvZiBndWxscy4=", "mimeType": "text/plain"}}
    question = {"contents": [{"parts": [part]}], "generationConfig": {"maxOutputTokens": 1}}
    server.http.post(f"/v1beta/models/{MODEL}:generateContent", json=question).raise_for_status()
    (file,) = gemini.files.list()
    cached = server.http.post(CACHED, json={"model": MODEL, "contents": question["contents"]})
    gemini.caches.delete(name=cached.json()["name"])
    assert [each.name for each in gemini.files.list()] == [file.name]
    gemini.files.delete(name=file.name)


def test_lists_have_pages_and_each_tenant_its_own(hermes_folder: Path, tmp_path: Path) -> None:
    with serving(hermes_folder, tmp_path, api_key=("alice", "bob")) as server:
        alice, bob = connect(server, "alice"), connect(server, "bob")
        names = [create(alice, display_name=f"number {i}").name for i in range(5)]
        found = [cached.name for cached in alice.caches.list(config={"page_size": 2})]
        assert found == names[::-1]
        assert list(bob.caches.list()) == []
        for attempt in (bob.caches.get, bob.caches.delete):
            with pytest.raises(Exception, match="NOT_FOUND"):
                attempt(name=names[0])
        with pytest.raises(Exception, match="NOT_FOUND"):
            ask(bob, cached_content=names[0])
        deleted = []
        for cached in alice.caches.list(config={"page_size": 2}):
            alice.caches.delete(name=cached.name)
            deleted.append(cached.name)
        assert deleted == names[::-1] and list(alice.caches.list()) == []


def test_the_expiry_is_changed_and_nothing_else(server: LiveServer, gemini: Any) -> None:
    cached = create(gemini)
    hour = (cached.expire_time - cached.create_time).total_seconds()
    assert hour == pytest.approx(3600, abs=20)
    later = gemini.caches.update(name=cached.name, config={"ttl": "7200.5s"})
    assert later.expire_time > cached.expire_time and later.update_time > cached.update_time
    moment = datetime.now(UTC) + timedelta(days=2)
    changed = gemini.caches.update(name=cached.name, config={"expire_time": moment})
    assert abs((changed.expire_time - moment).total_seconds()) < 1
    assert gemini.caches.get(name=cached.name).expire_time == changed.expire_time
    path = f"/v1beta/{cached.name}"
    masked = server.http.patch(
        f"{path}?updateMask=ttl", json={"ttl": "60s", "expireTime": "2050-01-01T00:00:00Z"}
    ).json()
    assert masked["expireTime"] < "2050"
    for query, body, words in (
        ("", {}, "required"),
        ("", {"ttl": "60s", "expireTime": "2050-01-01T00:00:00Z"}, "exclude"),
        ("", {"ttl": "soon"}, "duration"),
        ("", {"ttl": "0s"}, "duration"),
        ("", {"ttl": "-5s"}, "duration"),
        ("", {"ttl": "999999999999s"}, "duration"),
        ("", {"expireTime": "2001-01-01T00:00:00Z"}, "past"),
        ("", {"expireTime": "2050-01-01T00:00:00"}, "RFC 3339"),
        ("", {"expireTime": "tomorrow"}, "RFC 3339"),
        ("", {"displayName": "b"}, "unknown"),
        ("", {"name": "cachedContents/other", "ttl": "60s"}, "path"),
        ("?updateMask=displayName", {"ttl": "60s"}, "updateMask"),
        ("?updateMask=expireTime", {"ttl": "60s"}, "required"),
    ):
        answer = server.http.patch(path + query, json=body)
        assert answer.status_code == 400 and words in answer.json()["error"]["message"], body
    gemini.caches.delete(name=cached.name)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"contents": []}, 400),
        ({"contents": [{"role": "user", "parts": [{"text": "a"}]}], "model": "fish"}, 404),
        ({"contents": [{"role": "user", "parts": [{"text": STORY * 40}]}]}, 400),
        ({"contents": [{"parts": [{"fileData": {"fileUri": "files/none"}}]}]}, 404),
        ({"contents": [{"parts": [{"inlineData": {"mimeType": "image/png", "data": ""}}]}]}, 400),
        ({"contents": [{"parts": [{"text": "a"}]}], "ttl": "1s", "expireTime": "x"}, 400),
        ({"contents": [{"parts": [{"text": "a"}]}], "tools": [{"urlContext": {}}]}, 400),
        ({"systemInstruction": {"parts": [{"fileData": {"fileUri": "files/a"}}]}}, 400),
        ({"contents": [{"parts": [{"text": "a"}]}], "name": "cachedContents/mine"}, 400),
    ],
)
def test_what_cannot_be_cached_is_refused_and_leaves_nothing(
    server: LiveServer, gemini: Any, body: Any, status: int
) -> None:
    answer = server.http.post(CACHED, json={"model": f"models/{MODEL}", **body})
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["code"] == status
    assert list(gemini.caches.list()) == [] and list(gemini.files.list()) == []


def test_a_document_that_cannot_be_read_is_not_cached(server: LiveServer, gemini: Any) -> None:
    broken = {"inline_data": {"data": b"%PDF-1.7\nnot true", "mime_type": "application/pdf"}}
    with pytest.raises(Exception, match="INVALID_ARGUMENT"):
        create(gemini, contents=[{"role": "user", "parts": [broken]}])
    assert list(gemini.caches.list()) == [] and list(gemini.files.list()) == []


def test_a_cached_content_is_there_after_a_restart(hermes_folder: Path, tmp_path: Path) -> None:
    with serving(hermes_folder, tmp_path) as server:
        gemini = connect(server)
        text = {"mime_type": "text/plain", "display_name": "a.txt"}
        file = gemini.files.upload(file=io.BytesIO(STORY.encode()), config=text)
        wait_for(lambda: gemini.files.get(name=file.name).state.name == "ACTIVE")
        wanted = {"contents": [file], "tools": [CLOCK], "display_name": "gulls"}
        cached = kept(server, gemini, **wanted)
        tokens = cached.usage_metadata.total_token_count
        before = ask(gemini, cached_content=cached.name)
    with serving(hermes_folder, tmp_path) as server:
        gemini = connect(server)
        known = gemini.caches.get(name=cached.name)
        assert known.model_dump() == cached.model_dump()
        after = ask(gemini, cached_content=cached.name)
        assert after.text == before.text
        assert after.usage_metadata.cached_content_token_count >= tokens // 64 * 64
        assert server.engine_stats().computed_tokens < tokens // 2
        gemini.caches.delete(name=cached.name)
        gemini.files.delete(name=file.name)
        assert_nothing_is_left(server)


def assert_nothing_is_left(server: LiveServer) -> None:
    """Wait until no tier has a block; then no file has a byte of the text or of its tokens."""

    def blocks() -> int:
        stats = server.engine_stats()
        assert stats.store is not None
        return stats.device.blocks + sum(tier.blocks for tier in stats.store.tiers.values())

    wait_for(lambda: blocks() == 0)
    tokens = server.tokenizer.encode(STORY)[100:116]
    needles = (SECRET.encode(), np.array(tokens, dtype="<i4").tobytes())

    def files() -> list[Path]:
        return [path for path in server.config.folder.rglob("*") if path.is_file()]

    wait_for(lambda: not [path for path in files() if path.suffix in (".kv", ".txt", ".tokens")])
    assert not files_holding(server.config.folder, *needles)
    assert server.engine_stats().modules_open == 0


def test_a_deletion_leaves_nothing(hermes_folder: Path, tmp_path: Path) -> None:
    with serving(hermes_folder, tmp_path) as server:
        gemini = connect(server)
        contents = [{"role": "user", "parts": [INLINE, {"text": SECRET}]}]
        cached = create(gemini, contents=contents, system_instruction=STORY)
        ask(gemini, cached_content=cached.name)
        gemini.caches.delete(name=cached.name)
        assert_nothing_is_left(server)


def test_what_expires_leaves_nothing(hermes_folder: Path, tmp_path: Path) -> None:
    with serving(hermes_folder, tmp_path) as server:
        gemini = connect(server)
        cached = create(gemini, contents=[{"role": "user", "parts": [INLINE]}])
        ask(gemini, cached_content=cached.name)
        gemini.caches.update(name=cached.name, config={"ttl": "0.05s"})
        wait_for(lambda: not list(gemini.caches.list()))
        with pytest.raises(Exception, match="expired"):
            ask(gemini, cached_content=cached.name)
        assert_nothing_is_left(server)
        assert list(gemini.files.list()) == []


def test_what_expired_while_the_server_was_down_is_gone(
    hermes_folder: Path, tmp_path: Path
) -> None:
    with serving(hermes_folder, tmp_path) as server:
        gemini = connect(server)
        cached = kept(server, gemini)
        gemini.caches.update(name=cached.name, config={"ttl": "5s"})
        expires = gemini.caches.get(name=cached.name).expire_time.timestamp()
    while time.time() < expires:
        time.sleep(0.05)
    with serving(hermes_folder, tmp_path) as server:
        assert list(connect(server).caches.list()) == []
        assert_nothing_is_left(server)
