"""Files as Anthropic's client does them; they are the same ones that OpenAI's client sees."""

import datetime
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.api.live_server import LiveServer
from tests.support.waiting import patient

anthropic = pytest.importorskip("anthropic")

HEADERS = {"anthropic-version": "2023-06-01"}


@pytest.fixture
def own(model_folder: Path, tmp_path: Path) -> Iterator[LiveServer]:
    with LiveServer(model_folder, tmp_path) as running:
        yield running


@pytest.fixture
def claude(own: LiveServer) -> Iterator[Any]:
    with anthropic.Anthropic(
        base_url=own.url, api_key="none", max_retries=0, timeout=patient()
    ) as connected:
        yield connected


@pytest.mark.parametrize("beta", [False, True])
def test_a_file_comes_and_goes(own: LiveServer, claude: Any, beta: bool) -> None:
    files = claude.beta.files if beta else claude.files
    file = files.upload(file=("story.md", b"A story.", "text/markdown"))
    assert (file.type, file.filename, file.size_bytes) == ("file", "story.md", 8)
    assert file.mime_type == "text/markdown" and file.downloadable
    age = datetime.datetime.now(datetime.UTC) - file.created_at
    assert datetime.timedelta() <= age < datetime.timedelta(hours=1)
    same = own.http.get(f"/v1/files/{file.id}").json()
    assert same["object"] == "file" and same["created_at"] == int(file.created_at.timestamp())
    assert files.retrieve_metadata(file.id).id == file.id
    assert files.download(file.id).read() == b"A story."
    assert [each.id for each in files.list()] == [file.id]
    gone = files.delete(file.id)
    assert (gone.id, gone.type) == (file.id, "file_deleted")
    with pytest.raises(anthropic.NotFoundError) as caught:
        files.delete(file.id)
    assert caught.value.body["error"]["type"] == "not_found_error"
    assert list(files.list()) == []


def test_files_come_in_pages(own: LiveServer, claude: Any) -> None:
    ids = [claude.files.upload(file=(f"{n}.txt", b"x y")).id for n in range(5)]
    assert [file.id for file in claude.files.list(limit=2)] == ids[::-1]
    page = claude.files.list(limit=2)
    assert len(page.data) == 2 and page.next_page == ids[3]
    some = claude.files.list(ids=[ids[1], "file-none", ids[4]])
    assert {file.id for file in some.data} == {ids[1], ids[4]} and some.next_page is None
    earlier = own.http.get("/v1/files", params={"after_id": ids[1], "limit": 5}, headers=HEADERS)
    told = earlier.json()
    assert [file["id"] for file in told["data"]] == [ids[0]] == [told["first_id"]]
    assert told["has_more"] is False
    for query, param in (
        ({"limit": 0}, "limit"),
        ({"limit": 1001}, "limit"),
        ({"page": "file-none"}, "page"),
        ({"after": ids[0]}, "after"),
    ):
        reply = own.http.get("/v1/files", params=query, headers=HEADERS)
        assert reply.status_code in (400, 404) and reply.json()["error"]["param"] == param


def test_a_file_may_have_a_term(own: LiveServer, claude: Any) -> None:
    file = claude.files.upload(file=("a.txt", b"x y"), expires_in_seconds=7200)
    assert file.expires_at - file.created_at == datetime.timedelta(hours=2)
    for term in ("3599", "7776001", "many", "1.5"):
        form = {"files": {"file": ("a.txt", b"x y")}, "data": {"expires_in_seconds": term}}
        reply = own.http.post("/v1/files", **form, headers=HEADERS)  # type: ignore[arg-type]
        assert reply.status_code == 400, reply.text
        assert reply.json()["error"]["param"] == "expires_in_seconds"
        assert reply.json()["type"] == "error"
    form = {"files": {"file": ("a.txt", b"x y")}, "data": {"purpose": "user_data"}}
    reply = own.http.post("/v1/files", **form, headers=HEADERS)  # type: ignore[arg-type]
    assert reply.status_code == 400 and reply.json()["error"]["param"] == "purpose"


def test_what_is_no_document_is_refused_in_the_clients_shape(claude: Any) -> None:
    with pytest.raises(anthropic.BadRequestError) as caught:
        claude.files.upload(file=("a.bin", b"\0\1\2\3" * 9))
    assert caught.value.body["error"]["type"] == "invalid_request_error"
    with pytest.raises(anthropic.APIStatusError) as large:
        claude.files.upload(file=("a.txt", b"x " * (5 << 20)))
    assert large.value.status_code == 413
    assert large.value.body["error"]["type"] == "request_too_large"
