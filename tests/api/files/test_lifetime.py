"""Files that are deleted when their time is over, all of them, also across a restart."""

import sqlite3
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import openai
import pytest

from api.files.document_store import DocumentStore
from tests.api.files.test_document_store import with_store
from tests.api.files.test_files import upload, wait_until_done
from tests.api.live_server import MODEL, LiveServer
from tests.support.stored_files import files_holding
from tests.support.waiting import wait_for

HOUR = 3600
WORDS = "".join(f"the gulls of Trieste count {number} boats of theirs. " for number in range(60))
SECRET = b"boats of theirs"


class Clock:
    """Tells the server's expiry a later time than it is."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ahead = 0.0
        stand_in = SimpleNamespace(time=lambda: time.time() + self.ahead)
        for module in ("api.background.expiry", "api.files.document_library"):
            monkeypatch.setattr(f"{module}.time", stand_in)
        monkeypatch.setattr("api.background.expiry.CHECK_SECONDS", 0.05)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def serving(model_folder: Path, store: Path) -> LiveServer:
    cache = {"kv_dir": store / "kv", "host_pool_gib": 0.05}
    return LiveServer(model_folder, store, cache=cache)


def ask(server: LiveServer, name: str) -> None:
    part = {"type": "file", "file": {"file_id": name}}
    messages = [{"role": "user", "content": [part, {"type": "text", "text": "Why?"}]}]
    body = {"model": MODEL, "messages": messages, "max_tokens": 2, "prompt_cache_retention": "24h"}
    server.http.post("/v1/chat/completions", json=body).raise_for_status()


def assert_nothing_is_left(server: LiveServer) -> None:
    def blocks() -> int:
        stats = server.engine_stats()
        assert stats.store is not None
        return stats.device.blocks + sum(tier.blocks for tier in stats.store.tiers.values())

    wait_for(lambda: not blocks())
    tokens = np.array(server.tokenizer.encode(WORDS)[200:216], dtype="<i4").tobytes()
    wait_for(lambda: not files_holding(server.config.folder, SECRET, tokens))


@pytest.mark.parametrize("restarted", [False, True])
def test_a_file_is_deleted_when_its_time_is_over(
    model_folder: Path, tmp_path: Path, clock: Clock, restarted: bool
) -> None:
    with serving(model_folder, tmp_path) as server, server.openai() as client:
        file = client.files.create(
            file=("a.txt", WORDS.encode()),
            purpose="user_data",
            expires_after={"anchor": "created_at", "seconds": HOUR},
        )
        assert file.expires_at == file.created_at + HOUR
        assert client.files.retrieve(file.id).expires_at == file.expires_at
        wait_until_done(server, file.id)
        ask(server, file.id)
        clock.ahead = HOUR - 60
        assert client.files.retrieve(file.id)
        if not restarted:
            _expires(server, client, file.id, clock)
    if restarted:
        clock.ahead = 0.0
        with serving(model_folder, tmp_path) as server, server.openai() as client:
            assert client.files.retrieve(file.id).expires_at == file.expires_at
        clock.ahead = 2 * HOUR
        with serving(model_folder, tmp_path) as server, server.openai() as client:
            _expires(server, client, file.id, clock)


def _expires(server: LiveServer, client: openai.OpenAI, name: str, clock: Clock) -> None:
    clock.ahead = 2 * HOUR
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(name)
    wait_for(lambda: not [file for file in client.files.list() if file.id == name])
    assert_nothing_is_left(server)


def test_a_file_without_a_term_stays(server: LiveServer) -> None:
    told = server.http.get(f"/v1/files/{upload(server, WORDS)}").json()
    assert told["expires_at"] is None


def test_a_term_may_be_json(server: LiveServer) -> None:
    name = upload(server, "x y", expires_after='{"anchor": "created_at", "seconds": 3600}')
    told = server.http.get(f"/v1/files/{name}").json()
    assert told["expires_at"] == told["created_at"] + HOUR


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"expires_after[seconds]": "3600"}, "expires_after.anchor"),
        ({"expires_after[anchor]": "created_at"}, "expires_after.seconds"),
        *[
            ({"expires_after[anchor]": "created_at", "expires_after[seconds]": seconds}, where)
            for where in ("expires_after.seconds",)
            for seconds in ("3599", "2592001", "-1", "many", "", "1e4", "nan")
        ],
        (
            {"expires_after[anchor]": "last_active_at", "expires_after[seconds]": "3600"},
            "expires_after.anchor",
        ),
        ({"expires_after": "{"}, "expires_after"),
        ({"expires_after": "3600"}, "expires_after"),
        ({"expires_after": '{"anchor": "created_at", "seconds": 3600, "a": 1}'}, "expires_after.a"),
        ({"expires_after": "{}", "expires_after[seconds]": "3600"}, "expires_after"),
        ({"expires_after[days]": "3"}, "expires_after[days]"),
    ],
)
def test_what_is_no_term_is_refused(server: LiveServer, fields: Any, param: str) -> None:
    reply = server.http.post("/v1/files", files={"file": ("a.txt", "x y")}, data=fields)
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"] == param, reply.text


def test_what_came_with_a_message_does_not_share_a_file_that_goes(server: LiveServer) -> None:
    name = upload(
        server, "a few words", "few.txt", expires_after='{"anchor": "created_at", "seconds": 3600}'
    )
    part = {"type": "file", "file": {"file_data": "YSBmZXcgd29yZHM=", "filename": "few.txt"}}
    body = {"messages": [{"role": "user", "content": [part]}], "max_tokens": 1}
    server.http.post("/v1/chat/completions", json=body).raise_for_status()
    listed = server.http.get("/v1/files").json()["data"]
    found = {file["id"]: file["expires_at"] for file in listed if file["filename"] == "few.txt"}
    assert len(found) == 2 and found.pop(name) is not None and set(found.values()) == {None}


def test_an_earlier_database_gets_the_new_column(tmp_path: Path) -> None:
    path = tmp_path / "db"
    with sqlite3.connect(path) as connection:
        connection.executescript(
            "CREATE TABLE documents (number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, "
            "tenant TEXT NOT NULL, filename TEXT NOT NULL, purpose TEXT NOT NULL, "
            "bytes INTEGER NOT NULL, created_at INTEGER NOT NULL, sha256 TEXT NOT NULL, "
            "system TEXT, date TEXT NOT NULL, tokens INTEGER, fingerprint TEXT) STRICT;"
            "INSERT INTO documents VALUES (1, 'a', 't', 'f', 'p', 3, 1, '00', NULL, 'd', 7, 'x');"
            "PRAGMA user_version = 1;"
        )
    connection.close()

    async def work(store: DocumentStore) -> Any:
        return await store.all()

    (record,) = with_store(path, work)
    assert (record.id, record.tokens, record.expires_at) == ("a", 7, None)
    (again,) = with_store(path, work)
    assert again == record
