"""Stored responses: whose they are, how long they last, and that what is deleted is gone."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from api.stored_responses import library
from api.stored_responses.records import ResponseRecord, ResponseRecords
from tests.api.live_server import MODEL, LiveServer
from tests.support.stored_files import files_holding
from tests.support.waiting import wait_for

WORDS = "".join(
    f"the gulls of Trieste count {number} boats, none of them theirs. " for number in range(60)
)
SECRET = b"none of them theirs"
GREEDY: dict[str, Any] = {"model": MODEL, "temperature": 0.0, "max_output_tokens": 4}


def serving(model_folder: Path, store: Path, **settings: Any) -> LiveServer:
    cache = {"kv_dir": store / "kv", "host_pool_gib": 0.05}
    return LiveServer(model_folder, store, cache=cache, **settings)


@pytest.fixture
def stored(model_folder: Path, tmp_path: Path) -> Iterator[LiveServer]:
    with serving(model_folder, tmp_path / "store") as running:
        yield running


def blocks(server: LiveServer) -> int:
    """Counts the blocks in all tiers."""
    stats = server.engine_stats()
    assert stats.store is not None
    return stats.device.blocks + sum(tier.blocks for tier in stats.store.tiers.values())


def files_with(server: LiveServer, text: str = WORDS) -> list[Path]:
    """Finds the files that have a part of the text in them, or of its tokens."""
    tokens = np.array(server.tokenizer.encode(text)[200:216], dtype="<i4").tobytes()
    return files_holding(server.config.folder, SECRET, tokens)


def test_a_response_outlives_the_server_and_is_gone_on_from(
    model_folder: Path, tmp_path: Path
) -> None:
    with serving(model_folder, tmp_path) as server, server.openai() as client:
        first = client.responses.create(**GREEDY, input=WORDS, metadata={"a": "b"})
        second = client.responses.create(**GREEDY, input="?", previous_response_id=first.id)
        items = client.responses.input_items.list(second.id)
    with serving(model_folder, tmp_path) as server, server.openai() as client:
        assert client.responses.retrieve(first.id) == first
        assert client.responses.retrieve(second.id) == second
        assert client.responses.input_items.list(second.id).data == items.data
        third = client.responses.create(**GREEDY, input="?", previous_response_id=second.id)
        assert third.usage is not None
        assert third.usage.input_tokens_details.cached_tokens > 1000  # from disk


@pytest.mark.parametrize("restarted", [False, True])
def test_what_is_deleted_leaves_nothing(
    model_folder: Path, tmp_path: Path, restarted: bool
) -> None:
    with serving(model_folder, tmp_path) as server, server.openai() as client:
        first = client.responses.create(**GREEDY, input=WORDS)
        second = client.responses.create(**GREEDY, input="Why?", previous_response_id=first.id)
        assert files_with(server) and blocks(server)
        if not restarted:
            _delete(server, first.id, second.id)
    if restarted:
        with serving(model_folder, tmp_path) as server:
            _delete(server, first.id, second.id)


def _delete(server: LiveServer, *names: str) -> None:
    for name in names:
        told = server.http.delete(f"/v1/responses/{name}").raise_for_status().json()
        receipt = told.pop("longctx")
        assert told == {"id": name, "object": "response", "deleted": True}
        assert receipt["waiting_for"] == {}
        assert server.http.get(f"/v1/responses/{name}").status_code == 404
        assert server.http.delete(f"/v1/responses/{name}").status_code == 404
    wait_for(lambda: not blocks(server))
    assert not files_with(server)


def test_a_deletion_that_was_cut_short_ends_at_the_next_start(
    model_folder: Path, tmp_path: Path
) -> None:
    with serving(model_folder, tmp_path) as server, server.openai() as client:
        client.responses.create(**GREEDY, input=WORDS)
    path = tmp_path / "responses.sqlite"

    async def delete() -> None:  # as far as a server comes that is killed then
        records = ResponseRecords(path)
        await records.open()
        name = (await _all(records))[0]
        record = await records.find("", name)
        assert record is not None
        await records.remove(record, new_thread="thread-new")
        await records.close()

    asyncio.run(delete())
    with serving(model_folder, tmp_path) as server:
        wait_for(lambda: not blocks(server))
        assert not files_with(server)


async def _all(records: ResponseRecords) -> list[str]:
    select = "SELECT id FROM responses ORDER BY number"
    return await records._database.run(
        lambda connection: [name for (name,) in connection.execute(select)]
    )


def test_what_stays_of_a_conversation_is_found_in_the_cache_again(stored: LiveServer) -> None:
    with stored.openai() as client:
        first = client.responses.create(**GREEDY, input="Hello.")
        second = client.responses.create(**GREEDY, input=WORDS, previous_response_id=first.id)
        third = client.responses.create(**GREEDY, input="?", previous_response_id=second.id)
        client.responses.delete(third.id)
        for found in (False, True):
            more = client.responses.create(**GREEDY, input="!", previous_response_id=second.id)
            assert more.usage is not None
            assert (more.usage.input_tokens_details.cached_tokens > 1000) == found


def test_a_kept_prompt_goes_with_the_response(stored: LiveServer) -> None:
    with stored.openai() as client:
        told = client.responses.create(**GREEDY, input=WORDS, prompt_cache_retention="24h")
        name = told.id
        assert any(path.name.startswith("prompts.sqlite") for path in files_with(stored))
    _delete(stored, name)


def test_each_tenant_has_its_own(model_folder: Path, tmp_path: Path) -> None:
    with (
        serving(model_folder, tmp_path, api_key=("ana", "bo")) as server,
        server.openai("ana") as ana,
        server.openai("bo") as bo,
    ):
        told = ana.responses.create(**GREEDY, input="Hello.")
        for call in (bo.responses.retrieve, bo.responses.delete, bo.responses.input_items.list):
            with pytest.raises(openai.NotFoundError) as caught:
                call(told.id)
            assert caught.value.code == "response_not_found"
        with pytest.raises(openai.BadRequestError):
            bo.responses.create(**GREEDY, input="?", previous_response_id=told.id)
        assert ana.responses.retrieve(told.id).id == told.id


def test_items_come_in_pages(stored: LiveServer) -> None:
    said: Any = [{"role": "user", "content": f"Number {number}."} for number in range(5)]
    with stored.openai() as client:
        told = client.responses.create(**GREEDY, input=said)
        texts = []
        for item in client.responses.input_items.list(told.id, limit=2, order="asc"):
            assert item.type == "message" and item.content[0].type == "input_text"
            texts.append(item.content[0].text)
        assert texts == [f"Number {number}." for number in range(5)]
        page = client.responses.input_items.list(told.id, limit=2)
        assert page.has_more and page.data[0].id == page.first_id  # type: ignore[attr-defined]
        for query, param in (
            ({"limit": 101}, "limit"),
            ({"after": "msg_0"}, "after"),
            ({"page": 1}, "page"),
            ({"order": "up"}, "order"),
        ):
            reply = stored.http.get(f"/v1/responses/{told.id}/input_items", params=query)
            assert reply.status_code in (400, 404) and reply.json()["error"]["param"] == param
        reply = stored.http.get(f"/v1/responses/{told.id}", params={"stream": "true"})
        assert reply.status_code == 400 and reply.json()["error"]["param"] == "stream"
        included: Any = ["message.output_text.logprobs"]
        assert client.responses.retrieve(told.id, include=included) == told


def test_an_answer_that_cannot_be_stored_is_told_all_the_same(
    stored: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device", "somewhere")

    monkeypatch.setattr(ResponseRecords, "save", fail)
    reply = stored.http.post("/v1/responses", json={**GREEDY, "input": "Hello."})
    told = reply.raise_for_status().json()
    assert told["store"] is False and "is full" in told["longctx"]["not_stored"]
    assert told["output"]


# -- bounds --------------------------------------------------------------------------------------


def record(
    number: int, tenant: str = "ana", *, created_at: int = 1, text: str = "x"
) -> ResponseRecord:
    return ResponseRecord(
        id=f"resp_{tenant}{number}",
        tenant=tenant,
        created_at=created_at,
        previous=None,
        thread=f"thread-{number}",
        response=json.dumps({"text": text}),
        input="[]",
    )


def test_the_oldest_of_a_tenant_give_way(tmp_path: Path) -> None:
    async def main() -> None:
        records = ResponseRecords(tmp_path / "responses.sqlite")
        await records.open()
        await records.save(record(0, "bo"), most=3, most_bytes=1000)
        for number in range(5):
            await records.save(record(number), most=3, most_bytes=1000)
        assert await _all(records) == ["resp_bo0", "resp_ana2", "resp_ana3", "resp_ana4"]
        await records.save(record(5, text="y" * 960), most=3, most_bytes=1000)
        assert await _all(records) == ["resp_bo0", "resp_ana4", "resp_ana5"]
        await records.save(record(6, text="z" * 2000), most=3, most_bytes=1000)
        assert await _all(records) == ["resp_bo0", "resp_ana6"]  # the new one stays
        await records.close()
        data = b"".join(path.read_bytes() for path in tmp_path.iterdir())
        assert b"y" * 100 not in data and b"z" * 100 in data

    asyncio.run(main())


def test_old_ones_go_when_their_time_is_over(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(model_folder, tmp_path) as server, server.openai() as client:
        name = client.responses.create(**GREEDY, input=WORDS).id
    monkeypatch.setattr(library, "LIFE_SECONDS", 0)
    with serving(model_folder, tmp_path) as server:

        def is_gone() -> bool:
            return server.http.get(f"/v1/responses/{name}").status_code == 404

        wait_for(is_gone)
        assert not [path for path in files_with(server) if "responses" in path.name]
