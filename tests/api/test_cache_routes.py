"""What `/v1/cache` tells, what flushing frees, and why the cache had what it had."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from api.http_server import startup_line
from tests.api.files.test_files import ask, cached_tokens, upload, wait_until_done
from tests.api.live_server import MODEL, LiveServer

STORY = "".join(f"Line {i}: {i * 7919 % 977} boats came back with fish.\n" for i in range(250))


@pytest.fixture(scope="module")
def tiered(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server with all three tiers."""
    cache = {
        "host_pool_gib": 0.05,
        "kv_dir": tmp_path_factory.mktemp("kv"),
        "disk_cap_gib": 0.5,
        "disk_free_gib": 0.0,
    }
    with LiveServer(model_folder, tmp_path_factory.mktemp("store"), cache=cache) as running:
        yield running


@pytest.fixture(scope="module")
def document(tiered: LiveServer) -> str:
    file_id = upload(tiered, STORY, name="boats.txt")
    wait_until_done(tiered, file_id)
    return file_id


def cache_of(server: LiveServer) -> dict[str, Any]:
    return server.http.get("/v1/cache").raise_for_status().json()  # type: ignore[no-any-return]


def clear(server: LiveServer, **body: Any) -> dict[str, Any]:
    answer = server.http.post("/v1/cache/flush", json=body or None)
    assert answer.status_code == 200, answer.text
    return answer.json()["freed"]  # type: ignore[no-any-return]


def complete(server: LiveServer, prompt: Any, **more: Any) -> dict[str, Any]:
    body = {"prompt": prompt, "max_tokens": 2, "temperature": 0.0, **more}
    answer = server.http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()  # type: ignore[no-any-return]


def explained(server: LiveServer, prompt: Any) -> dict[str, Any]:
    return complete(server, prompt, cache_explain=True)["cache_explain"]  # type: ignore[no-any-return]


def ids(count: int, seed: int) -> list[int]:
    return [5 + (seed * 131 + i * i * 7 + i) % 500 for i in range(count)]


def about(file_id: str, question: str) -> dict[str, Any]:
    part = {"type": "file", "file": {"file_id": file_id}}
    return {
        "messages": [{"role": "user", "content": [part, {"type": "text", "text": question}]}],
        "max_tokens": 2,
        "cache_explain": True,
    }


def test_the_tiers_and_documents_are_listed(tiered: LiveServer, document: str) -> None:
    told = cache_of(tiered)
    assert set(told["tiers"]) == {"device", "host", "disk"}
    for tier in told["tiers"].values():
        assert 0 < tier["bytes"] <= tier["capacity_bytes"]
        assert tier["blocks"] > 0 and tier["capacity_tokens"] > 0
    assert told["tiers"]["disk"]["extents"] > 0
    assert told["tiers"]["disk"]["checksum_failures"] == 0
    (listed,) = (one for one in told["documents"] if one["id"] == document)
    assert (listed["filename"], listed["state"]) == ("boats.txt", "ready")
    assert listed["tokens"] == listed["durable_tokens"] > 1000
    assert listed["tier"] == "device"


def test_capacity_is_told_in_tokens(server: LiveServer, tiered: LiveServer) -> None:
    info = tiered.application.engine.info
    (model,) = tiered.http.get("/v1/models").json()["data"]
    capacity = model["longctx"]["capacity_tokens"]
    assert capacity == {
        tier: described["capacity_tokens"] for tier, described in cache_of(tiered)["tiers"].items()
    }
    assert 0 < capacity["host"] < capacity["device"] < capacity["disk"]
    assert capacity["disk"] * info.kv_block_bytes / 64 == pytest.approx(0.5 * 2**30, rel=0.01)
    line = startup_line(info)
    assert f"{capacity['disk']:,} the disk (0.0 of 0.5 GB are used)" in line
    assert "disk" not in startup_line(server.application.engine.info)


def test_what_was_flushed_is_read_back_when_it_is_asked_for(
    tiered: LiveServer, document: str
) -> None:
    before = ask(tiered, document, question="Which?")
    freed = clear(tiered)
    assert freed["device"]["blocks"] > 0 and freed["device"]["bytes"] > 0
    assert cache_of(tiered)["tiers"]["device"]["blocks"] == 0
    reads = cache_of(tiered)["tiers"]["host"]["hits"]

    again = ask(tiered, document, question="Which?")

    assert again["choices"] == before["choices"]
    assert cached_tokens(again) >= cached_tokens(before) - 64
    assert cache_of(tiered)["tiers"]["host"]["hits"] > reads


def test_the_explanation_names_the_tier_that_had_it(tiered: LiveServer, document: str) -> None:
    whole = len(tiered.tokenizer.encode(STORY)) // 64 * 64
    ask(tiered, document, question="Where?")
    for lost, place in ((None, "device"), ("device", "host"), ("all", "disk")):
        if lost is not None:
            clear(tiered, tier=lost)
        (listed,) = (one for one in cache_of(tiered)["documents"] if one["id"] == document)
        assert listed["tier"] == place
        answer = tiered.http.post(
            "/v1/chat/completions", json=about(document, f"Which {place}?")
        ).json()
        told = answer["cache_explain"]
        assert told["matched_tokens"][place] >= whole - 64
        assert sum(told["matched_tokens"].values()) == cached_tokens(answer)
        assert told["prompt_tokens"] == answer["usage"]["prompt_tokens"]


def test_flushing_without_a_body_empties_the_device(tiered: LiveServer) -> None:
    complete(tiered, ids(200, 1))
    answer = tiered.http.post("/v1/cache/flush")
    assert answer.json()["freed"].keys() == {"device"}
    assert clear(tiered, tier="all").keys() == {"device", "host"}


def test_wrong_wishes_are_refused_in_one_shape(server: LiveServer, tiered: LiveServer) -> None:
    for answer, param in (
        (tiered.http.post("/v1/cache/flush", json={"tier": "disk"}), "tier"),
        (tiered.http.post("/v1/cache/flush", json={"tiers": "all"}), "tiers"),
        (tiered.http.post("/v1/cache/flush", content=b"{"), None),
        (server.http.post("/v1/cache/flush", json={"tier": "host"}), "tier"),
        (
            server.http.post("/v1/completions", json={"prompt": ["a", "b"], "cache_explain": True}),
            "cache_explain",
        ),
    ):
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["param"] == param


def test_a_server_without_lower_tiers_says_so(server: LiveServer) -> None:
    tiers = cache_of(server)["tiers"]
    assert tiers["host"] is tiers["disk"] is None
    assert tiers["device"]["capacity_bytes"] > 0


def test_nothing_is_explained_unasked(tiered: LiveServer) -> None:
    assert "cache_explain" not in complete(tiered, ids(100, 2))


def test_in_a_stream_the_explanation_comes_with_the_usage(tiered: LiveServer) -> None:
    for include in (True, False):
        body = {"prompt": ids(100, 3), "max_tokens": 2, "stream": True, "cache_explain": True}
        if include:
            body["stream_options"] = {"include_usage": True}
        text = tiered.http.post("/v1/completions", json=body).text
        events = [line for line in text.splitlines() if "cache_explain" in line]
        assert len(events) == 1
        assert ('"usage":{' in events[0]) == include


def test_the_first_token_that_differs_is_shown_with_both_texts(tiered: LiveServer) -> None:
    sentence = "The harbour master wrote the names of all ships in a long green book. "
    complete(tiered, sentence * 12)
    told = explained(tiered, sentence * 6 + sentence.replace("green", "BLUE") + sentence * 5)
    assert told["reason"] == "never_seen"
    difference = told["first_divergent_token"]
    assert difference["known"] == "prompt"
    assert difference["position"] >= sum(told["matched_tokens"].values()) > 0
    assert "BLUE" in difference["text"] and "green" in difference["known_text"]


def test_no_tenant_is_shown_what_another_said(model_folder: Path, tmp_path: Path) -> None:
    secret = "The password of the harbour gate is swordfish. " * 8
    with LiveServer(model_folder, tmp_path, api_key=("alice", "bob")) as server:
        for key, cached in (("alice", 0), ("bob", 0), ("alice", 1)):
            answer = httpx.post(
                f"{server.url}/v1/completions",
                headers={"Authorization": f"Bearer {key}"},
                json={
                    "model": MODEL,
                    "prompt": f"{secret}{key}",
                    "max_tokens": 1,
                    "cache_explain": True,
                },
            ).json()
            told = answer["cache_explain"]
            assert (told["matched_tokens"]["device"] > 0) == bool(cached)
            if not cached:
                assert told["first_divergent_token"] is None
        for path in ("/v1/cache", "/metrics"):
            assert httpx.get(f"{server.url}{path}").status_code == 401


def test_documents_of_others_are_not_listed(model_folder: Path, tmp_path: Path) -> None:
    with LiveServer(model_folder, tmp_path, api_key=("alice", "bob")) as server:
        alice, bob = ({"Authorization": f"Bearer {key}"} for key in ("alice", "bob"))
        files = {"file": ("mine.txt", b"The boats come back. " * 50)}
        httpx.post(f"{server.url}/v1/files", headers=alice, files=files).raise_for_status()
        lists = [
            httpx.get(f"{server.url}/v1/cache", headers=key).json()["documents"]
            for key in (alice, bob)
        ]
        assert [len(documents) for documents in lists] == [1, 0]
