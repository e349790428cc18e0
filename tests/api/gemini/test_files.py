"""Files as Google's clients send them: in pieces, under an address of their own."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.api.gemini.google_client import connect
from tests.api.live_server import MODEL, LiveServer
from tests.support.waiting import wait_for

STORY = b"The lift goes up to the snow, and the road is closed until spring. " * 30
UPLOADS = "/upload/v1beta/files"
START = {"X-Goog-Upload-Protocol": "resumable", "X-Goog-Upload-Command": "start"}


def begin(server: LiveServer, size: int | None = None, **headers: str) -> str:
    """The address of an upload that has begun."""
    declared = {} if size is None else {"X-Goog-Upload-Header-Content-Length": str(size)}
    answer = server.http.post(
        UPLOADS, json={"file": {"displayName": "a.txt"}}, headers={**START, **declared, **headers}
    )
    assert answer.status_code == 200, answer.text
    assert answer.headers["X-Goog-Upload-Status"] == "active"
    return answer.headers["X-Goog-Upload-URL"]


def send(url: str, command: str, offset: int = 0, data: bytes = b"") -> httpx.Response:
    """Goes on with an upload, without a key: who knows its address may."""
    headers = {"X-Goog-Upload-Command": command, "X-Goog-Upload-Offset": str(offset)}
    return httpx.post(url, headers=headers, content=data)


def active(gemini: Any, name: str) -> Any:
    wait_for(lambda: gemini.files.get(name=name).state.name in ("ACTIVE", "FAILED"))
    return gemini.files.get(name=name)


def partial_files(server: LiveServer) -> list[Path]:
    return list(server.documents.glob("*.partial"))


@pytest.fixture
def uploaded(gemini: Any) -> Iterator[Any]:
    config = {"display_name": "story.txt", "mime_type": "text/plain"}
    file = gemini.files.upload(file=io.BytesIO(STORY), config=config)
    yield file
    gemini.files.delete(name=file.name)


def test_a_file_becomes_active_and_is_asked_about(gemini: Any, uploaded: Any) -> None:
    assert uploaded.display_name == "story.txt" and uploaded.mime_type == "text/plain"
    assert uploaded.size_bytes == len(STORY) and uploaded.state.name in ("PROCESSING", "ACTIVE")
    known = active(gemini, uploaded.name)
    assert known.state.name == "ACTIVE" and known.uri == uploaded.uri
    usage = gemini.models.generate_content(
        model=MODEL, contents=[known, "Where?"], config={"max_output_tokens": 2}
    ).usage_metadata
    assert usage.prompt_token_count - usage.cached_content_token_count < 128
    by_name = {"fileData": {"fileUri": uploaded.name}}
    assert gemini.models.count_tokens(
        model=MODEL, contents={"parts": [by_name, {"text": "Where?"}]}
    ).total_tokens == pytest.approx(usage.prompt_token_count, abs=3)


def test_a_path_is_uploaded_under_its_name(gemini: Any, tmp_path: Path) -> None:
    path = tmp_path / "handbook.md"
    path.write_bytes(b"# Handbook\n\n" + STORY)
    file = gemini.files.upload(file=path)
    assert file.display_name == "handbook.md" and file.mime_type == "text/markdown"
    gemini.files.delete(name=file.name)
    with pytest.raises(Exception, match="NOT_FOUND"):
        gemini.files.get(name=file.name)


def test_the_files_are_those_of_the_other_api(server: LiveServer, uploaded: Any) -> None:
    file_id = f"file-{uploaded.name.removeprefix('files/')}"
    told = server.http.get(f"/v1/files/{file_id}").json()
    assert told["filename"] == "story.txt" and told["bytes"] == len(STORY)
    assert server.http.get(f"/v1beta/files/{file_id}").json()["name"] == uploaded.name


def test_a_file_that_cannot_be_read_has_failed_with_the_reason(gemini: Any) -> None:
    config = {"mime_type": "application/pdf", "display_name": "broken.pdf"}
    broken = io.BytesIO(b"%PDF-1.7\nnothing of it is true\n%%EOF")
    file = active(gemini, gemini.files.upload(file=broken, config=config).name)
    assert file.state.name == "FAILED" and file.error.message
    with pytest.raises(Exception, match=r"broken\.pdf"):
        gemini.models.generate_content(model=MODEL, contents=[file, "What?"])
    gemini.files.delete(name=file.name)


def test_pieces_make_the_file_and_a_broken_piece_may_be_sent_again(server: LiveServer) -> None:
    url = begin(server, size=len(STORY))
    assert send(url, "upload", 0, STORY[:700]).headers["X-Goog-Upload-Status"] == "active"
    gap = send(url, "upload", 900, STORY[900:])
    assert gap.status_code == 400 and "700" in gap.json()["error"]["message"]
    assert send(url, "query").headers["X-Goog-Upload-Size-Received"] == "700"
    early = send(url, "finalize")
    assert early.status_code == 400 and str(len(STORY)) in early.json()["error"]["message"]
    assert send(url, "upload", 700, STORY[700:1500]).status_code == 200
    ended = send(url, "upload, finalize", 1500, STORY[1500:])
    assert ended.headers["X-Goog-Upload-Status"] == "final"
    file = ended.json()["file"]
    content = server.http.get(f"/v1/files/{file['name'].replace('files/', 'file-')}/content")
    assert content.content == STORY and file["displayName"] == "a.txt"
    assert send(url, "query").status_code == 404
    assert server.http.delete(f"/v1beta/{file['name']}").json() == {}
    assert not partial_files(server)


def test_a_cancelled_upload_leaves_nothing(server: LiveServer) -> None:
    url = begin(server)
    send(url, "upload", 0, STORY)
    assert len(partial_files(server)) == 1
    assert send(url, "cancel").headers["X-Goog-Upload-Status"] == "cancelled"
    assert not partial_files(server) and send(url, "query").status_code == 404


@pytest.mark.parametrize(
    ("data", "status"), [(b"\0" * 600, 400), (b" \n", 400), (b"a" * (9 << 20), 413)]
)
def test_what_is_no_document_ends_its_upload(server: LiveServer, data: bytes, status: int) -> None:
    url = begin(server)
    answer = send(url, "upload, finalize", 0, data)
    assert answer.status_code == status and answer.headers["X-Goog-Upload-Status"] == "final"
    assert answer.json()["error"]["code"] == status
    assert send(url, "query").status_code == 404 and not partial_files(server)


def test_a_file_that_is_declared_too_large_is_refused_at_once(
    server: LiveServer, gemini: Any
) -> None:
    headers = {**START, "X-Goog-Upload-Header-Content-Length": str(9 << 20)}
    answer = server.http.post(UPLOADS, headers=headers)
    assert answer.status_code == 413 and "--max-upload-mib" in answer.text
    with pytest.raises(Exception, match="413"):
        gemini.files.upload(file=io.BytesIO(b"a" * (9 << 20)), config={"mime_type": "text/plain"})


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ({}, {}),
        ({**START, "X-Goog-Upload-Protocol": "raw"}, {}),
        ({**START, "X-Goog-Upload-Header-Content-Length": "-1"}, {}),
        ({**START, "X-Goog-Upload-Header-Content-Length": "many"}, {}),
        (START, {"file": {"name": "files/mine"}}),
        (START, {"file": 3}),
    ],
)
def test_an_upload_that_begins_otherwise_is_refused(
    server: LiveServer, headers: dict[str, str], body: Any
) -> None:
    answer = server.http.post(UPLOADS, headers=headers, json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["status"] == "INVALID_ARGUMENT"
    assert not partial_files(server)


def test_too_many_uploads_are_refused_until_one_ends(server: LiveServer) -> None:
    urls = [begin(server) for _ in range(64)]
    refused = server.http.post(UPLOADS, headers=START)
    assert refused.status_code == 429
    assert refused.json()["error"]["status"] == "RESOURCE_EXHAUSTED"
    for url in urls:
        send(url, "cancel")
    send(begin(server), "cancel")


def test_all_files_are_listed_while_they_are_deleted(gemini: Any) -> None:
    text = {"mime_type": "text/plain"}
    names = {
        gemini.files.upload(file=io.BytesIO(b"Story %d. " % number * 9), config=text).name
        for number in range(5)
    }
    found = []
    for file in gemini.files.list(config={"page_size": 2}):
        found.append(file.name)
        gemini.files.delete(name=file.name)
    assert sorted(found) == sorted(names)
    assert list(gemini.files.list()) == []


def test_each_tenant_has_files_of_its_own(hermes_folder: Path, tmp_path: Path) -> None:
    with LiveServer(hermes_folder, tmp_path, api_key=("alice", "bob")) as server:
        alice, bob = connect(server, "alice"), connect(server, "bob")
        text = {"mime_type": "text/plain"}
        file = alice.files.upload(file=io.BytesIO(STORY), config=text)
        assert [each.name for each in alice.files.list()] == [file.name]
        assert list(bob.files.list()) == []
        with pytest.raises(Exception, match="NOT_FOUND"):
            bob.files.delete(name=file.name)
        assert server.http.post(UPLOADS, headers=START).status_code == 401
